"""Chunks of prompts on a device: torch and Triton (in its interpreter) against the cache on a host, and against tokens
that come one after the other."""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat.cache import delayed
from kvpleat.errors import OptionError
from kvpleat.kernels import extend, prefill, update
from kvpleat.kernels.delayed import attend
from kvpleat.kernels.device_pool import DevicePool, check_integrity
from kvpleat.kernels.extend import Chunks
from kvpleat.policies.learned import Learned
from kvpleat.types import Delay, KVShape, Marks
from tests.kernels import test_update
from tests.kernels.test_update import (
    DELAYS,
    HEADS,
    LAYERS,
    POLICIES,
    ROWS,
    SIZES,
    Backend,
    check_same,
    everything,
    make_pool,
    make_shape,
    rotary_of,
    stream,
)

GROUP = 2  # query heads of a KV head
# Chunks of rows (tokens of each), or as many tokens one by one. Row 2 begins late.
TURNS: list[dict[int, int] | int] = [{1: 3, 0: 7}, {0: 12, 2: 0}, 9, {1: 17, 2: 1, 0: 40}, 4, {2: 21}, {0: 5, 1: 1}, 2]
CASES = DELAYS | {"dms 5, sinks": Delay(5, sinks=4), "dmc, sinks": Delay(0, merges=True, weighs=True, sinks=2)}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    used, layers = Backend(request.param), itertools.cycle(range(LAYERS))
    if used.kind == "triton":
        pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
        extend_triton = importlib.import_module("kvpleat.kernels.extend_triton")
        monkeypatch.setattr(
            extend_triton, "COUNTED", 64
        )  # the interpreter takes programs one by one: better few of them
        monkeypatch.setattr(extend_triton, "MOVED", 16)
    # Torch has the first layer of each forward: it saves time, and the other one shows as well what goes wrong.
    monkeypatch.setattr(extend, "_on_gpu", lambda pool: next(layers) > 0 and used.now == "triton")
    return used


def poison(pool: DevicePool) -> None:
    """NaN in all places that no stream reaches."""
    size = pool.shape.page_size
    index = torch.arange(pool.page_table.shape[-1] * size)
    slots = pool.page_table.long().repeat_interleave(size, -1) * size + index % size
    unused = torch.ones(pool.holders.numel() * size, dtype=torch.bool)
    unused[slots[index < pool.lengths[..., None]]] = False
    for array in pool.arrays.values():
        array.flatten(0, 1)[unused] = float("nan") if array.dtype.is_floating_point else -(2**31)


class Both(test_update.Both):
    """One cache on a host for each row, and the rows of a pool, which are told the same: chunks too."""

    def new_tokens(self, count: int, policy: Learned | None = None, marked: float = 0.6) -> list[Any]:
        """Queries, keys, values [..., T, D], marks and what is said of them, of so many tokens in each layer."""
        layers = []
        for _ in range(LAYERS):
            q = torch.randn(GROUP * HEADS, count, self.shape.head_dim, generator=self.random).to(self.shape.dtype)
            keys, values = (torch.randn(HEADS, count, self.shape.head_dim, generator=self.random) for _ in range(2))
            logits = torch.randn(2, HEADS, count, generator=self.random) * 3 + 0.5
            carry = torch.where(self.rand(HEADS, count) < 0.2, -torch.inf, self.rand(HEADS, count).log())
            merging = (carry, self.rand(HEADS, count) if self.delay.weighs else None) if self.delay.merges else ()
            marks = Marks(self.rand(HEADS, count) < marked, *merging)
            if policy is not None:
                marks = policy.judge(logits)
            keys, values = keys.to(self.shape.dtype), values.to(self.shape.dtype)
            layers.append((q, keys, values, marks, marks if policy is None else logits))
        return layers

    def chunk(self, counts: dict[int, int], policy: Learned | None = None, marked: float = 0.6) -> None:
        """The next tokens of some rows, and what each of them sees."""
        tokens = self.new_tokens(sum(counts.values()), policy, marked)
        found = self.chunk_device(counts, tokens)
        wanted = self.chunk_host(counts, tokens)
        close = {"rtol": 1e-4, "atol": 1e-4} if self.shape.dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, **close)
        for row, count in counts.items():
            self.positions[row] += count

    def chunk_host(self, counts: dict[int, int], tokens: list[Any]) -> list[Tensor]:
        outs = []
        for layer, (q, keys, values, marks, _) in enumerate(tokens):
            begin, parts = 0, [q[:, :0]]
            for row, count in counts.items():
                new, start = slice(begin, begin + count), int(self.positions[row])
                begin += count
                if count:
                    its = marks.each(lambda x, new=new: x[:, new])
                    seen = delayed.extend(self.caches[row], layer, 0, start, keys[:, new], values[:, new], its)
                    parts.append(attend(q[:, new], seen, start, self.delay.tokens, 0.7, None))
            outs.append(torch.cat(parts, 1))
        return outs

    def plan(self, counts: dict[int, int]) -> Chunks:
        starts = [int(self.positions[row]) for row in counts]
        return extend.plan(self.pool, list(counts), starts, list(counts.values()), self.rotary)

    def chunk_device(self, counts: dict[int, int], tokens: list[Any]) -> list[Tensor]:
        poison(self.pool)
        chunks, outs = self.plan(counts), []
        extend.reserve(self.pool, chunks)
        self.given |= self.pool.holders > 0
        for layer, (q, keys, values, _, said) in enumerate(tokens):
            seen = extend.extend(self.pool, layer, chunks, keys, values, said)
            outs.append(prefill.attend_plain(q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, 0.7))
            for stop in chunks.rows.keys[1:].tolist():
                assert not seen.rule.stays[:, max(0, stop - self.delay.tokens) : stop].any()
        update.give_back(self.pool)
        return outs


def make_both(
    delay: Delay, dim: int = 6, half: int = 3, size: int = 16, dtype: Any = torch.float32, **room: int
) -> Both:
    shape = make_shape(delay, dim, size, dtype)
    return Both(delay, shape, rotary_of(half), make_pool(shape, delay, **room), seed=dim + delay.tokens)


@pytest.mark.parametrize("name", CASES)
def test_turns(backend: Backend, name: str) -> None:
    """Chunks of odd sizes of several rows and steps in turn, a seat that another sequence takes: the same entries as on
    the host, and the same attention."""
    delay = CASES[name]
    dim, half, size = SIZES[list(CASES).index(name) % len(SIZES)]
    both = make_both(delay, dim, half, size)
    turns = [{1: 50, 0: 60}, {0: 8, 1: 20, 2: 0}, *TURNS[2:]] if delay.tokens > 16 else TURNS
    for number, turn in enumerate(turns):
        backend.alternate(number == (0 if delay.sinks else 3))
        if isinstance(turn, int):
            for _ in range(turn):
                both.step(torch.tensor([True, True, int(both.positions[2]) > 0]), marked=0.8)
        else:
            both.chunk(turn, marked=(0.6, 0.9, 0.2)[number % 3])
        if number == 4:
            both.restart(1)
        both.check()
    update.release(both.pool, torch.arange(ROWS))
    check_integrity(both.pool)
    assert int(both.pool.free_count) == both.pool.holders.numel()


@pytest.mark.parametrize("name", ["dms 5", "fold 5", "dmc", "dmc of three"])
def test_one_token_after_the_other(backend: Backend, name: str) -> None:
    """The same tokens, in a chunk or in steps, leave the same cache, and the next steps go on from it."""
    one, other = (make_both(DELAYS[name]) for _ in range(2))
    for count, steps in ((13, 0), (18, 4)):
        tokens = one.new_tokens(count)
        one.chunk_device({0: count}, tokens)
        one.positions[0] += count
        backend.alternate(False)
        for i in range(count):
            other.given.fill_(True)
            token = []
            for _, keys, values, marks, _ in tokens:
                its = marks.each(lambda x, i=i: x[None, :, i].expand(ROWS, -1))
                token.append((*(x[None, :, i].expand(ROWS, -1, -1) for x in (keys, values)), its, its))
            other.step_device(torch.tensor([True, False, False]), token)
            other.positions[0] += 1
        for i in range(steps + 1):
            for layer in range(LAYERS):
                for head in range(HEADS):
                    mine, wanted = (stream(both.pool, 0, layer, head) for both in (one, other))
                    orders = [x["value"][:, 0].argsort() for x in (mine, wanted)]
                    for array in wanted:
                        torch.testing.assert_close(
                            mine[array][orders[0]], wanted[array][orders[1]], rtol=1e-5, atol=2e-5
                        )
            if i < steps:
                token = one.token(torch.tensor([True, False, False]))
                for both in (one, other):
                    both.step_device(torch.tensor([True, False, False]), token)
                    both.positions[0] += 1
        backend.alternate(True)


@pytest.mark.parametrize("name", ["dmc", "dmc of three"])
def test_long_groups(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that reach over many blocks and to before the chunk; shares of next to nothing."""
    both = make_both(DELAYS[name], 5, 2)
    new_tokens = both.new_tokens

    def all_marked(*args: Any) -> list[Any]:
        layers = []
        for q, keys, values, marks, _ in new_tokens(*args):
            carry = torch.where(both.rand(*marks.marked.shape) < 0.02, -200.0, -0.02)
            marks = marks._replace(marked=torch.ones_like(marks.marked), log_carry=carry)
            marks.marked[1] = both.rand(marks.marked.shape[1]) < 0.97
            layers.append((q, keys, values, marks, marks))
        return layers

    monkeypatch.setattr(both, "new_tokens", all_marked)
    for number, count in enumerate((20, 39, 1)):
        backend.alternate(number == 1)
        both.chunk({1: count})
        both.check()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dms", torch.float16), ("dmc", torch.bfloat16), ("fold", torch.bfloat16), ("fold", torch.float32)],
    ids=str,
)
def test_logits(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Gates' logits are read as the policy reads them, whatever the dtype of entries."""
    policy = POLICIES[name](ratio=2.0)
    both = make_both(Delay(0 if name == "dmc" else 2, policy.merges, policy.weighs, policy.log_size), 4, 2, dtype=dtype)
    for counts in ({0: 5, 1: 1}, {1: 12}):
        backend.alternate(0 not in counts)
        both.chunk(counts, policy)
    both.check()


@pytest.mark.parametrize("name", ["dms 5", "fold 1"])
def test_alone_or_beside_a_row_that_is_nan(backend: Backend, name: str) -> None:
    """The same bits, though all of another row's numbers are NaN; and so is what its seat holds next."""
    pools = []
    for company in (False, True):
        backend.alternate(True)
        both = make_both(DELAYS[name])
        tokens = both.new_tokens(9), both.new_tokens(19)
        if company:
            nan = [(q, k * torch.nan, v * torch.nan, marks, said) for q, k, v, marks, said in both.new_tokens(7)]
            both.chunk_device({1: 7, 0: 9}, [_joined(*each) for each in zip(nan, tokens[0], strict=True)])
            update.release(both.pool, torch.tensor([1]))
        else:
            both.chunk_device({0: 9}, tokens[0])
        both.positions[0] = 9
        both.chunk_device({1: 19, 0: 19} if company else {0: 19}, [_joined(x, x) if company else x for x in tokens[1]])
        pools.append(both.pool)
    for layer in range(LAYERS):
        for head in range(HEADS):
            alone, beside = (stream(pool, 0, layer, head) for pool in pools)
            check_same(beside, alone)
            assert all(bool(x.isfinite().all()) for x in stream(pools[1], 1, layer, head).values())


def test_a_seat_that_held_nan(backend: Backend) -> None:
    """Steps go on from a short chunk, whose tokens are all young, as if nobody had had the seat."""
    both = make_both(DELAYS["fold 5"])
    nan = [(q, k * torch.nan, v * torch.nan, marks, said) for q, k, v, marks, said in both.new_tokens(9)]
    both.chunk_device({1: 9}, nan)
    both.restart(1)
    both.chunk({1: 3})
    backend.alternate(False)
    for _ in range(12):
        both.step(torch.tensor([False, True, False]), marked=0.9)
    both.check()


def _joined(first: Any, second: Any) -> Any:
    """The tokens of two rows, in one layer."""
    *pairs, marks, _ = zip(first, second, strict=True)
    some = (None if x is None or y is None else torch.cat([x, y], 1) for x, y in zip(*marks, strict=True))
    said = Marks(*some)
    return (*(torch.cat(pair, 1) for pair in pairs), said, said)


@pytest.mark.parametrize("name", ["dms 1", "fold 5", "dmc"])
def test_out_of_pages(backend: Backend, name: str) -> None:
    """A chunk that there are too few pages for changes nothing, nor do those that follow, until a row is released; then
    it can be repeated, as if nothing had been."""
    backend.alternate(False)
    both = make_both(DELAYS[name], pages=LAYERS * HEADS * 4)
    both.chunk({0: 30, 1: 15}, marked=0.0)
    both.step(torch.tensor([True, False, False]))
    tokens = both.new_tokens(20)
    backend.alternate(True)
    before = everything(both.pool)
    for _ in range(2):
        chunks = both.plan({0: 20})
        extend.reserve(both.pool, chunks)
        for layer, (_, keys, values, _, said) in enumerate(tokens):
            seen = extend.extend(both.pool, layer, chunks, keys, values, said)
            assert int(seen.past.lengths.max()) <= int(before["lengths"].max())
        update.give_back(both.pool)
        check_same(everything(both.pool), before)
        assert int(both.pool.failed) > 0
    backend.alternate(False)
    both.restart(1)
    both.pool.failed.zero_()
    backend.alternate(True)
    for mine, theirs in zip(both.chunk_device({0: 20}, tokens), both.chunk_host({0: 20}, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    both.positions[0] += 20
    both.check()


@pytest.mark.parametrize("name", ["dms 5", "dmc"])
def test_views_and_room(backend: Backend, name: str) -> None:
    """Keys and values that are views of one tensor, with room behind the tokens; chunks that nobody has."""
    mine, theirs = (make_both(DELAYS[name]) for _ in range(2))
    for counts in ({1: 9}, {0: 4, 1: 8}):
        backend.alternate(0 in counts)
        tokens = mine.new_tokens(sum(counts.values()))
        theirs.chunk_device(counts, tokens)
        chunks = mine.plan({**counts, 2: 0})
        extend.reserve(mine.pool, chunks)
        chunks = chunks._replace(num_keys=chunks.num_keys + 5)
        for layer, (_, keys, values, _, said) in enumerate(tokens):
            views = torch.nn.functional.pad(
                torch.cat([keys, values], -1).transpose(0, 1), (0, 0, 0, 0, 0, 3), value=torch.nan
            )
            said = Marks(*(None if x is None else torch.nn.functional.pad(x, (0, 3), value=True) for x in said))
            seen = extend.extend(mine.pool, layer, chunks, *views.transpose(0, 1).split(6, -1), said)
            assert not seen.rule.stays[:, -5:].any()
        update.give_back(mine.pool)
        for both in (mine, theirs):
            for row, count in counts.items():
                both.positions[row] += count
    poison(mine.pool)
    poison(theirs.pool)
    check_same(everything(mine.pool), everything(theirs.pool))


def test_tokens_that_stay(backend: Backend) -> None:
    """Where entries leave at moments: tokens behind those that were there, and side arrays of them."""
    shape = make_shape(dim=5, fields=("position", "log_weight", "score"))
    pool = make_pool(shape, None, entries=96)
    random, held = torch.Generator().manual_seed(4), dict.fromkeys(range(ROWS), torch.zeros(HEADS, 0, 5))
    for counts in ({1: 3, 0: 37}, {0: 1, 2: 16, 1: 0}, {1: 40}):
        starts = [held[row].shape[1] for row in counts]
        chunks = extend.plan(pool, list(counts), starts, list(counts.values()))
        new = torch.randn(sum(counts.values()), HEADS, 5, generator=random).transpose(0, 1)
        extend.reserve(pool, chunks)
        for layer in range(LAYERS):
            past = extend.append(pool, layer, chunks, new + layer, -new)
            assert past.lengths.tolist() == [[start] * HEADS for start in starts]
            assert past.position is pool.arrays["position"]
        for row, part in zip(counts, new.split(list(counts.values()), 1), strict=True):
            held[row] = torch.cat([held[row], part], 1)
        check_integrity(pool)
        for row, layer, head in ((r, i, h) for r in range(ROWS) for i in range(LAYERS) for h in range(HEADS)):
            found, wanted = stream(pool, row, layer, head), held[row][head]
            check_same(found, {"key": wanted + layer, "value": -wanted, "position": torch.arange(len(wanted)).int()})
            assert not found["log_weight"].any()
            assert bool(found["score"].isnan().all())


def test_tokens_that_stay_and_have_no_room(backend: Backend) -> None:
    pool = make_pool(make_shape(), None, pages=LAYERS * HEADS)
    before, new = everything(pool), torch.ones(HEADS, 17, 6)
    chunks = extend.plan(pool, [2], [0], [17])
    extend.reserve(pool, chunks)
    assert int(pool.failed) == LAYERS * HEADS
    past = extend.append(pool, 1, chunks, new, new)
    assert not past.lengths.any()
    check_same(everything(pool), before)


def test_plan() -> None:
    """Where tokens and keys lie, and how keys are turned."""
    delay = Delay(5, merges=True)
    pool, rotary = make_pool(make_shape(delay), delay), rotary_of(3)
    assert rotary is not None
    chunks = extend.plan(pool, [2, 0, 1], [3, 0, 40], [4, 0, 2], rotary)
    assert chunks.seats.tolist() == [2, 0, 1]
    assert chunks.starts.tolist() == [3, 0, 40]
    assert chunks.rows.new.tolist() == [0, 4, 4, 6]
    assert chunks.rows.keys.tolist() == [0, 7, 7, 14]
    assert chunks.num_keys == 14
    assert chunks.turn is not None
    angles = torch.tensor([*range(7), *range(35, 42)])[:, None] * rotary.inv_freq
    torch.testing.assert_close(chunks.turn.cos, angles.cos())
    torch.testing.assert_close(chunks.turn.sin, angles.sin())
    with pytest.raises(OptionError, match="two chunks"):
        extend.plan(pool, [1, 1], [0, 5], [5, 5])


def test_most_pages() -> None:
    """No chunk takes more."""
    shape = make_shape()
    pool, free = make_pool(shape, None), 400
    for start, count in ((0, 1), (1, 15), (16, 1), (17, 32), (49, 16)):
        extend.reserve(pool, extend.plan(pool, [0], [start], [count]))
        pool.lengths[0] += count
        assert free - int(pool.free_count) <= extend.most_pages(shape, count)
        free = int(pool.free_count)
    assert extend.most_pages(KVShape(2, 3, 3, 4, torch.float32, 32), 33) == 12
