"""A batch whose rows are found in the pool by their seats, in torch and Triton (interpreted where there is no GPU):
against the same tokens in the pool's own order."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.kernels import decode, extend, update
from kvpleat.kernels.decode import Launch, Work
from kvpleat.kernels.device_pool import DevicePool, check_integrity
from kvpleat.kernels.reference import turn
from kvpleat.types import Delay, Marks
from tests.kernels.test_decode import Problem, lengths
from tests.kernels.test_update import DELAYS, HEADS, LAYERS, check_same, everything, make_pool, make_shape, rotary_of

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
ROWS, CHANNELS, HALF = 4, 5, 2
KINDS = ["dms 5", "dms 0", "fold 1", "fold 5", "dmc", "dmc of three", "late, of two"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes programs one by one."""
    update_triton = importlib.import_module("kvpleat.kernels.update_triton")
    for name, size in {"STREAMS": 16, "MERGED": 16, "COUNTED": 4}.items():
        monkeypatch.setattr(update_triton, name, size)


@pytest.fixture(params=["torch", "triton"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(update, "_on_gpu", lambda pool: request.param == "triton")
    return request.param


class Batch:
    """A step of some of the sequences: rows of a batch in any order, with rows between them that have no token."""

    def __init__(self, random: torch.Generator, number: int, positions: Tensor, wide: torch.dtype) -> None:
        """number: of the step, which says how many rows there are."""
        some = torch.randperm(ROWS, generator=random)[: 1 + 3 * number % ROWS]
        idle = number % 6
        self.count = len(some) + idle
        order = torch.randperm(self.count, generator=random)
        seats = torch.cat([some, torch.tensor([-1, 0, ROWS - 1, -1, 7, 2])[:idle]])[order]
        self.seats, self.active = seats.to(wide), (torch.arange(self.count) < len(some))[order]
        self.positions = torch.where(self.active, positions[seats.clamp(0, ROWS - 1)], -3).int()
        new = torch.randn(4, LAYERS, self.count, HEADS, CHANNELS, generator=random)
        new[:, :, ~self.active] = torch.nan
        self.keys, self.values = new[0], new[1]
        self.logits = 3 * new[2:, ..., 0].transpose(0, 1) + 0.5

    def in_order(self) -> "Batch":
        """The same in the pool's order, with a row for each of its rows."""
        other, to = object.__new__(Batch), self.seats[self.active].long()
        for name, dim in {"positions": 0, "active": 0, "keys": 1, "values": 1, "logits": 2}.items():
            old = getattr(self, name)
            empty = torch.zeros(*old.shape[:dim], ROWS, *old.shape[dim + 1 :], dtype=old.dtype)
            setattr(other, name, empty.index_copy(dim, to, old[(slice(None),) * dim + (self.active,)]))
        return other

    def step(self, pool: DevicePool, seats: Tensor | None) -> None:
        delay = pool.delay
        update.reserve_token(pool, self.positions, self.active, seats)
        for layer in range(LAYERS):
            new = pool, layer, self.positions, self.active, self.keys[layer], self.values[layer]
            if delay is None:
                update.append(*new, seats)
                continue
            by = turn(self.positions - delay.tokens, rotary_of(HALF), torch.float32) if delay.merges else None
            update.step(*new, self.said(layer, delay), by, seats)

    def said(self, layer: int, delay: Delay) -> Marks | Tensor:
        logits = self.logits[layer]
        if layer:
            return logits.contiguous()
        marks = update.read_logits(logits.double(), delay)  # in float32 torch rounds by the place in a vector
        return marks.each(lambda x: x if x.dtype == torch.bool else x.float())


def contents(pool: DevicePool) -> dict[str, Tensor]:
    """All that a pool holds, entries in the order of their streams: where their pages lie is left out."""
    size, found = pool.shape.page_size, everything(pool)
    index = torch.arange(pool.page_table.shape[-1] * size)
    slots = pool.page_table.long().repeat_interleave(size, -1) * size + index % size
    slots = slots[index < pool.lengths[..., None]]
    entries = {name: found.pop(name).flatten(0, 1)[slots] for name in pool.arrays}
    return {name: x for name, x in found.items() if name not in ("page_table", "holders")} | entries


def check_close(found: dict[str, Tensor], wanted: dict[str, Tensor], exact: bool) -> None:
    """exact: bit for bit. Else numbers may be rounded otherwise, which torch does at other places of a vector."""
    for name, tensor in wanted.items():
        close = {} if tensor.is_floating_point() and not exact else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], tensor, equal_nan=True, msg=lambda x, n=name: f"{n}: {x}", **close)


def pool_of(name: str, pages: int = 300) -> DevicePool:
    delay = DELAYS.get(name)
    return make_pool(make_shape(delay, CHANNELS, 16), delay, pages, entries=64, rows=ROWS)


@pytest.mark.parametrize("name", [*KINDS, "moments"])
def test_steps_in_any_order(kind: str, name: str) -> None:
    """Other rows in every step, fewer and more than the pool has: bit for bit what each holds in the pool's order."""
    random = torch.Generator().manual_seed(len(name))
    mine, ordered = pool_of(name), pool_of(name)
    positions = torch.zeros(ROWS, dtype=torch.long)
    for number in range(30 if kind == "torch" else 8):
        batch = Batch(random, number, positions, (torch.int32, torch.int64)[number % 2])
        batch.step(mine, batch.seats)
        batch.in_order().step(ordered, None)
        positions[batch.seats[batch.active].long()] += 1
        exact = kind == "triton" or mine.delay is None or not mine.delay.merges
        check_close(contents(mine), contents(ordered), exact)
        check_integrity(mine)
    assert int(mine.failed) == 0
    assert int(mine.lengths.max()) > 2


@pytest.mark.parametrize("name", ["dms 5", "fold 1", "dmc", "moments"])
def test_triton_gives_the_pages_that_torch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the batch's order, and to nobody who has no token."""
    pools, positions = [pool_of(name), pool_of(name)], torch.zeros(ROWS, dtype=torch.long)
    random = torch.Generator().manual_seed(1)
    for number in range(8):
        batch = Batch(random, number, positions, torch.int32)
        for pool in pools:
            monkeypatch.setattr(update, "_on_gpu", lambda its: its is pools[0])
            batch.step(pool, batch.seats)
        positions[batch.seats[batch.active].long()] += 1
        check_close(*(everything(pool) for pool in pools), exact=False)


@pytest.mark.parametrize("name", [*KINDS, "moments"])
def test_seats_in_order_change_nothing(kind: str, name: str) -> None:
    random = torch.Generator().manual_seed(2)
    pools, positions = [pool_of(name), pool_of(name)], torch.zeros(ROWS, dtype=torch.long)
    for number in range(5):
        batch = Batch(random, number, positions, torch.int32).in_order()
        batch.step(pools[0], None)
        batch.step(pools[1], torch.arange(ROWS, dtype=torch.int32))
        positions += batch.active
        check_same(everything(pools[1]), everything(pools[0]))


def test_a_pool_that_is_too_small(kind: str) -> None:
    """All pages of a step or none, whatever the order, and nothing is lost."""
    pool = pool_of("dms 5", pages=LAYERS * HEADS * 2 - 1)
    before = everything(pool)
    new = torch.ones(3, HEADS, 5)
    positions, seats = torch.zeros(3, dtype=torch.int32), torch.tensor([3, -1, 1], dtype=torch.int32)
    for active, lacks in (([True, False, True], 1), ([True, False, False], 0)):
        pool.failed.zero_()
        update.reserve_token(pool, positions, torch.tensor(active), seats)
        assert int(pool.failed) == lacks
        for layer in range(LAYERS):
            said = Marks(torch.zeros(3, HEADS, dtype=torch.bool))
            update.step(pool, layer, positions, torch.tensor(active), new, new, said, None, seats)
        if lacks:
            check_same(everything(pool), before)
    assert pool.lengths.flatten(1).sum(1).tolist() == [0, 0, 0, LAYERS * HEADS]
    check_integrity(pool)


# ---- attention


def seated(problem: Problem, seats: list[int], active: list[bool] | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Queries of a batch, which of its rows have a token, and their seats."""
    device = problem.q.device
    q = torch.randn(len(seats), *problem.q.shape[1:], generator=torch.Generator().manual_seed(9)).to(problem.q)
    return q, None if active is None else torch.tensor(active, device=device), torch.tensor(seats, device=device)


def planned(problem: Problem, q: Tensor, active: Tensor | None, seats: Tensor, programs: int) -> Work:
    held = problem.lengths, q.shape[2], q.dtype, problem.keys.shape[1]
    work = decode.room(*held, Launch(32, 4, 2, 1), programs, rows=len(seats))
    decode.plan_on_gpu(work, problem.lengths, active, 0, seats)
    return work


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("seats", "active"),
    [
        ([3, 0], [True, True]),
        ([2, -1, 0, 99, 3, -1, 1], [True, False, True, False, True, False, True]),
        ([1, 3, 1], [False, True, True]),
        ([3, 1, 2], None),
    ],
    ids=str,
)
def test_attention(seats: list[int], active: list[bool] | None, wide: torch.dtype) -> None:
    """Rows of the batch read the streams of their seats, as if the tables had been gathered; mass as well."""
    drawn = lengths(11, 4, 2, 3, 200)
    problem = Problem(drawn, 3, 20, 16, 11, weighs=True)
    q, on, at = seated(problem, seats, active)
    work = planned(problem, q, on, at.to(wide), 5)
    taken = at.clamp(0, 3) if on is None else torch.where(on, at, 0)
    for layer in range(2):
        table, held = problem.table[:, layer], problem.lengths[:, layer]
        last = problem.scale, problem.log_weight, 5.0
        masses = [torch.full(problem.keys.shape[:2], -7.0, device=q.device) for _ in range(3)]
        wanted = decode.by_definition(
            q, problem.keys, problem.values, table[taken], held[taken], *last, masses[0], on
        )  # without seats: test_decode.py compares it with softmax
        given = q, problem.keys, problem.values, table, held
        defined = decode.by_definition(*given, *last, masses[1], on, at.to(wide))
        found = decode.on_gpu(*given, work.layer(layer), *last, masses[2], on, at.to(wide))
        assert torch.equal(defined, wanted)
        assert torch.equal(masses[1], masses[0])
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(masses[2], masses[0], rtol=2e-5, atol=2e-5)
        assert not work.arrivals.any()


def test_attention_with_seats_in_order() -> None:
    """The same plan and the same bits as without seats."""
    problem = Problem(lengths(12, 3, 2, 2, 300), 2, 16, 16, 12)
    at = torch.arange(3, dtype=torch.int32, device=problem.q.device)
    on = torch.tensor([True, False, True], device=at.device)
    plain, work = problem.work(Launch(32, 4, 2, 1), 4, active=on), planned(problem, problem.q, on, at, 4)
    for mine, theirs in zip(work[2:], plain[2:], strict=True):
        assert torch.equal(mine, theirs)
    for layer in range(2):
        found = decode.on_gpu(*problem.arguments(layer), work.layer(layer), problem.scale, active=on, seats=at)
        wanted = decode.on_gpu(*problem.arguments(layer), plain.layer(layer), problem.scale, active=on)
        assert torch.equal(found, wanted)


def test_work_of_other_rows_is_refused() -> None:
    problem = Problem(lengths(13, 3, 1, 2, 60), 2, 16, 16, 13)
    q, on, at = seated(problem, [2, 0], [True, True])
    work = problem.work(Launch(32, 4, 2, 1), 2).layer(0)
    with pytest.raises(OptionError, match="for 4 streams"):
        decode.attend(q, *problem.arguments(0)[1:], work, problem.scale, active=on, seats=at)
    room = planned(problem, q, on, at, 2).layer(0)
    out = decode.attend(q, *problem.arguments(0)[1:], room, problem.scale, active=on, seats=at)
    assert bool(out.isfinite().all())


# ---- chunks


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
def test_chunks_of_seats_on_the_device(wide: torch.dtype) -> None:
    pool = pool_of("fold 5")
    seats, starts, counts = [3, 0, 2], [7, 0, 3], [9, 17, 0]
    given = torch.tensor(seats, dtype=wide)
    found = extend.plan(pool, given, starts, counts, rotary_of(HALF))
    given.zero_()  # what it held then is what counts
    wanted = extend.plan(pool, seats, starts, counts, rotary_of(HALF))
    assert found.num_keys == wanted.num_keys
    for mine, theirs in zip(
        (found.seats, found.starts, *found.rows, *found.turn),
        (wanted.seats, wanted.starts, *wanted.rows, *wanted.turn),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_checks_of_the_bench_pass() -> None:
    """What the GPU's script checks first, at sizes for the interpreter."""
    from kvpleat.bench import kernels_seats
    from kvpleat.bench.kernel_timing import Machine

    checks = list(kernels_seats.check(Machine(torch.device("cpu"), quick=True)))
    assert len(checks) == 2
    assert [check for check in checks if not check.passed] == []
