"""Between host and device: what goes to a step, and what comes back."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpleat.engine.rows import Plan
from kvpleat.engine.sampling import Sampled

POSITIONS, ACTIVE, NUMBERS, DRAWS, RELEASED = range(5)  # lines of what the host writes


class Launched(NamedTuple):
    """A step that runs or has run. counted: [2 + 3 n] int64 free and missing pages, pages of each seat, those of its
    longest stream, its token; sampled: with logprobs, where somebody asked. forked: [2, F] what `fork` told. All on the
    host, written once `done` has come."""

    plan: Plan
    counted: Tensor
    sampled: Sampled | None
    forked: Tensor | None
    done: Any


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


def in_order(plan: Plan, n: int) -> tuple[Tensor, Tensor, Tensor]:
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


def sent(x: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for it."""
    return pinned(x, device).to(device, non_blocking=True)


def event(device: torch.device) -> Any:
    """What comes once all is done that a device was asked for until now; None: it is done."""
    if device.type != "cuda":
        return None
    found = torch.cuda.Event()
    found.record()
    return found


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, without waiting for it."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return host.copy_(x, non_blocking=True)
