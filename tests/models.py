"""Tiny random models of every family, the same for the same seed: milliseconds a forward, attention with contrast."""

import inspect
import weakref
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
VOCAB = 97
MAX_POSITIONS = 512
SLIDING_WINDOW = 24  # of the sliding layers of Gemma: short, so that tests reach past it
# What a model calls its cache: transformers 5.24 renamed past_key_values to cache.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SPREAD = 0.15  # of the weights: enough contrast in attention that a wrong mask shows in the logits

_made: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_GEMMA = {**_COMMON, "num_hidden_layers": 4, "sliding_window": SLIDING_WINDOW, "layer_types": _MIXED}


def config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of `family`."""
    if family == "gpt2":
        options = {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 3,
            "n_positions": MAX_POSITIONS,
            "initializer_range": SPREAD,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return GPT2Config(**{**options, **changes})
    if family == "llama":
        return LlamaConfig(**{**_COMMON, **changes})
    if family == "qwen2":
        options = {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"hidden_size": 96}
        return Qwen2Config(**{**options, **changes})
    if family == "qwen3":
        return Qwen3Config(**{**_COMMON, **changes})
    if family == "mistral":
        return MistralConfig(**{**_COMMON, "sliding_window": None, **changes})
    if family == "gemma2":
        softcaps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16}
        return Gemma2Config(**{**_GEMMA, **softcaps, "attn_implementation": "eager", **changes})
    if family == "gemma3_text":
        return Gemma3TextConfig(**{**_GEMMA, "query_pre_attn_scalar": 16, **changes})
    raise ValueError(family)


_CLASSES: dict[str, Any] = {
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "mistral": MistralForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gemma3_text": Gemma3ForCausalLM,
}


def tiny(family: str, seed: int = 0, dtype: torch.dtype | None = None, **changes: Any) -> Any:
    """A tiny model of `family` with random weights, in eval mode; `changes` go to its config.

    In float64, so that what is not rounding shows; Gemma 2 in float32, because transformers' eager attention turns a
    float64 mask into infinities, and padding into NaN.
    """
    dtype = dtype or (torch.float32 if family == "gemma2" else torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _CLASSES[family](config(family, **changes))
    _made.add(model)
    return model.to(dtype).eval()


def made() -> list[PreTrainedModel]:
    """All tiny models that are still alive."""
    return list(_made)


def prompt(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """[rows, length] random tokens, none of them padding."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def given(cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `cache` to a model or to generate, by the name this transformers uses."""
    return {CACHE_NAME: cache}
