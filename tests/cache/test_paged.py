"""The page pool and the streams on it, driven at random and compared with plain Python lists after every operation."""

import gc
import itertools
import math
import mmap
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat.cache.memory import GrowableArray
from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pages import PagePool
from kvpleat.errors import CacheError, OutOfPagesError
from kvpleat.types import Decision, KVShape, Rotary

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 2, 2, 4
INV_FREQ = (0.5, 0.1)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives memory back page by page")
COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def shape(page_size: int = 16, dtype: torch.dtype = torch.float64, **changes: Any) -> KVShape:
    options: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "num_q_heads": 3 * HEADS,
        "head_dim": DIM,
        "dtype": dtype,
        "page_size": page_size,
        "fields": ("position", "log_weight", "score"),
    }
    return KVShape(**{**options, **changes})


# ---- the model of the streams: plain lists


@dataclass
class Entry:
    position: int
    key: list[float]
    value: list[float]
    log_weight: float = 0.0
    score: float = math.nan


@dataclass
class Model:
    """What the streams of one cache hold: (row, layer, head) -> entries."""

    rows: int
    streams: dict[tuple[int, int, int], list[Entry]] = field(default_factory=dict)
    seen: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.streams:
            for row, layer in itertools.product(range(self.rows), range(LAYERS)):
                self.seen[row, layer] = 0
                for head in range(HEADS):
                    self.streams[row, layer, head] = []

    def copy(self) -> "Model":
        streams = {k: [Entry(**vars(e)) for e in entries] for k, entries in self.streams.items()}
        return Model(self.rows, streams, dict(self.seen))


def turned(key: list[float], distance: int) -> list[float]:
    """A key moved by `distance` positions; its channels c and c + 2 are a pair."""
    out = list(key)
    for c, frequency in enumerate(INV_FREQ):
        cos, sin = math.cos(distance * frequency), math.sin(distance * frequency)
        out[c], out[c + 2] = key[c] * cos - key[c + 2] * sin, key[c + 2] * cos + key[c] * sin
    return out


def do_append(cache: PagedKVCache, model: Model, row: int, layer: int, count: int, random: torch.Generator) -> None:
    keys, values = (torch.randn(HEADS, count, DIM, generator=random, dtype=torch.float64) for _ in range(2))
    start = model.seen[row, layer]
    cache.append(layer, row, keys, values, torch.arange(start, start + count, dtype=torch.int32))
    model.seen[row, layer] += count
    for head, i in itertools.product(range(HEADS), range(count)):
        entry = Entry(start + i, keys[head, i].tolist(), values[head, i].tolist())
        model.streams[row, layer, head].append(entry)


def do_decide(
    cache: PagedKVCache, model: Model, row: int, layer: int, merge: bool, reserve: int, random: torch.Generator
) -> None:
    """A random decision: some entries stay, some merge into a later survivor, some leave."""
    streams = [model.streams[row, layer, head] for head in range(HEADS)]
    longest = max(map(len, streams))
    keep = torch.rand(HEADS, longest, generator=random) < 0.6
    share = torch.rand(HEADS, longest, generator=random) + 0.1
    weights, scores = (torch.rand(HEADS, longest, generator=random) for _ in range(2))
    target = torch.arange(longest).expand(HEADS, -1).clone()
    for head, entries in enumerate(streams):
        survivors = [i for i in range(len(entries)) if keep[head, i]]
        groups: dict[int, list[int]] = {i: [i] for i in survivors}
        for i in range(len(entries)):
            later = [s for s in survivors if s > i]
            if i in groups:
                continue
            if merge and later and torch.rand(1, generator=random) < 0.7:
                target[head, i] = later[0]
                groups[later[0]].append(i)
            elif merge:
                target[head, i] = -1
        new = []
        for survivor, members in groups.items():
            old = entries[survivor]
            entry = Entry(old.position, old.key, old.value, old.log_weight, float(scores[head, survivor]))
            if merge:
                entry.log_weight = float(weights[head, survivor])
            if len(members) > 1:
                total = sum(float(share[head, m]) for m in members)
                parts = [float(share[head, m]) / total for m in members]
                moved = [turned(entries[m].key, old.position - entries[m].position) for m in members]
                entry.key = [sum(p * k[c] for p, k in zip(parts, moved, strict=True)) for c in range(DIM)]
                entry.value = [
                    sum(p * entries[m].value[c] for p, m in zip(parts, members, strict=True)) for c in range(DIM)
                ]
            new.append(entry)
        model.streams[row, layer, head] = new
    cache.apply(
        layer,
        row,
        Decision(
            keep=keep,
            merge_into=target if merge else None,
            share=share if merge else None,
            log_weights=weights if merge else None,
            scores=scores,
            reserve=reserve,
        ),
    )


def check(pool: PagePool, pairs: list[tuple[PagedKVCache, Model]]) -> None:
    """Integrity of pool and caches, counts, and every entry of every stream."""
    pool.check_integrity({cache.owner: cache.owned_pages() for cache, _ in pairs})
    assert pool.in_use == sum(cache.pages_in_use for cache, _ in pairs)
    for cache, model in pairs:
        cache.check_integrity()
        for row, layer in itertools.product(range(model.rows), range(LAYERS)):
            found = cache.entries(layer, row)
            for head in range(HEADS):
                wanted = model.streams[row, layer, head]
                live = found.live[head]
                assert live.tolist() == [True] * len(wanted) + [False] * (live.numel() - len(wanted))
                assert int(cache.lengths[row, layer, head]) == len(wanted)
                assert found.fields["position"][head][live].tolist() == [e.position for e in wanted]
                for tensor, name in ((found.keys, "key"), (found.values, "value")):
                    expected = torch.tensor([getattr(e, name) for e in wanted], dtype=torch.float64).view(-1, DIM)
                    torch.testing.assert_close(tensor[head][live], expected, atol=2e-5, rtol=0)
                    assert not tensor[head][~live].any()
                for name in ("log_weight", "score"):
                    expected = torch.tensor([getattr(e, name) for e in wanted], dtype=torch.float32)
                    torch.testing.assert_close(found.fields[name][head][live], expected, equal_nan=True)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 99), st.integers(0, 40)),
        st.tuples(st.just("evict"), st.integers(0, 99), st.integers(0, 20)),
        st.tuples(st.just("merge"), st.integers(0, 99), st.integers(0, 20)),
        st.tuples(st.sampled_from(["fork", "release", "new", "trim"]), st.integers(0, 99), st.just(0)),
    ),
    min_size=5,
    max_size=25,
)


@COMMON
@given(operations=OPERATIONS, page_size=st.sampled_from([16, 32]), seed=st.integers(0, 1000), reserved=st.booleans())
def test_random_lives(operations: list[tuple[str, int, int]], page_size: int, seed: int, reserved: bool) -> None:
    """Whatever several caches on one pool go through, they hold what plain lists hold, and no page is lost."""
    random = torch.Generator().manual_seed(seed)
    pool = PagePool(shape(page_size), CPU, max_pages=4000)
    if not reserved:  # as on platforms that cannot reserve address space
        pool = copying_pool(page_size)
    rotary = Rotary(torch.tensor(INV_FREQ))
    pairs = [(PagedKVCache(pool, 2, rotary=rotary), Model(2))]
    for operation, which, amount in operations:
        if operation == "new":
            pairs.append((PagedKVCache(pool, 1, rotary=rotary), Model(1)))
        elif operation == "trim":
            pool.trim()
        elif pairs:
            index = which % len(pairs)
            cache, model = pairs[index]
            row, layer = which % model.rows, which // 3 % LAYERS
            if operation == "append":
                do_append(cache, model, row, layer, amount, random)
            elif operation == "fork":
                pairs.append((cache.fork(), model.copy()))
            elif operation == "release":
                cache.release()
                del pairs[index]
            elif any(model.streams[row, layer, head] for head in range(HEADS)):
                do_decide(cache, model, row, layer, operation == "merge", amount, random)
        check(pool, pairs)
    for cache, _ in pairs:
        cache.release()
    check(pool, [])


def copying_pool(page_size: int = 16) -> PagePool:
    """A pool whose arrays grow by copying, as they do where address space cannot be reserved."""
    pool = PagePool(shape(page_size), CPU, max_pages=4000)
    pool.arrays = {
        name: GrowableArray(array.item_shape, array.tensor.dtype, CPU, 0) for name, array in pool.arrays.items()
    }
    assert pool.arrays["key"].kind == "copied"
    return pool


# ---- the pool


@COMMON
@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 7), min_size=1, max_size=4)), max_size=40),
    limit=st.integers(10, 60),
)
def test_pool_alone(steps: list[tuple[int, list[int]]], limit: int) -> None:
    """Allocation gives every page once, ascending within a run, and refuses without taking anything."""
    pool = PagePool(shape(), CPU, max_pages=limit)
    owned: dict[int, Tensor] = {}
    for owner, counts in steps:
        if owner in owned:
            pool.free(owned.pop(owner))
        else:
            free = limit - sum(pages.numel() for pages in owned.values())
            if sum(counts) > free:
                with pytest.raises(OutOfPagesError, match="compression ratio"):
                    pool.allocate(counts, owner)
            else:
                runs = pool.allocate(counts, owner)
                assert [run.numel() for run in runs] == counts
                owned[owner] = torch.cat(runs)
        pool.check_integrity(owned)
        assert pool.in_use == sum(pages.numel() for pages in owned.values())


def test_a_stream_gets_neighbours_where_there_are() -> None:
    """After holes of 1 and 4 pages, 3 pages come out of the hole of 4; then 2 out of what the pool adds or pieces."""
    pool = PagePool(shape(), CPU, max_pages=100)
    runs = pool.allocate([1, 1, 4, 1], owner=0)
    pool.free(runs[0])
    pool.free(runs[2])
    (run,) = pool.allocate([3], owner=1)
    assert run.tolist() == [2, 3, 4]


def test_the_check_catches_what_it_should() -> None:
    """check_integrity is no rubber stamp: a lost page, a page with two owners and a wrong count are found."""
    pool = PagePool(shape(), CPU, max_pages=100)
    (pages,) = pool.allocate([4], owner=1)
    pool.check_integrity({1: pages})
    with pytest.raises(AssertionError, match="neither free nor owned"):
        pool.check_integrity({1: pages[:3]})
    with pytest.raises(AssertionError, match="another"):
        pool.check_integrity({2: pages})
    with pytest.raises(AssertionError, match="two owners"):
        pool.check_integrity({1: torch.cat([pages, pages[:1]])})
    pool.in_use += 1
    with pytest.raises(AssertionError, match="counted"):
        pool.check_integrity({1: pages})


# ---- out of pages leaves everything intact


def filled(pool: PagePool, count: int, rows: int = 1) -> tuple[PagedKVCache, Model]:
    cache, model, random = PagedKVCache(pool, rows), Model(rows), torch.Generator().manual_seed(0)
    for row, layer in itertools.product(range(rows), range(LAYERS)):
        do_append(cache, model, row, layer, count, random)
    return cache, model


def test_out_of_pages_in_append() -> None:
    """An append that does not fit changes no stream."""
    pool = PagePool(shape(), CPU, max_pages=6)
    cache, model = filled(pool, 16)
    too_many = torch.zeros(HEADS, 33, DIM, dtype=torch.float64)
    with pytest.raises(OutOfPagesError):
        cache.append(0, 0, too_many, too_many, torch.arange(16, 49, dtype=torch.int32))
    check(pool, [(cache, model)])
    do_append(cache, model, 0, 0, 16, torch.Generator())  # and what fits, fits still
    check(pool, [(cache, model)])


def test_out_of_pages_in_append_to_several_rows() -> None:
    """Neither the row that had room nor the one that had none got anything."""
    pool = PagePool(shape(), CPU, max_pages=11)
    cache, model = filled(pool, 16, rows=2)
    new = torch.zeros(2, HEADS, 1, DIM, dtype=torch.float64)
    with pytest.raises(OutOfPagesError):
        cache.append_rows(0, [0, 1], new, new, torch.full((2, 1), 16, dtype=torch.int32))
    check(pool, [(cache, model)])


def test_out_of_pages_in_apply() -> None:
    """A decision whose reserve does not fit loses no entry."""
    pool = PagePool(shape(), CPU, max_pages=4)
    cache, model = filled(pool, 16)
    keep = torch.ones(HEADS, 16, dtype=torch.bool)
    keep[:, 3] = False
    with pytest.raises(OutOfPagesError):
        cache.apply(0, 0, Decision(keep=keep, reserve=32))
    check(pool, [(cache, model)])


def test_out_of_pages_in_fork() -> None:
    """A fork that does not fit gives back what it took."""
    pool = PagePool(shape(), CPU, max_pages=7)
    cache, model = filled(pool, 16)
    with pytest.raises(OutOfPagesError):
        cache.fork()
    gc.collect()
    check(pool, [(cache, model)])


# ---- life


def test_a_released_cache_says_so() -> None:
    """After release nothing can be appended, applied or forked, twice is no error, and the report counts nothing."""
    pool = PagePool(shape(), CPU, max_pages=100)
    cache, _ = filled(pool, 20)
    cache.release()
    cache.release()
    assert pool.in_use == 0
    one = torch.zeros(HEADS, 1, DIM, dtype=torch.float64)
    for use in (
        lambda: cache.append(0, 0, one, one, torch.tensor([20], dtype=torch.int32)),
        lambda: cache.apply(0, 0, Decision(keep=torch.ones(HEADS, 20, dtype=torch.bool))),
        cache.fork,
    ):
        with pytest.raises(CacheError, match="new_cache"):
            use()
    report = cache.memory(20)
    assert (report.live_bytes, report.allocated_bytes) == (0, 0)
    assert report.kept.sum() == 0


def test_a_forgotten_cache_gives_its_pages_back() -> None:
    """Without release, the pages return when the cache goes."""
    pool = PagePool(shape(), CPU, max_pages=100)
    cache, _ = filled(pool, 20)
    assert pool.in_use == 8
    del cache
    assert pool.in_use == 0
    pool.check_integrity({})


def test_observed_queries() -> None:
    """The last W queries before a position, in order, however they were fed."""
    pool = PagePool(shape(), CPU, max_pages=10)
    cache = PagedKVCache(pool, 1, observation_window=5)
    queries = torch.randn(6, 30, DIM, dtype=torch.float64)
    start = 0
    for size in (2, 1, 9, 1, 1, 5, 11):
        cache.observed.observe(1, 0, queries[:, start : start + size], start)
        start += size
        found, positions = cache.observed.recent(1, 0, start)
        assert positions.tolist() == list(range(max(0, start - 5), start))
        assert torch.equal(found, queries[:, positions])


# ---- memory is really returned


@LINUX
def test_trim_returns_memory_to_the_system() -> None:
    """The process grows by the pool's size when it is filled, and shrinks by it after release and trim."""
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    big = shape(dtype=torch.float32, head_dim=64, num_kv_heads=HEADS)
    pool = PagePool(big, CPU)
    cache = PagedKVCache(pool, 1)
    tokens = 40_000
    block = torch.ones(HEADS, tokens, 64)
    positions = torch.arange(tokens, dtype=torch.int32)
    gc.collect()
    before = process.memory_info().rss
    for layer in range(LAYERS):
        cache.append(layer, 0, block, block, positions)
    pool_bytes = pool.in_use * pool.page_bytes
    assert pool_bytes > 80e6
    grown = process.memory_info().rss - before
    assert grown > 0.9 * pool_bytes
    cache.release()
    full = process.memory_info().rss
    assert 0 <= pool_bytes - pool.trim() < 2 * mmap.PAGESIZE * len(pool.arrays)  # ends of arrays share a system page
    fallen = full - process.memory_info().rss
    assert fallen > 0.9 * pool_bytes


@LINUX
def test_trim_keeps_what_is_owned() -> None:
    """Trimming around owned pages, small ones that share pages of the system too, leaves every entry as it was."""
    pool = PagePool(shape(), CPU, max_pages=4000)
    pairs = [filled(pool, 70) for _ in range(6)]
    for cache, _ in pairs[::2]:
        cache.release()
    pairs = pairs[1::2]
    pool.trim()
    check(pool, pairs)
    pairs.append(filled(pool, 300))
    check(pool, pairs)


def test_trim_says_what_it_gave_back() -> None:
    """What was given back cannot be given back again."""
    pool = PagePool(shape(), CPU, max_pages=4000)
    cache, _ = filled(pool, 640)
    cache.release()
    assert pool.trim() > 0
    assert pool.trim() == 0


def test_a_copying_pool_shrinks_to_its_last_owned_page() -> None:
    """Where memory cannot be given back page by page, the free tail goes."""
    pool = copying_pool()
    first, second = filled(pool, 64), filled(pool, 64)
    second[0].release()
    assert pool.trim() > 0
    assert pool.num_pages == pool.arrays["key"].capacity == 4 * LAYERS * HEADS
    check(pool, [first])
    assert pool.trim() == 0


def test_gqa_never_repeats_keys() -> None:
    """A pool's bytes count KV heads, not query heads: 3 query heads a group cost nothing."""
    pool = PagePool(shape(dtype=torch.float32), CPU, max_pages=100)
    cache, _ = filled_float32(pool, 64)
    assert pool.in_use == LAYERS * HEADS * 4
    stored = sum(array.tensor[: pool.num_pages].nbytes for array in pool.arrays.values())
    assert stored == LAYERS * HEADS * 64 * (2 * DIM * 4 + 3 * 4)
    assert cache.memory(64).allocated_bytes == stored


def filled_float32(pool: PagePool, count: int) -> tuple[PagedKVCache, Tensor]:
    cache = PagedKVCache(pool, 1)
    block = torch.ones(HEADS, count, DIM)
    for layer in range(LAYERS):
        cache.append(layer, 0, block, block, torch.arange(count, dtype=torch.int32))
    return cache, block


def test_memory_that_starts_in_inference_mode_lives_on_outside() -> None:
    """torch.inference_mode and no_grad may be mixed on one pool."""
    pool = PagePool(shape(), CPU, max_pages=100)
    with torch.inference_mode():
        cache, model = filled(pool, 20)
    do_append(cache, model, 0, 0, 20, torch.Generator())
    check(pool, [(cache, model)])
    cache.release()
    check(pool, [])
