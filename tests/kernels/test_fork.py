"""Rows that begin as others are, in torch and Triton (in its interpreter): they go on as they would on a host, and
nobody writes to what they share."""

import importlib
import random

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import extend, fork, update
from kvpleat.kernels.device_pool import FREE, DevicePool, check_integrity, settled
from kvpleat.types import Delay
from tests.kernels.test_extend import CASES, Both, make_both
from tests.kernels.test_update import HEADS, LAYERS, ROWS, SIZES, Backend, make_pool, make_shape, stream

STAY = torch.zeros(LAYERS, dtype=torch.bool)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    used = Backend(request.param)
    if used.kind == "triton":
        pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
        fork_triton = importlib.import_module("kvpleat.kernels.fork_triton")
        for name, size in {"LOOKED_AT": 2, "COPIED": 64}.items():
            monkeypatch.setattr(fork_triton, name, size)
    monkeypatch.setattr(fork, "_on_gpu", lambda pool: used.kind == "triton")
    monkeypatch.setattr(update, "_on_gpu", lambda pool: used.now == "triton")  # only where a test says so
    used.alternate(False)
    return used


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def shared_content(pool: DevicePool) -> dict[int, Tensor]:
    """What the pages hold that several rows have."""
    return {
        page: torch.cat([array[page].float().flatten() for array in pool.arrays.values()])
        for page in torch.nonzero(pool.holders > 1).flatten().tolist()
    }


class Forked(Both):
    """`Both`, whose rows may begin as others are."""

    before: dict[int, Tensor]

    def fork(self, source: int, target: int, backend: Backend, **options: bool) -> None:
        told = fork.fork(self.pool, ints(source), ints(target), moves=STAY, **options)
        self.given |= self.pool.holders > 0
        self.caches[target] = self.caches[source].fork()
        self.positions[target] = self.positions[source]
        shared, held = told[:, 0].tolist()
        assert held == int(self.pool.num_pages[target].sum())
        if options.get("whole"):
            self.leave(source, backend)
        else:
            table = self.pool.page_table
            assert shared == int(((table[source] == table[target]) & (table[source] != FREE)).sum())
        self.before = shared_content(self.pool)

    def leave(self, row: int, backend: Backend) -> None:
        backend.alternate(True)
        self.restart(row)
        backend.alternate(False)

    def check(self) -> None:
        super().check()
        for page, content in self.before.items():
            if int(self.pool.holders[page]) > 1:
                now = torch.cat([array[page].float().flatten() for array in self.pool.arrays.values()])
                torch.testing.assert_close(now, content, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_rows_go_on(backend: Backend, name: str) -> None:
    """Forks of forks in the midst of chunks and steps, sources that leave and come back: the same entries as on the
    host, no shared page is written to, and at the end all pages are free."""
    if backend.kind == "triton" and list(CASES).index(name) % 3:
        pytest.skip("the interpreter is slow, and forks do not ask what becomes of entries")
    dim, half, size = SIZES[list(CASES).index(name) % len(SIZES)]
    delay, dice = CASES[name], random.Random(name)
    both = make_both(delay, dim, half, size, pages=1200, entries=400)
    both.__class__, both.before = Forked, {}
    both.chunk({0: 150}, marked=0.4)
    for turn in range(16):
        rows = [row for row in range(ROWS) if both.positions[row]]
        empty = [row for row in range(ROWS) if row not in rows]
        if empty and (turn < 2 or dice.random() < 0.7):
            both.fork(dice.choice(rows), empty[0], backend, whole=len(rows) == 2 and dice.random() < 0.3)
        elif not empty and dice.random() < 0.4:
            both.leave(dice.choice(rows), backend)
        rows = [row for row in range(ROWS) if both.positions[row]]
        if dice.random() < 0.5:
            active = torch.tensor([row in rows and dice.random() < 0.8 for row in range(ROWS)])
            for _ in range(dice.randrange(1, 6)):
                both.step(active, marked=dice.choice([0.1, 0.5, 0.9]))
        else:
            both.chunk({dice.choice(rows): dice.randrange(1, 40)}, marked=dice.choice([0.1, 0.5, 0.9]))
        both.check()
    assert both.before
    backend.alternate(True)
    update.release(both.pool, torch.arange(ROWS))
    check_integrity(both.pool)
    assert int(both.pool.free_count) == both.pool.holders.numel()


@pytest.mark.parametrize("moves", [False, True])
def test_entries_that_stay_or_move(backend: Backend, moves: bool) -> None:
    """Without a delay: all full pages are shared, or all are copied where entries move at moments; side arrays too."""
    shape = make_shape(fields=("position", "log_weight", "score"))
    pool, tokens = make_pool(shape, None, pages=100), 37
    update.reserve(
        pool, torch.full((ROWS, LAYERS, HEADS), tokens, dtype=torch.int32) * torch.eye(3)[0].int()[:, None, None]
    )
    for position in range(tokens):
        keys = torch.randn(ROWS, HEADS, 6)
        for layer in range(LAYERS):
            at, active = torch.full((ROWS,), position, dtype=torch.int32), torch.tensor([True, False, False])
            update.append(pool, layer, at, active, keys + layer, keys)
    told = fork.fork(pool, ints(0, 0), ints(1, 2), torch.full((LAYERS,), moves))
    streams = LAYERS * HEADS
    assert told.tolist() == [[0 if moves else 2 * streams] * 2, [3 * streams] * 2]
    assert int(pool.free_count) == 100 - streams * (9 if moves else 5)
    check_integrity(pool)
    for row in (1, 2):
        for layer, head in ((0, 0), (1, 2)):
            wanted, found = stream(pool, 0, layer, head), stream(pool, row, layer, head)
            for name, content in wanted.items():
                torch.testing.assert_close(found[name], content, rtol=0, atol=0, equal_nan=True)
    if moves:
        return
    backend.alternate(True)
    update.release(pool, ints(0, 2))
    check_integrity(pool)
    assert int(pool.free_count) == 100 - 3 * streams
    update.release(pool, ints(1))
    assert int(pool.free_count) == 100


@pytest.mark.parametrize("spare", [None, 0, 7])
def test_without_pages(backend: Backend, spare: int | None) -> None:
    """A fork takes all its pages or none, leaves as many as it is told to, and does nothing after a failure."""
    delay = Delay(5)
    streams = LAYERS * HEADS
    for missing in (0, 1):
        both = make_both(delay, pages=3 * streams + 2 * streams + (spare or 0) - missing, entries=100)
        both.chunk({0: 37}, marked=0.0)  # three pages, of which the last two hold the newest tokens
        told = fork.fork(both.pool, ints(0), ints(1), moves=STAY, spare=spare)
        assert told.tolist() == [[-1 if missing else streams], [3 * streams]]
        assert int(both.pool.failed) == (missing if spare is None else 0)
        assert bool((both.pool.lengths[1] == (0 if missing else 37)).all())
        assert int(both.pool.free_count) == (2 * streams if missing else 0) + (spare or 0) - missing
        check_integrity(both.pool)
        both.pool.failed.fill_(1)
        for options in ({"whole": True}, {"spare": 0}, {}):
            assert fork.fork(both.pool, ints(0), ints(2), moves=STAY, **options)[0].tolist() == [-1]
        check_integrity(both.pool)


def test_settled() -> None:
    """By hand: what the last tokens lie in, and the last entries, is not settled."""
    both = make_both(Delay(3), size=16, entries=100)
    both.chunk({0: 80}, marked=0.0)
    pool = both.pool
    assert pool.ring is not None

    def found() -> list[bool]:
        return settled(pool.lengths, pool.ring, 16, 7)[0, 0, 0].tolist()

    assert found() == [True] * 4 + [False] * 3
    pool.ring.slots[0, 0, 0] = torch.tensor([20, 77, 78, 79])
    assert found() == [True, False, True, True, False, False, False]
    pool.lengths[0, 0, 0] = 67
    assert found() == [True, False, True, False, False, False, False]
    assert not settled(torch.zeros(1, 1, 1, dtype=torch.int32), None, 16, 7).any()


def test_chunks_go_on_behind_a_fork() -> None:
    """A chunk that is planned for a row right after it was forked."""
    both = make_both(Delay(5, merges=True, log_size=True), entries=200)
    both.__class__, both.before = Forked, {}
    both.chunk({0: 70})
    both.fork(0, 1, Backend("torch"))
    both.chunk({0: 20, 1: 31})
    both.check()
    assert extend.most_pages(both.shape, 17) == 2 * LAYERS * HEADS


@pytest.mark.parametrize("merges", [None, False, True])
@pytest.mark.parametrize("failed", [0, 7])
def test_a_row_moves_with_all_that_it_has(merges: bool | None, failed: int) -> None:
    """And whatever became of a step; others stay as they are."""
    delay = None if merges is None else Delay(3, merges=merges, weighs=merges)
    pool = make_pool(make_shape(delay), delay)
    update.reserve(pool, torch.arange(pool.lengths.numel()).view_as(pool.lengths).int() % 40 + 1)
    pool.lengths.add_((torch.arange(pool.lengths.numel()).view_as(pool.lengths) % 40 + 1).int())
    for x in pool.ring or ():
        if x is not None:
            x.copy_(torch.randint(0, 2, x.shape))
    update.release(pool, ints(0))
    pool.failed.fill_(failed)
    states = [x for x in (pool.page_table, pool.num_pages, pool.lengths, *(pool.ring or ())) if x is not None]
    before, free = [x.clone() for x in states], pool.free_pages[: int(pool.free_count)].clone()
    fork.move(pool, ints(ROWS - 1), ints(0))
    for old, new in zip(before, states, strict=True):
        assert torch.equal(new[0], old[ROWS - 1])
        assert torch.equal(new[1 : ROWS - 1], old[1 : ROWS - 1])
    assert not pool.lengths[ROWS - 1].any()
    assert (pool.page_table[ROWS - 1] == FREE).all()
    assert torch.equal(pool.free_pages[: int(pool.free_count)], free)
    assert int(pool.failed) == failed
