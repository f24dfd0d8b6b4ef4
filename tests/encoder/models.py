"""Tiny random encoders of every family, and texts of several lengths for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
VOCAB = 97
WINDOW = 8  # of ModernBERT's sliding layers, both sides together: short, so that tests reach past it
FIRST, LAST, PAD = 2, 3, 1  # token ids
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}


def config(family: str, **changes: Any) -> Any:
    """The config of a tiny encoder of `family`."""
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
        shared = {k: _SIZES[k] for k in ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")}
        return DistilBertConfig(**{**sizes, **shared, **changes})
    if family == "modernbert":
        ids = {"cls_token_id": FIRST, "bos_token_id": FIRST, "sep_token_id": LAST, "eos_token_id": LAST}
        kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "local_attention": WINDOW}
        return ModernBertConfig(**{**_SIZES, **ids, **kinds, **changes})
    classes = {"bert": BertConfig, "roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}
    return classes[family](**{**_SIZES, "bos_token_id": FIRST, "eos_token_id": LAST, **changes})


_CLASSES: dict[str, Any] = {
    "bert": BertModel,
    "roberta": RobertaModel,
    "xlm-roberta": XLMRobertaModel,
    "distilbert": DistilBertModel,
    "modernbert": ModernBertModel,
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny encoder in float64 and eval mode; `changes` go to its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = _CLASSES[family](config(family, **changes))
    return model.double().eval()


def texts(lengths: list[int], seed: int = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of random texts framed by FIRST and LAST, with words repeated, padded right or left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        words = 5 + (torch.rand(length, generator=generator) ** 2 * (VOCAB - 6)).long()
        words[0], words[-1] = FIRST, LAST
        part = slice(width - length, width) if left else slice(0, length)
        ids[row, part], mask[row, part] = words, 1
    return ids, mask
