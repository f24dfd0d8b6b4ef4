"""Small tokenizers and stores for the tests of training data."""

from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvpleat.bench import corpus
from kvpleat.retrofit.data_store import TokenStore
from tests.conftest import CHAT_TEMPLATE


@cache
def prose() -> str:
    """Some 60 kB of real text."""
    texts = [text for _, text in corpus.read_documents(corpus.shipped())]
    return "\n\n".join(text[:15_000] for text in texts)


@cache
def _trained() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<unk>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(prose().splitlines(), trainer)
    return made.to_str()


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 900 tokens trained on `prose`, with an end of text, and with a chat template if asked for."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<|start|>", eos_token="<|end|>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def prose_store() -> TokenStore:
    """`prose` in documents of a paragraph or more."""
    fast = tokenizer()
    documents = [fast(part)["input_ids"] + [fast.eos_token_id] for part in prose().split("\n\n\n") if part]
    return TokenStore(np.concatenate(documents).astype(np.uint16), np.cumsum([len(d) for d in documents]))


def numbered_store(sizes: list[int]) -> TokenStore:
    """Documents of these sizes whose tokens are 0, 1, 2, ... through all of them: each token tells its place."""
    return TokenStore(np.arange(sum(sizes), dtype=np.uint32), np.cumsum(sizes))
