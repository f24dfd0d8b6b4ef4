"""A small BERT with random weights and a word tokenizer, as save_pretrained writes them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
POSITIONS = 64


def bert(layers: int = 3, seed: int = 0) -> BertModel:
    """The model: hidden 32, 4 heads."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=POSITIONS, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return BertModel(config).eval()


def save(folder: Path, model: BertModel | None = None) -> Path:
    """The folder with the model and its tokenizer."""
    (bert() if model is None else model).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=POSITIONS,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder
