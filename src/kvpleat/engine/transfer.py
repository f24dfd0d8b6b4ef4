"""Between host and device: what goes to a step, and what comes back."""

import numpy as np
import torch
from torch import Tensor

from kvpleat.engine.rows import Plan

POSITIONS, ACTIVE, NUMBERS, DRAWS, RELEASED = range(5)  # lines of what the host writes


def written(plan: Plan, seats: int) -> Tensor:
    """[5, seats] int32 numbers of a step, by seat; the last line is a list of seats."""
    found = np.zeros((5, seats), dtype=np.int32)
    if tokens := plan.tokens:
        own = np.array(tokens.seats)
        found[POSITIONS, own], found[NUMBERS, own] = tokens.starts, tokens.numbers
        found[ACTIVE, own] = found[DRAWS, own] = 1
    for feed in plan.chunks:
        found[NUMBERS, feed.seat], found[DRAWS, feed.seat] = feed.number, feed.draws
    found[RELEASED, : len(plan.released)] = [seat for seat, _ in plan.released]
    return torch.from_numpy(found)


def packed(plan: Plan, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions [T] of the chunks, one after the other, and [n] the last token of each seat in the batch: 0
    where none is drawn."""
    tokens: list[int] = []
    positions = [np.arange(feed.start, feed.start + feed.size, dtype=np.int32) for feed in plan.chunks]
    last = np.zeros(n, dtype=np.int64)
    before = n if plan.tokens else 0
    last[plan.tokens.seats] = plan.tokens.seats
    for feed in plan.chunks:
        tokens += feed.row.tokens[feed.start : feed.start + feed.size]
        last[feed.seat] = before + len(tokens) - 1
    return torch.tensor(tokens), torch.from_numpy(np.concatenate(positions)), torch.from_numpy(last)


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """The same where a device can fetch it by itself."""
    return x.pin_memory() if device.type == "cuda" else x


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, without waiting for it."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return host.copy_(x, non_blocking=True)
