"""Entries that leave one by one, driven at random and compared with loops over tokens after every operation."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat.cache import delayed, snapshot
from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pages import PagePool
from kvpleat.errors import OutOfPagesError
from kvpleat.types import Delay, KVShape, Marks

LAYERS, HEADS, DIM, ROWS = 2, 3, 2, 2
DELAYS = {
    "evicting": Delay(3),
    "evicting at once": Delay(1),
    "folding": Delay(2, merges=True, log_size=True),
    "merging at once": Delay(0, merges=True, weighs=True),
    "merging three at once": Delay(0, merges=True, weighs=True, look_back=3),
    "merging two, late": Delay(4, merges=True, weighs=True, look_back=2),
}


def make_pool(delay: Delay, max_pages: int = 1000, bits: int | None = None) -> PagePool:
    fields = ("log_weight",) if delay.log_size else ()
    shape = KVShape(LAYERS, HEADS, HEADS, DIM, torch.float64, fields=fields, bits=bits)
    return PagePool(shape, torch.device("cpu"), max_pages)


@dataclass
class Stream:
    """What one stream was told: (key and value, marked, share carried, weight) of each token."""

    delay: Delay
    tokens: list[tuple[list[float], bool, float, float]] = field(default_factory=list)

    def entry(self, t: int) -> list[float]:
        """Key, value and log of the size of the group of token t."""
        numbers, _, _, weight = self.tokens[t]
        total, out, left, members = weight, [weight * x for x in numbers], 1.0, 1
        if not self.delay.merges:
            return [*numbers, 0.0]
        while self.tokens[t][1] and t > 0 and members != self.delay.look_back:
            left *= self.tokens[t][2]
            t, members = t - 1, members + 1
            share = left * self.tokens[t][3]
            total, out = total + share, [x + share * y for x, y in zip(out, self.tokens[t][0], strict=True)]
        return [*(x / total for x in out), math.log(total)]

    def entries(self) -> list[list[float]]:
        """All entries, in no order that means anything."""
        found, last = [], len(self.tokens) - 1
        for t, (numbers, *_) in enumerate(self.tokens):
            if last - t < self.delay.tokens:
                found.append([*numbers, 0.0])
            elif last - t == self.delay.tokens or not self.tokens[t + 1][1]:
                found.append(self.entry(t))
        return found


class Run:
    """A cache and what it ought to hold."""

    def __init__(self, delay: Delay, kv: PagedKVCache, streams: dict[tuple[int, int, int], Stream]) -> None:
        self.delay, self.kv, self.streams = delay, kv, streams

    def new_tokens(self, layer: int, rows: list[int], count: int, random: torch.Generator) -> tuple[Any, Any, Marks]:
        """Keys, values and marks [r, H, T] of tokens that the streams are told of."""
        size = (len(rows), HEADS, count)
        keys, values = (torch.randn(*size, DIM, generator=random, dtype=torch.float64) for _ in range(2))
        marked = torch.rand(size, generator=random) < 0.6
        carry, weight = (torch.rand(size, generator=random) for _ in range(2))
        weight = weight if self.delay.weighs else torch.ones(size)
        for r, row in enumerate(rows):
            for head in range(HEADS):
                told = self.streams[row, layer, head].tokens
                for t in range(count):
                    numbers = [*keys[r, head, t].tolist(), *values[r, head, t].tolist()]
                    told.append((numbers, *(x[r, head, t].item() for x in (marked, carry, weight))))
        merging = (carry.log(), weight if self.delay.weighs else None) if self.delay.merges else ()
        return keys, values, Marks(marked, *merging)

    def step(self, random: torch.Generator) -> None:
        for layer in range(LAYERS):
            positions = [len(self.streams[row, layer, 0].tokens) for row in range(ROWS)]
            delayed.step(self.kv, layer, slice(None), positions, *self.new_tokens(layer, [0, 1], 1, random))

    def extend(self, row: int, count: int, random: torch.Generator) -> None:
        for layer in range(LAYERS):
            start = len(self.streams[row, layer, 0].tokens)
            keys, values, marks = self.new_tokens(layer, [row], count, random)
            delayed.extend(self.kv, layer, row, start, keys[0], values[0], marks.each(lambda x: x[0]))

    def fork(self) -> "Run":
        streams = {at: Stream(self.delay, list(stream.tokens)) for at, stream in self.streams.items()}
        return Run(self.delay, self.kv.fork(), streams)

    def check(self) -> None:
        self.kv.check_integrity()
        size = self.kv.shape.page_size
        for (row, layer, head), stream in self.streams.items():
            held, wanted = self.kv.entries(layer, row), stream.entries()
            count = int(self.kv.lengths[row, layer, head])
            sizes = held.fields.get("log_weight", torch.zeros(held.live.shape))[head, :count, None].double()
            found = torch.cat([held.keys[head, :count], held.values[head, :count], sizes], dim=1).tolist()
            if not self.delay.log_size:
                wanted = [[*entry[:-1], 0.0] for entry in wanted]
            assert len(found) == len(wanted)
            for one, other in zip(sorted(found), sorted(wanted), strict=True):
                assert one == pytest.approx(other, abs=1e-5)
            longest = len(stream.tokens)
            assert -(-count // size) <= int(self.kv.num_pages[row, layer, head]) <= -(-longest // size)


@pytest.mark.parametrize("name", DELAYS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    operations=st.lists(
        st.one_of(
            st.just(("step",)),
            st.just(("step",)),
            st.tuples(st.just("extend"), st.integers(0, 1), st.integers(1, 40)),
            st.just(("fork",)),
        ),
        min_size=1,
        max_size=25,
    ),
)
def test_any_operations(name: str, seed: int, operations: list[tuple[Any, ...]]) -> None:
    """Steps of all rows, chunks of one, and forks: every stream holds the entries that the definition gives, rings and
    pages agree with them, and at the end all pages are free."""
    delay, random = DELAYS[name], torch.Generator().manual_seed(seed)
    pool = make_pool(delay)
    kv = PagedKVCache(pool, ROWS, delay=delay)
    places = [(row, layer, head) for row in range(ROWS) for layer in range(LAYERS) for head in range(HEADS)]
    run = Run(delay, kv, {place: Stream(delay) for place in places})
    runs = [run]
    for kind, *arguments in operations:
        if kind == "fork":
            runs.append(run.fork())
        else:
            getattr(run, kind)(*arguments, random)
        run = runs[len(runs) // 2]  # go on with one, and come back to others
        run.check()
        pool.check_integrity({r.kv.owner: r.kv.owned_pages() for r in runs})
    for run in runs:
        run.check()
        run.kv.release()
    assert pool.in_use == 0
    pool.check_integrity({})


@pytest.mark.parametrize("name", DELAYS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 50])
def test_after_a_chunk_no_page_is_left_over(name: str, tokens: int) -> None:
    """A chunk leaves just the pages that its entries fill."""
    delay, random = DELAYS[name], torch.Generator().manual_seed(tokens)
    kv = PagedKVCache(make_pool(delay), ROWS, delay=delay)
    places = [(row, layer, head) for row in range(ROWS) for layer in range(LAYERS) for head in range(HEADS)]
    run = Run(delay, kv, {place: Stream(delay) for place in places})
    for _ in range(3):
        run.extend(0, tokens, random)
        assert torch.equal(kv.num_pages, -(-kv.lengths // kv.shape.page_size))
        assert kv.pages_in_use == int(kv.num_pages.sum()) == kv.pool.in_use


@pytest.mark.parametrize("name", DELAYS)
def test_a_step_where_all_is_marked_takes_no_memory(name: str) -> None:
    """Every token leaves: streams stay at the window and one group, however long one decodes."""
    delay = DELAYS[name]
    kv = PagedKVCache(make_pool(delay), ROWS, delay=delay)
    all_of_them = torch.ones(ROWS, HEADS, 1, dtype=torch.bool)
    marks = Marks(all_of_them, all_of_them * -0.5, all_of_them.float()) if delay.merges else Marks(all_of_them)
    for position in range(60):
        one = torch.full((ROWS, HEADS, 1, DIM), float(position), dtype=torch.float64)
        for layer in range(LAYERS):
            delayed.step(kv, layer, slice(None), [position] * ROWS, one, one, marks)
        assert bool((kv.lengths == min(position, delay.tokens) + 1).all())
    kv.check_integrity()
    assert kv.pages_in_use == ROWS * LAYERS * HEADS


@pytest.mark.parametrize("name", DELAYS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_out_of_pages(name: str, tokens: int) -> None:
    """A pool that is too small: an error, and what the cache held is still there."""
    delay = DELAYS[name]
    pages = LAYERS * HEADS  # one of each stream
    kv = PagedKVCache(make_pool(delay, max_pages=pages), 1, delay=delay)

    def unmarked(count: int) -> tuple[Tensor, Tensor, Marks]:
        keys = torch.randn(HEADS, count, DIM, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
        none = torch.zeros(HEADS, count, dtype=torch.bool)
        return keys, keys, Marks(none, none * 0.0, none + 1.0) if delay.merges else Marks(none)

    for layer in range(LAYERS):
        delayed.extend(kv, layer, 0, 0, *unmarked(kv.shape.page_size))
    before = {name: tensor.clone() for name, tensor in snapshot.pack(kv).items()}
    with pytest.raises(OutOfPagesError):
        delayed.extend(kv, 0, 0, 16, *unmarked(tokens))
    keys, values, marks = unmarked(1)
    with pytest.raises(OutOfPagesError):
        delayed.step(kv, 0, slice(None), [16], keys[None], values[None], marks.each(lambda x: x[None]))
    kv.check_integrity()
    assert kv.pages_in_use == pages
    for name, tensor in snapshot.pack(kv).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", DELAYS)
def test_pack_and_unpack(name: str) -> None:
    """Into pages of another pool; both go on alike."""
    delay, random = DELAYS[name], torch.Generator().manual_seed(3)
    kv = PagedKVCache(make_pool(delay), ROWS, delay=delay)
    places = [(row, layer, head) for row in range(ROWS) for layer in range(LAYERS) for head in range(HEADS)]
    run = Run(delay, kv, {place: Stream(delay) for place in places})
    run.extend(1, 23, random)
    for _ in range(9):
        run.step(random)
    twin = run.fork()
    twin.kv = PagedKVCache(make_pool(delay), ROWS, delay=delay)
    snapshot.unpack(twin.kv, snapshot.pack(kv))
    twin.check()
    for _ in range(5):
        twin.step(random)
    twin.extend(0, 11, random)
    twin.check()
    run.check()


def test_rings_and_groups_are_counted() -> None:
    """Overhead says what streams remember, by hand."""
    for delay, each in (
        (Delay(255), 256 * (4 + 1)),
        (Delay(15, merges=True, log_size=True), 16 * (4 + 1 + 4) + 8 * (2 * DIM + 1)),
        (Delay(0, merges=True, weighs=True, look_back=12), (4 + 1 + 4 + 4) + 11 * (8 * (2 * DIM + 1) + 4)),
    ):
        pool = make_pool(delay)
        kv, plain = PagedKVCache(pool, ROWS, delay=delay), PagedKVCache(pool, ROWS)
        more = kv.memory(0).overhead_bytes - plain.memory(0).overhead_bytes
        assert more == ROWS * LAYERS * HEADS * each


def test_a_ring_that_lies_is_found() -> None:
    """check_integrity compares what is remembered with the streams."""
    delay = Delay(3)
    for wrong in (99, 0, -1, -2):
        kv = PagedKVCache(make_pool(delay), 1, delay=delay)
        marks = Marks(torch.zeros(HEADS, 9, dtype=torch.bool))
        keys = torch.zeros(HEADS, 9, DIM, dtype=torch.float64)
        for layer in range(LAYERS):
            delayed.extend(kv, layer, 0, 0, keys, keys, marks)
        kv.check_integrity()
        assert kv.delayed is not None
        kv.delayed.tensors["slots"][0, 0, 1, :2] = wrong
        with pytest.raises(AssertionError, match=r"remember|miscounted"):
            kv.check_integrity()
