"""Policies whose gates decide token by token: however a text is fed, the logits are those of the definition, worked out in
plain loops (tests/reference.py); and the memory is really gone.

Gates are random, with weights so large that about half of all tokens are marked.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat import PleatedCache, compress, explain
from kvpleat.errors import CacheFileError, OptionError
from kvpleat.policies import DMC, DMS, Fold, Full, GateConfig, Gates
from kvpleat.policies.learned import Learned
from tests import models, reference

LENGTH, ROUNDING = 75, 1e-5
KINDS: dict[str, tuple[type[Learned], int, int | None]] = {
    "dms": (DMS, 5, None),
    "fold": (Fold, 3, None),
    "dmc": (DMC, 0, None),
    "dmc of 3": (DMC, 0, 3),
    "fold of 4": (Fold, 1, 4),
}
PIECES = {
    "whole": [LENGTH],
    "pieces": [1, 7, 2, 30, 3, 11],
    "one by one": [1],
    "prompt, then decode": [41, 1],
    "turns": [20, 1, 1, 1, 13, *[1] * 9, 2, 1, 8],
}


def gates_for(model: Any, kind: str, seed: int = 0, weight: float = 2.5, bias: float = 0.0) -> Gates:
    """Random gates for a model."""
    policy, delay, look_back = KINDS[kind]
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = sum(window is None for window in reference.layer_windows(model))
    gates = Gates(GateConfig(policy.name, layers, heads, config.hidden_size, delay, look_back, scale=2.0))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * weight / 2 / config.hidden_size**0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2 + bias)
    return gates.requires_grad_(False)


def policy_for(model: Any, kind: str, bits: int | None = None, **options: Any) -> Learned:
    return KINDS[kind][0](gates=gates_for(model, kind, **options), bits=bits)


@functools.cache
def expected(family: str, kind: str, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Logits of `models.prompt(length, seed)` by the definition."""
    model = models.tiny(family)
    return by_definition(model, models.prompt(length, seed)[0], kind)


def by_definition(model: Any, tokens: Tensor, kind: str) -> Tensor:
    gates, (policy, delay, look_back) = gates_for(model, kind), KINDS[kind]
    weights, biases = [layer.weight for layer in gates.outer], [layer.bias for layer in gates.outer]
    learned = reference.Learned(policy.name, weights, biases, gates.config.scale, delay, look_back)
    return reference.learned_forward(model, tokens, learned)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)


def feed(model: Any, tokens: Tensor, cache: PleatedCache, pieces: list[int]) -> Tensor:
    """Logits [T, vocabulary] of tokens [T], fed in pieces of the given sizes, the last one repeated; every page and ring
    is checked after each."""
    logits, start, sizes = [], 0, list(pieces)
    while start < tokens.shape[0]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        with torch.no_grad():
            logits.append(model(tokens[None, start : start + size], **models.given(cache)).logits[0])
        start += size
        assert cache.kv is not None
        cache.kv.check_integrity()
    return torch.cat(logits)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
class TestOneFunction:
    """The tokens decide the output."""

    @pytest.mark.parametrize("pieces", PIECES)
    def test_however_it_is_fed(self, family: str, kind: str, pieces: str) -> None:
        """Logits at every position are those of the definition."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        with compress(model, policy_for(model, kind)) as pleated:
            found = feed(model, tokens, pleated.new_cache(), PIECES[pieces])
        close(found, expected(family, kind))
