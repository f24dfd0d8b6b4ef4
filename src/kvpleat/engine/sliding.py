"""Layers whose attention has a sliding window of the model's own, beside those that follow the policy.

A window of n tokens is what `kernels.update` and `kernels.extend` do where entries leave one by one, if all are marked:
each leaves n - 1 tokens after its own. So these layers share pages and page tables with the others, and have a ring of
their own; the policy does not see them.
"""

from dataclasses import replace

import torch

from kvpleat.hf.families import ModelFacts
from kvpleat.kernels.device_pool import DevicePool, new_ring, ring_bytes
from kvpleat.types import Delay, KVShape


def whole(facts: ModelFacts) -> KVShape:
    """The shape of a pool for all layers of the model, in its order; `facts.shape` is of those that the policy sees."""
    return replace(facts.shape, num_layers=len(facts.layers) + len(facts.sliding))


def mean_entries(facts: ModelFacts, entries: float, tokens: int) -> float:
    """Entries of a stream of a row of so many tokens, mean over all layers. entries: of those that the policy sees."""
    windows = sum(min(tokens, window) for window in facts.sliding.values())
    return (len(facts.layers) * entries + windows) / (len(facts.layers) + len(facts.sliding))


def view(pool: DevicePool, facts: ModelFacts, length: int) -> DevicePool | None:
    """The pool as the kernels see it in sliding-window layers; None: there are none. length: of a row, in tokens."""
    delay = _delay(facts, length)
    if delay is None:
        return None
    with torch.inference_mode(False):  # tensors made in that mode could not be written to outside it
        ring = new_ring(pool.shape, delay, pool.lengths.shape[0], pool.key.device)
    arrays = {name: pool.arrays[name] for name in ("key", "value")}
    return replace(pool, shape=replace(pool.shape, fields=()), delay=delay, arrays=arrays, ring=ring)


def fixed_bytes(facts: ModelFacts, seats: int, length: int) -> int:
    """Bytes of the ring of `view`."""
    delay = _delay(facts, length)
    return 0 if delay is None else ring_bytes(whole(facts), delay, seats)


def _delay(facts: ModelFacts, length: int) -> Delay | None:
    windows = set(facts.sliding.values())
    if not windows:
        return None
    (window,) = windows  # a config names one
    return Delay(min(window, length) - 1)
