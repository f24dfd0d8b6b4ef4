"""Steps that hold chunks of prompts, in a few fixed shapes, so that CUDA graphs can hold them: which shapes there are,
and how what the host knows of such a step lies in one piece of memory.

Without a graph each layer is some 25 launches, which take the host longer than they take the device until a step has
thousands of tokens; every row that decodes meanwhile waits for that. Beyond the largest shape a step runs as it is.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpleat.engine.rows import Plan
from kvpleat.engine.sizes import ladder
from kvpleat.kernels import extend
from kvpleat.kernels.extend import Chunks
from kvpleat.kernels.prefill import Rows
from kvpleat.kernels.reference import turn
from kvpleat.types import Rotary

TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # of prompts
LEAST_WIDTH, APART = 16, 4  # seats: fewer cost no less; and so many times as wide is the next width
CHUNKS = 32
YOUNG = 4  # of them that go on, and have young keys before their first token


class Shape(NamedTuple):
    """width: seats whose tokens come first. tokens: of chunks. chunks: how many. keys: of chunks, with young ones."""

    width: int
    tokens: int
    chunks: int
    keys: int

    @property
    def parts(self) -> list[int]:
        """Sizes of what `packed` puts one after the other, each at a multiple of 16 bytes."""
        bounds = self.chunks + 1
        return [self.tokens, self.tokens, self.width, self.chunks, self.chunks, bounds, bounds, self.keys, self.tokens]

    @property
    def words(self) -> int:
        """Of 4 bytes in which all that lies."""
        return sum(map(_aligned, self.parts))


class Fed(NamedTuple):
    """What lies in the memory, int32: ids, positions [T] of the chunks' tokens; last [n] where each seat's last token
    is in the batch; seats, starts [C], new, keys [C + 1] as in `extend.Chunks`; of_keys [M] positions of keys; reach
    [T] first position that each token sees, where a window cuts it."""

    ids: Tensor
    positions: Tensor
    last: Tensor
    seats: Tensor
    starts: Tensor
    new: Tensor
    keys: Tensor
    of_keys: Tensor
    reach: Tensor

    def chunks(self, rotary: Rotary | None) -> Chunks:
        """As `extend.plan` makes them; rotary: None where nothing merges."""
        angles = None if rotary is None else turn(self.of_keys, rotary, torch.float32)
        return Chunks(self.seats, self.starts, Rows(self.new, self.keys), self.of_keys.shape[0], angles)


def shapes(seats: int, step_tokens: int, delay: int) -> list[Shape]:
    """All there are, from narrow to wide and from few tokens to many.

    Args:
        seats: rows that run at a time. step_tokens: of a step. delay: tokens for which keys are young.
    """
    widths: list[int] = []
    for width in ladder(seats):
        if width == seats or width >= max(LEAST_WIDTH, APART * widths[-1] if widths else 0):
            widths.append(width)
    most = bisect_left(TOKENS, step_tokens)  # as many as cover a step, or all
    return [Shape(n, t, CHUNKS, t + YOUNG * delay) for n in widths for t in TOKENS[: most + 1]]


def fitting(known: Sequence[Shape], plan: Plan, delay: int) -> Shape | None:
    """The first shape that holds a step; None: there is none."""
    tokens, chunks = sum(feed.size for feed in plan.chunks), len(plan.chunks)
    keys = tokens + sum(min(feed.start, delay) for feed in plan.chunks)
    needed = plan.width, tokens, chunks, keys
    return next((x for x in known if all(has >= need for has, need in zip(x, needed, strict=True))), None)


def packed(plan: Plan, shape: Shape, delay: int, reach: Tensor | None) -> Tensor:
    """What a step feeds, as `unpacked` reads it; chunks that there are not have no tokens.

    Args:
        reach: [T] of the tokens of chunks, or None.
    """
    feeds, memory = plan.chunks, torch.zeros(shape.words, dtype=torch.int32)
    ids, positions, last, seats, starts, new, keys, of_keys, reached = (x.numpy() for x in unpacked(memory, shape))
    where = extend.lie([x.start for x in feeds], [x.size for x in feeds], delay)
    last[plan.tokens.seats] = plan.tokens.seats
    for i, feed in enumerate(feeds):
        at, stop = slice(where.new[i], where.new[i + 1]), feed.start + feed.size
        ids[at] = feed.row.tokens[feed.start : stop]
        positions[at] = np.arange(feed.start, stop)
        of_keys[where.keys[i] : where.keys[i + 1]] = np.arange(where.firsts[i], stop)
        seats[i], starts[i], last[feed.seat] = feed.seat, feed.start, shape.width + at.stop - 1
    for whole, known in ((new, where.new), (keys, where.keys)):
        whole[: len(known)], whole[len(known) :] = known, known[-1]
    if reach is not None:
        reached[: reach.shape[0]] = reach.numpy()
    return memory


def unpacked(memory: Tensor, shape: Shape) -> Fed:
    """Views of memory [words] int32 that `packed` is copied to, or more of it."""
    rooms = memory[: shape.words].split([_aligned(size) for size in shape.parts])
    return Fed(*(room[:size] for room, size in zip(rooms, shape.parts, strict=True)))


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
