"""A tiny Llama that reads bytes: any text becomes tokens, one a byte, so that items can be checked by eye."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvpleat.hf.models import LoadedModel
from tests import models

POSITIONS = 16384


def tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; with `start`, a token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{ch: i + 2 for i, ch in enumerate(alphabet)}}
    tokens = Tokenizer(BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    if start:
        from tokenizers.processors import TemplateProcessing

        tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def load(start: bool = False, layers: int = 2) -> LoadedModel:
    """The model, random and the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        initializer_range=models.SPREAD,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel("bytes", model, tokenizer(start), "made for a test")
