"""Queries that policies want to look back at, on the device: the last ones of each seat and layer, and a sample of
those of prompts. The same ones as `cache.observed` has.

A step that failed for want of pages, and the one launched after it, are taken back: they change nothing of the last
queries, and what they sampled is dropped when the same tokens come again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.cache.observed import MAX_SAMPLES, sample_stride
from kvpleat.engine.moments import Calendar
from kvpleat.engine.rows import Feed, Row
from kvpleat.types import KVShape


class Piece(NamedTuple):
    """Sampled queries of a prompt, `stride` tokens apart, the first at position `first`: [Q, m, D] of each layer."""

    first: int
    stride: int
    queries: list[Tensor]

    def thinned(self, since: int, stride: int) -> "Piece":
        """Those whose distance from `since` is a multiple of `stride`. A step that was taken back may have left fewer:
        by the moment that it was on the way to they will be too many."""
        if stride <= self.stride:
            return self
        skipped = (since - self.first) % stride
        queries = [x[:, skipped // self.stride :: stride // self.stride].clone() for x in self.queries]
        return Piece(self.first + skipped, stride, queries)


class Pick(NamedTuple):
    """Which of a step's tokens [begin, stop) are sampled, and where their queries go."""

    begin: int
    stop: int
    stride: int
    into: list[Tensor]


class Watched(NamedTuple):
    """What is remembered of a step with chunks.

    last: [R, L, Q, W, D] of all seats. tokens: [m] int64 those of the step that are among the last of their rows;
    seats, slots: [m] where they go. failed: [1] of the pool. picks: what is sampled.
    """

    last: Tensor
    tokens: Tensor
    seats: Tensor
    slots: Tensor
    failed: Tensor
    picks: list[Pick]

    def see(self, layer: int, q: Tensor) -> None:
        """Remember queries [Q, T, D] of a layer."""
        held, new = self.last[:, layer], q.index_select(1, self.tokens).transpose(0, 1)
        old = held[self.seats, :, self.slots]
        held[self.seats, :, self.slots] = torch.where(self.failed == 0, new, old)
        for pick in self.picks:
            pick.into.append(q[:, pick.begin : pick.stop : pick.stride].clone())


class Observed:
    """Remembered queries of all seats.

    Args:
        shape: of the model. num_rows: seats (R). window: last queries to remember (W). calendar: of the policy.
        device: where they live.

    Attributes:
        last: [R, L, Q, W, D]; slot of a query: position % W.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(self, shape: KVShape, num_rows: int, window: int, calendar: Calendar, device: torch.device) -> None:
        self._window, self._calendar = window, calendar
        size = num_rows, shape.num_layers, shape.num_q_heads, window, shape.head_dim
        self.last = torch.zeros(size, dtype=shape.dtype, device=device)
        self._samples: dict[Row, list[Piece]] = {}

    def watch(self, chunks: list[Feed], failed: Tensor, sent: Callable[[Tensor], Tensor]) -> Watched:
        """What is to be remembered of chunks that lie one after the other, one at least.

        Args:
            failed: [1] of the pool. sent: brings a tensor to the device.
        """
        told: list[tuple[int, int, int]] = []
        picks, at = [], 0
        for feed in chunks:
            stop = feed.start + feed.size
            for position in range(max(feed.start, stop - self._window), stop):
                told.append((at + position - feed.start, feed.seat, position % self._window))
            if feed.start < feed.row.prompt_size:
                picks.append(self._pick(feed, at))
            at += feed.size
        tokens, seats, slots = sent(torch.tensor(told).T.contiguous())
        return Watched(self.last, tokens, seats, slots, failed, picks)

    def _pick(self, feed: Feed, at: int) -> Pick:
        since = self._calendar.last(feed.row.prompt_size, feed.start)
        stride = sample_stride(feed.start + feed.size - since)
        skipped = (since - feed.start) % stride
        earlier = [
            piece.thinned(since, stride) if piece.first >= since else piece
            for piece in self._samples.get(feed.row, [])
            if piece.first < feed.start  # else it is of a step that was taken back
        ]
        new = Piece(feed.start + skipped, stride, [])
        self._samples[feed.row] = [*earlier, new]
        return Pick(at + skipped, at + feed.size, stride, new.queries)

    def recent(self, layers: range, seat: int, position: int) -> tuple[Tensor, Tensor]:
        """The last min(W, position) queries before `position`: ([Q, w, D], [w] positions), Q of all these layers."""
        positions = torch.arange(max(0, position - self._window), position, device=self.last.device)
        return self.last[seat, layers.start : layers.stop].flatten(0, 1)[:, positions % self._window], positions

    def sampled(self, layer: int, row: Row, since: int, position: int) -> tuple[Tensor, Tensor] | None:
        """Of tokens [since, position) of a prompt ([Q, M, D], [M] positions); None: none were sampled."""
        stride = sample_stride(position - since)
        pieces = [x.thinned(since, stride) for x in self._samples.get(row, []) if since <= x.first < position]
        if not pieces:
            return None
        queries = torch.cat([piece.queries[layer] for piece in pieces], dim=1)
        return queries, since + stride * torch.arange(queries.shape[1], device=queries.device)

    def settle(self, feeds: list[Feed]) -> None:
        """A step went well: samples that were for its moments are needed no more."""
        for feed in feeds:
            moment = self._calendar.last(feed.row.prompt_size, feed.start + feed.size)
            left = [piece for piece in self._samples.pop(feed.row, []) if piece.first >= moment]
            if left:
                self._samples[feed.row] = left

    def forget(self, row: Row) -> None:
        """A row left its seat."""
        self._samples.pop(row, None)

    def forget_all(self) -> None:
        """All rows left theirs."""
        self._samples.clear()


def sample_bytes(shape: KVShape, seats: int, step_tokens: int, length: int) -> int:
    """Bytes that samples take at most. Those of two steps are there at a time, of all their tokens perhaps, and one
    prompt more for each of them is in the middle (the scheduler lets nobody in beside it).

    Args:
        seats: rows that run at a time. step_tokens: of a step. length: of a row, in tokens.
    """
    tokens = 2 * min(step_tokens + MAX_SAMPLES, seats * min(length, MAX_SAMPLES))
    return accounting.query_bytes(shape, tokens)


def remember(last: Tensor, layer: int, positions: Tensor, goes_well: Tensor, q: Tensor) -> None:
    """Remember one query of each of n seats: a CUDA graph can hold it.

    Args:
        last: [n, L, Q, W, D]. positions: [n] int32. goes_well: [n] bool, seats that have a token in a step that has not
            failed. q: [n, Q, D].
    """
    held = last[:, layer]
    slot = (positions.long() % held.shape[2])[:, None, None, None].expand(-1, *held.shape[1:2], 1, held.shape[3])
    held.scatter_(2, slot, torch.where(goes_well[:, None, None, None], q[:, :, None], held.gather(2, slot)))
