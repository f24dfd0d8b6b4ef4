"""Rows of a batch that are found in the pool by seats, for `bench.kernels`: checked, and timed beside those without."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpleat.bench.kernel_streams import CONTEXT, Model, Pool, uneven
from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed, difference
from kvpleat.bench.kernels_decode import ALLOWED, room
from kvpleat.bench.kernels_update import ALLOWED as UPDATED
from kvpleat.bench.kernels_update import CHECKED, Both
from kvpleat.bench.kernels_update_times import DMC, DMS, FOLD, HEADS, STREAMS, Steady
from kvpleat.kernels import decode, update_triton
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.types import Delay

NOBODY = -1  # the seat of a row that pads a batch


class Seated(Both):
    """The steps of `Both`, in a batch of its own order in every step, with rows that pad it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.order = torch.zeros(self.sizes[0] + 5, dtype=torch.int32, device=self.device)

    def step(self) -> None:
        """Another order: it is drawn before the graph that reads it is replayed."""
        rows = self.sizes[0]
        places = torch.randperm(rows + 5, generator=self.random)
        self.order.copy_(torch.where(places < rows, places, NOBODY))
        super().step()

    def _step(self, kernels: Any, pool: DevicePool, positions: Tensor, active: Tensor, given: list[Tensor]) -> None:
        super()._step(InOrder(kernels, self.order.to(positions.device)), pool, positions, active, given)


class InOrder:
    """Kernels that get what is given by rows of the pool as rows of a batch, and the specification as well."""

    def __init__(self, kernels: Any, seats: Tensor) -> None:
        self.kernels, self.seats = kernels, seats
        self.at = seats.clamp(min=0).long()

    def reserve_token(self, pool: DevicePool, positions: Tensor, active: Tensor) -> None:
        """As `update.reserve_token`."""
        self.kernels.reserve_token(pool, positions[self.at], self._on(active), self.seats)

    def step(self, pool: DevicePool, layer: int, positions: Tensor, active: Tensor, *rest: Any) -> None:
        """As `update.step`."""
        keys, values, said, turn = rest
        said = said[:, self.at] if isinstance(said, Tensor) else said.each(lambda x: x[self.at])
        turn = None if turn is None else type(turn)(*(x[self.at] for x in turn))
        given = positions[self.at], self._on(active), keys[self.at], values[self.at]
        self.kernels.step(pool, layer, *given, said, turn, self.seats)

    def _on(self, active: Tensor) -> Tensor:
        return active[self.at] & (self.seats != NOBODY)


def check(here: Machine) -> Iterator[Checked]:
    """Steps, in a graph on a GPU, and attention."""
    large = here.large
    for case in CHECKED[1:2] if here.quick else CHECKED[:3]:
        small = case
        if not large:
            delay = Delay(min(case.delay.tokens, 2), *list(vars(case.delay).values())[1:])
            small = case._replace(channels=8, pairs=4, delay=delay)
        both = Seated(small, *((13, 3, 5) if large else (2, 1, 2)), small.delay.tokens + 40, here.device)
        for _ in range(small.delay.tokens + (40 if large else 4)):
            both.step()
        yield Checked(f"steps of {case.name} in any order", both.error(), UPDATED[case.dtype])
    yield _attention(here)


def _attention(here: Machine) -> Checked:
    """A graph of plan and attention, replayed with other seats than it was captured with."""
    large = here.large
    dtype = torch.bfloat16 if large else torch.float32
    model = Model(9, 3, 4, 128 if large else 16, 16, dtype)
    pool = Pool(model, uneven(9, 2, 3, 500 if large else 40, here.device), poison=True)
    count = 12  # more than the pool has
    q = torch.randn(count, *pool.q.shape[1:], device=here.device).to(dtype)
    seats = torch.zeros(count, dtype=torch.int32, device=here.device)
    active = torch.zeros(count, dtype=torch.bool, device=here.device)
    work = decode.room(pool.lengths, model.channels, model.dtype, model.page_size, rows=count)

    def attend() -> list[Tensor]:
        decode.plan_on_gpu(work, pool.lengths, active, 0, seats)
        return [
            decode.on_gpu(q, *_layer(pool, i), work.layer(i), pool.scale, active=active, seats=seats) for i in range(2)
        ]

    out, errors = attend(), []
    graph = torch.cuda.CUDAGraph() if large else None
    if graph is not None:
        with torch.cuda.graph(graph):
            out = attend()
    for _ in range(3):
        places = torch.randperm(count)
        seats.copy_(torch.where(places < 9, places, NOBODY))
        active.copy_((places < 9) & (torch.rand(count) < 0.8))
        if graph is None:
            out = attend()
        else:
            graph.replay()
        at = seats.clamp(min=0).long()
        for i, found in enumerate(out):
            keys, values, table, lengths = (x.float() if x.is_floating_point() else x for x in _layer(pool, i))
            wanted = decode.by_definition(q.float(), keys, values, table[at], lengths[at], pool.scale, active=active)
            errors.append(difference(found, wanted))
    return Checked(
        "attention in any order, one graph", max(math.inf if math.isnan(x) else x for x in errors), ALLOWED[dtype]
    )


def _layer(pool: Pool, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pool.keys, pool.values, pool.table[:, layer], pool.lengths[:, layer]


def time(here: Machine) -> Iterator[Timed]:
    """Attention, its plan, a step and its pages; beside: the same calls without seats, in the pool's own order."""
    for rows, mean in ((32, CONTEXT / 8), (256, 512)):
        model = Model(rows, 8, 4, 128)
        if not here.wants(name := f"attention, {rows} rows, mean {mean:.0f}"):
            continue
        pool = Pool(model, uneven(rows, 4, 8, mean, here.device))
        work, seats = room(pool), torch.randperm(rows, device=here.device).int()
        active = torch.ones(rows, dtype=torch.bool, device=here.device)
        plans = [partial(decode.plan, work, pool.lengths, active, 1, x) for x in (None, seats)]
        took = []
        for by, plan in zip((None, seats), plans, strict=True):
            plan()
            calls: list[Call] = [
                partial(decode.on_gpu, pool.q, *_layer(pool, i), work.layer(i), pool.scale, active=active, seats=by)
                for i in range(4)
            ]
            took.append(here.seconds(calls))
        yield Timed(name, took[1], pool.read, {"without": f"{took[0] * 1e6:.1f} us"})
        without, planned = (here.seconds([plan]) for plan in plans)
        yield Timed(f"plan of 4 layers, {rows} rows", planned, None, {"without": f"{without * 1e6:.1f} us"})
        del pool, work
    for kind, delay in {"dms": DMS, "fold": FOLD, "dmc": DMC}.items():
        if here.wants(name := f"{kind} step, 256 rows x {HEADS}"):
            yield from _timed_steps(here, name, Steady(delay, 256, STREAMS // 256 // HEADS, here.device))


def _timed_steps(here: Machine, name: str, steady: Steady, rows: int = 256) -> Iterator[Timed]:
    pool, tokens = steady.pool, (steady.positions, steady.active)
    seats = torch.randperm(rows, device=here.device).int()
    took, pages = [], []
    for by in (None, seats):
        calls: list[Call] = [
            partial(update_triton.step, pool, i, *tokens, *new, steady.turn, by)
            for i, new in enumerate(zip(steady.keys, steady.values, steady.logits, strict=True))
        ]
        took.append(here.seconds(calls))
        pages.append(here.seconds([partial(update_triton.reserve_token, pool, *tokens, by)]))
    yield Timed(name, took[1], steady.touched, {"without": f"{took[0] * 1e6:.2f} us"})
    yield Timed(f"{name}: pages of all layers", pages[1], None, {"without": f"{pages[0] * 1e6:.1f} us"})


CASES = Cases("seats", check, time)
