"""Steps that hold chunks of prompts, in a few fixed shapes, so that CUDA graphs can hold them: which shapes there are,
and how what the host knows of such a step lies in one piece of memory.

Without a graph each layer is some 25 launches, which take the host longer than they take the device until a step has
thousands of tokens; every row that decodes meanwhile waits for that. Beyond the largest shape a step runs as it is.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpleat.engine import windows
from kvpleat.engine.attach import Attached
from kvpleat.engine.attention import Prompts
from kvpleat.engine.observed import Observed
from kvpleat.engine.rows import Plan
from kvpleat.engine.sizes import ladder
from kvpleat.engine.transfer import in_order, pinned, sent
from kvpleat.kernels import extend
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.kernels.extend import Chunks
from kvpleat.kernels.prefill import Recent, Rows
from kvpleat.kernels.reference import turn
from kvpleat.types import Rotary

TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # of prompts
LEAST_WIDTH, APART = 16, 4  # seats: fewer cost no less; and so many times as wide is the next width
CHUNKS = 32
YOUNG = 4  # of them that go on, and have young keys before their first token


class Delays(NamedTuple):
    """Tokens for which keys are young: in layers that follow the policy, and in those with a sliding window."""

    policy: int
    window: int


class Shape(NamedTuple):
    """width: seats whose tokens come first. tokens: of chunks. chunks: how many. keys: of chunks, with young ones;
    in_windows: the same in layers with a sliding window of the model's own."""

    width: int
    tokens: int
    chunks: int
    keys: int
    in_windows: int

    @property
    def parts(self) -> list[int]:
        """Sizes of what `packed` puts one after the other, each at a multiple of 16 bytes."""
        bounds = self.chunks + 1
        return [self.tokens, self.tokens, self.width, self.chunks, self.chunks, bounds, bounds, bounds, self.keys,
                self.tokens]  # fmt: skip

    @property
    def words(self) -> int:
        """Of 4 bytes in which all that lies."""
        return sum(map(_aligned, self.parts))


class Words(NamedTuple):
    """What lies in the memory, int32: ids, positions [T] of the chunks' tokens; last [n] where each seat's last token
    is in the batch; seats, starts [C], new, keys [C + 1] as in `extend.Chunks`, in_windows [C + 1] keys of layers with
    a sliding window; of_keys [M] positions of keys; reach [T] first position that each token sees, where the policy's
    window cuts it."""

    ids: Tensor
    positions: Tensor
    last: Tensor
    seats: Tensor
    starts: Tensor
    new: Tensor
    keys: Tensor
    in_windows: Tensor
    of_keys: Tensor
    reach: Tensor

    def chunks(self, shape: Shape, rotary: Rotary | None) -> tuple[Chunks, Chunks]:
        """As `extend.plan` makes them, and for layers with a sliding window; rotary: None where nothing merges."""
        angles = None if rotary is None else turn(self.of_keys, rotary, torch.float32)
        seats, starts, new = self.seats, self.starts, self.new
        in_windows = Chunks(seats, starts, Rows(new, self.in_windows), shape.in_windows, None)
        return Chunks(seats, starts, Rows(new, self.keys), shape.keys, angles), in_windows


def shapes(seats: int, step_tokens: int, delays: Delays) -> list[Shape]:
    """All there are, from narrow to wide and from few tokens to many.

    Args:
        seats: rows that run at a time. step_tokens: of a step. delays: see there.
    """
    widths: list[int] = []
    for width in ladder(seats):
        if width == seats or width >= max(LEAST_WIDTH, APART * widths[-1] if widths else 0):
            widths.append(width)
    most = bisect_left(TOKENS, step_tokens)  # as many as cover a step, or all
    return [Shape(n, t, CHUNKS, *(t + YOUNG * delay for delay in delays)) for n in widths for t in TOKENS[: most + 1]]


def fitting(known: Sequence[Shape], plan: Plan, delays: Delays) -> Shape | None:
    """The first shape that holds a step; None: there is none."""
    tokens, chunks = sum(feed.size for feed in plan.chunks), len(plan.chunks)
    keys = (tokens + sum(min(feed.start, delay) for feed in plan.chunks) for delay in delays)
    needed = plan.width, tokens, chunks, *keys
    return next((x for x in known if all(has >= need for has, need in zip(x, needed, strict=True))), None)


def packed(plan: Plan, shape: Shape, delays: Delays, reach: Tensor | None) -> Tensor:
    """What a step feeds, as `unpacked` reads it; chunks that there are not have no tokens.

    Args:
        reach: [T] of the tokens of chunks, or None.
    """
    feeds, memory = plan.chunks, torch.zeros(shape.words, dtype=torch.int32)
    arrays = (x.numpy() for x in unpacked(memory, shape))
    ids, positions, last, seats, starts, new, keys, in_windows, of_keys, reached = arrays
    lie = [x.start for x in feeds], [x.size for x in feeds]
    where, where_in_windows = (extend.lie(*lie, delay) for delay in delays)
    last[plan.tokens.seats] = plan.tokens.seats
    for i, feed in enumerate(feeds):
        at, stop = slice(where.new[i], where.new[i + 1]), feed.start + feed.size
        ids[at] = feed.row.tokens[feed.start : stop]
        positions[at] = np.arange(feed.start, stop)
        of_keys[where.keys[i] : where.keys[i + 1]] = np.arange(where.firsts[i], stop)
        seats[i], starts[i], last[feed.seat] = feed.seat, feed.start, shape.width + at.stop - 1
    for whole, known in ((new, where.new), (keys, where.keys), (in_windows, where_in_windows.keys)):
        whole[: len(known)], whole[len(known) :] = known, known[-1]
    if reach is not None:
        reached[: reach.shape[0]] = reach.numpy()
    return memory


def unpacked(memory: Tensor, shape: Shape) -> Words:
    """Views of memory [words] int32 that `packed` is copied to, or more of it."""
    rooms = memory[: shape.words].split([_aligned(size) for size in shape.parts])
    return Words(*(room[:size] for room, size in zip(rooms, shape.parts, strict=True)))


def _aligned(words: int) -> int:
    return -(-words // 4) * 4


class Fed(NamedTuple):
    """What a forward over chunks reads, on the device: ids, positions [T] and `last` [n] as in `transfer.in_order`, and
    the chunks, also as layers with a sliding window see them."""

    ids: Tensor
    positions: Tensor
    last: Tensor
    prompts: Prompts
    in_windows: Prompts | None


class Padded:
    """Steps with chunks of prompts of one engine, in shapes.

    Args:
        attached: the model. pool: of all rows; in_windows: the same for layers with a sliding window, or None.
        seats: rows that run at a time. step_tokens: of a step.

    Attributes:
        shapes: all there are.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(
        self, attached: Attached, pool: DevicePool, in_windows: DevicePool | None, seats: int, step_tokens: int
    ) -> None:
        self._policy, self._facts, self._pools = attached.policy, attached.facts, (pool, in_windows)
        self._delays = Delays(*(0 if x is None or x.delay is None else x.delay.tokens for x in self._pools))
        self._turned = self._facts.rotary if pool.delay is not None and pool.delay.merges else None
        self._cut = windows.cuts(self._policy, self._facts.shape)
        self.shapes = shapes(seats, step_tokens, self._delays)
        words, device = max(shape.words for shape in self.shapes), pool.key.device
        self._memory = torch.zeros(words, dtype=torch.int32, device=device)

    def write(self, plan: Plan) -> Shape | None:
        """Send a step to the device, in the first shape that holds it; None: there is none, and nothing is sent."""
        shape = fitting(self.shapes, plan, self._delays)
        if shape is not None:
            reach = windows.reach(self._policy, self._facts.shape, plan.chunks)
            told = packed(plan, shape, self._delays, reach)
            self._memory[: shape.words].copy_(pinned(told, self._memory.device), non_blocking=True)
        return shape

    def read(self, shape: Shape) -> Fed:
        """What was sent; nothing here is read from the host."""
        words, (pool, in_windows) = unpacked(self._memory, shape), self._pools
        chunks, sliding = words.chunks(shape, self._turned)
        recent = Recent(words.reach, chunks.starts, self._policy.num_sinks) if self._cut else None
        beside = None if in_windows is None else Prompts(in_windows, sliding, None)
        return Fed(words.ids, words.positions, words.last.long(), Prompts(pool, chunks, recent), beside)


def columns(pool: DevicePool, plan: Plan) -> int:
    """Pages of the longest stream that there can be; on a GPU nobody reads more than lengths say."""
    if pool.key.device.type == "cuda":
        return pool.page_table.shape[-1]
    last = max(plan.tokens.starts.max(initial=-1) + 1, *(feed.start + feed.size for feed in plan.chunks), 0)
    return -(-int(last) // pool.shape.page_size)


def unpadded(
    attached: Attached, pool: DevicePool, in_windows: DevicePool | None, observed: Observed | None, plan: Plan, n: int
) -> Fed:
    """A step as it is, of n seats. pool, in_windows: as for `Padded`. observed: what is remembered of it."""
    policy, facts, device = attached.policy, attached.facts, pool.key.device
    lie = [x.seat for x in plan.chunks], [x.start for x in plan.chunks], [x.size for x in plan.chunks]
    chunks = extend.plan(pool, *lie, facts.rotary)
    ids, positions, last = (sent(x, device) for x in in_order(plan, n))
    reach = windows.reach(policy, facts.shape, plan.chunks)
    recent = None if reach is None else Recent(sent(reach, device), chunks.starts, policy.num_sinks)
    watched = None if observed is None else observed.watch(plan.chunks, pool.failed, partial(sent, device=device))
    beside = None if in_windows is None else Prompts(in_windows, extend.plan(in_windows, *lie), None)
    return Fed(ids, positions, last, Prompts(pool, chunks, recent, watched), beside)
