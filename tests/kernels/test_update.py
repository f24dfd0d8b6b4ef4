"""The cache on a device: torch and Triton (in its interpreter) against the cache on a host, and lists of tokens."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat.cache import delayed
from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pages import PagePool
from kvpleat.errors import UnsupportedError
from kvpleat.kernels import update
from kvpleat.kernels.device_pool import DevicePool, check_integrity, new_pool
from kvpleat.kernels.reference import turn
from kvpleat.policies.learned import DMC, DMS, Fold, Learned
from kvpleat.types import Delay, KVShape, Marks, Rotary

CPU = torch.device("cpu")
LAYERS, HEADS, ROWS = 2, 3, 3  # the last row never has a token
DMS_DELAYS = {f"dms {w}": Delay(w) for w in (0, 1, 5, 64)}
FOLD_DELAYS = {f"fold {w}": Delay(w, merges=True, log_size=True) for w in (1, 5, 64)}
DMC_DELAYS = {"dmc": Delay(0, merges=True, weighs=True)}
LOOK_BACK = {
    "dmc of three": Delay(0, merges=True, weighs=True, look_back=3),
    "dmc of one": Delay(0, merges=True, weighs=True, look_back=1),
    "late, of two": Delay(4, merges=True, weighs=True, look_back=2),
}
DELAYS = DMS_DELAYS | FOLD_DELAYS | DMC_DELAYS | LOOK_BACK
SIZES = [(6, 3, 16), (5, 1, 32), (4, 0, 16)]  # channels, pairs that rotate, entries of a page
POLICIES: dict[str, type[Learned]] = {"dms": DMS, "fold": Fold, "dmc": DMC}


class Backend:
    """What `kernels.update` runs: Triton, in its interpreter where there is no GPU, or torch."""

    def __init__(self, kind: str) -> None:
        self.kind = self.now = kind

    def alternate(self, first: bool) -> None:
        """Torch now and then, where Triton is tested: each goes on with what the other left, and it saves time."""
        self.now = self.kind if first else "torch"


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    used = Backend(request.param)
    if used.kind == "triton":
        pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
        update_triton = importlib.import_module("kvpleat.kernels.update_triton")
        sizes = {"STREAMS": 16, "MERGED": 16, "COUNTED": 8, "PLANNED": 128, "MOVED": 16, "MOVERS": 1}
        for name, size in sizes.items():  # the interpreter takes programs one by one: better few of them
            monkeypatch.setattr(update_triton, name, size)
    monkeypatch.setattr(update, "_on_gpu", lambda pool: used.now == "triton")
    return used


def make_shape(
    delay: Delay | None = None, dim: int = 6, size: int = 16, dtype: torch.dtype = torch.float32, fields: Any = ()
) -> KVShape:
    fields = ("log_weight",) if delay is not None and delay.log_size else fields
    return KVShape(LAYERS, HEADS, HEADS, dim, dtype, page_size=size, fields=fields)


def make_pool(
    shape: KVShape, delay: Delay | None, pages: int = 400, entries: int = 200, rows: int = ROWS
) -> DevicePool:
    """A pool whose unused places are poisoned."""
    pool = new_pool(shape, delay, rows, pages, entries, CPU)
    for array in pool.arrays.values():
        array.fill_(float("nan") if array.dtype.is_floating_point else -(2**31))
    return pool


def everything(pool: DevicePool) -> dict[str, Tensor]:
    """A copy of all that a pool holds, but for the flag and what is only valid during a change."""
    named = {name: getattr(pool, name) for name in ("holders", "free_count", "page_table", "num_pages", "lengths")}
    rings = {} if pool.ring is None else {name: x for name, x in pool.ring._asdict().items() if x is not None}
    return {name: x.clone() for name, x in {**pool.arrays, **named, **rings}.items()}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name} changed")


def stream(pool: DevicePool, row: int, layer: int, head: int) -> dict[str, Tensor]:
    """The entries of one stream, in the order in which it holds them."""
    index = torch.arange(int(pool.lengths[row, layer, head]))
    size = pool.shape.page_size
    slots = pool.page_table[row, layer, head, index // size].long() * size + index % size
    return {name: array.flatten(0, 1)[slots] for name, array in pool.arrays.items()}


# ---- entries that leave one by one: against the cache on a host


class Both:
    """One cache on a host for each row, and the rows of a pool, which are told the same."""

    def __init__(self, delay: Delay, shape: KVShape, rotary: Rotary | None, pool: DevicePool, seed: int) -> None:
        self.delay, self.shape, self.rotary, self.pool = delay, shape, rotary, pool
        self.random = torch.Generator().manual_seed(seed)
        self.pages = PagePool(shape, CPU)
        self.caches = [self.new_cache() for _ in range(ROWS)]
        self.positions = torch.zeros(ROWS, dtype=torch.int32)
        self.given = torch.zeros_like(pool.holders, dtype=torch.bool)  # pages that were ever somebody's

    def new_cache(self) -> PagedKVCache:
        return PagedKVCache(self.pages, 1, rotary=self.rotary, delay=self.delay)

    def rand(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.random)

    def token(self, active: Tensor, policy: Learned | None = None, marked: float = 0.6) -> list[Any]:
        """Keys, values, marks and what is said of them, of one token a row in each layer; of inactive rows: poison."""
        layers = []
        for _ in range(LAYERS):
            keys, values = (torch.randn(ROWS, HEADS, self.shape.head_dim, generator=self.random) for _ in range(2))
            logits = torch.randn(2, ROWS, HEADS, generator=self.random) * 3 + 0.5
            carry = torch.where(self.rand(ROWS, HEADS) < 0.2, -torch.inf, self.rand(ROWS, HEADS).log())
            weight = self.rand(ROWS, HEADS)
            keys[~active] = values[~active] = logits[:, ~active] = carry[~active] = weight[~active] = torch.nan
            merging = (carry, weight if self.delay.weighs else None) if self.delay.merges else ()
            marks = Marks(self.rand(ROWS, HEADS) < marked, *merging)
            if policy is not None:
                marks = policy.judge(logits)
            keys, values = keys.to(self.shape.dtype), values.to(self.shape.dtype)
            layers.append((keys, values, marks, marks if policy is None else logits))
        return layers

    def step_host(self, active: Tensor, token: list[Any]) -> None:
        for layer, (keys, values, marks, _) in enumerate(token):
            for row in active.nonzero().flatten().tolist():
                its = marks.each(lambda x, row=row: x[row : row + 1, :, None])
                new = keys[row : row + 1, :, None], values[row : row + 1, :, None]
                delayed.step(self.caches[row], layer, slice(None), [int(self.positions[row])], *new, its)

    def step_device(self, active: Tensor, token: list[Any]) -> None:
        at = self.positions - self.delay.tokens
        by = turn(at, self.rotary, torch.float32) if self.rotary is not None and self.delay.merges else None
        update.reserve_token(self.pool, self.positions, active)
        self.given |= self.pool.holders > 0
        for layer, (keys, values, _, said) in enumerate(token):
            update.step(self.pool, layer, self.positions, active, keys, values, said, by)

    def step(self, active: Tensor, policy: Learned | None = None, marked: float = 0.6) -> None:
        token = self.token(active, policy, marked)
        self.step_host(active, token)
        self.step_device(active, token)
        self.positions += active.int()

    def restart(self, row: int) -> None:
        """Another sequence takes the row's seat."""
        self.caches[row] = self.new_cache()
        update.release(self.pool, torch.tensor([row]))
        self.positions[row] = 0

    def check(self) -> None:
        check_integrity(self.pool)
        assert int(self.pool.failed) == 0
        close = {"rtol": 1e-5, "atol": 2e-5} if self.shape.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        for row, kv in enumerate(self.caches):
            assert torch.equal(self.pool.lengths[row], kv.lengths[0])
            ahead = self.pool.num_pages[row] - kv.num_pages[0]
            # Without a delay a full stream gets its page before it is known whether it grows.
            assert bool(((ahead >= 0) & (ahead <= int(self.delay.tokens == 0))).all())
            for layer in range(LAYERS):
                held = kv.entries(layer, 0)
                for head in range(HEADS):
                    count, found = int(kv.lengths[0, layer, head]), stream(self.pool, row, layer, head)
                    order = found["value"][:, 0].float().argsort()
                    wanted = held.values[head, :count, 0].float().argsort()
                    for name, tensor in {"key": held.keys, "value": held.values, **held.fields}.items():
                        torch.testing.assert_close(found[name][order], tensor[head, :count][wanted], **close)
        assert bool(self.pool.key[~self.given].isnan().all()), "something was written where no page was given"


def rotary_of(half: int) -> Rotary | None:
    return Rotary(1 / 50.0 ** (torch.arange(half) / half)) if half else None


@pytest.mark.parametrize("name", DELAYS)
def test_steps(backend: Backend, name: str) -> None:
    """Ragged rows, rows that pause, a row whose seat goes to another one: the same entries as on the host."""
    delay = DELAYS[name]
    dim, half, size = SIZES[list(DELAYS).index(name) % len(SIZES)]
    shape = make_shape(delay, dim, size)
    both = Both(delay, shape, rotary_of(half), make_pool(shape, delay), seed=len(name) + dim)
    for count in range(delay.tokens + 22):
        backend.alternate(count < 3 or (count > delay.tokens and count % 8 < 4))
        active = both.rand(ROWS) < torch.tensor([0.9, 0.6, 0.0])
        both.step(active, marked=0.2 if count % 12 < 6 else 0.8)
        if count == delay.tokens + 14:
            both.restart(1)
        if count % 9 == 0 or count in (1, 2, 3):
            both.check()
    both.check()
    update.release(both.pool, torch.arange(ROWS))
    check_integrity(both.pool)
    assert int(both.pool.free_count) == both.pool.holders.numel()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dms", torch.float16), ("dmc", torch.bfloat16), ("fold", torch.bfloat16), ("fold", torch.float32)],
    ids=str,
)
def test_logits(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Gates' logits are read as the policy reads them, whatever the dtype of entries."""
    policy = POLICIES[name](ratio=2.0)
    delay = Delay(0 if name == "dmc" else 2, policy.merges, policy.weighs, policy.log_size)
    shape = make_shape(delay, 4, 16, dtype)
    both = Both(delay, shape, rotary_of(2), make_pool(shape, delay), seed=7)
    for _ in range(8):
        both.step(torch.tensor([True, True, False]), policy)
    both.check()


def test_extreme_logits() -> None:
    """The same marks as the policies', at any logit."""
    logits = torch.tensor([[-200.0, -1e-9, 0.0, 1e-9, 200.0], [-200.0, -40.0, 0.0, 40.0, 200.0]])
    for name, policy in POLICIES.items():
        delay = Delay(0, policy.merges, policy.weighs)
        for mine, theirs in zip(update.read_logits(logits, delay), policy(ratio=2.0).judge(logits), strict=True):
            assert (mine is None) == (theirs is None), name
            assert mine is None or torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", ["dmc", "fold 1"])
def test_what_nothing_joins_stays_bit_for_bit(backend: Backend, name: str) -> None:
    """Keys of tokens alone are not rotated back and forth."""
    delay = DELAYS[name]
    shape = make_shape(delay)
    both = Both(delay, shape, rotary_of(3), make_pool(shape, delay), seed=1)
    active, given = torch.tensor([True, False, True]), []
    for _ in range(3):
        token = both.token(active, marked=0.0)
        both.step_device(active, token)
        both.positions += active.int()
        given.append(token[1][0][2, 1])
    assert torch.equal(stream(both.pool, 2, 1, 1)["key"], torch.stack(given))


@pytest.mark.parametrize(("name", "streams"), [("fold 1", 2), ("dmc of three", 4), ("dms 1", 1)])
def test_any_blocks(backend: Backend, name: str, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams a program takes, and with keys and values that are views of one tensor."""
    if backend.kind == "triton":
        for option in ("STREAMS", "MERGED"):
            monkeypatch.setattr(f"kvpleat.kernels.update_triton.{option}", streams)
    delay = DELAYS[name]
    shape = make_shape(delay, 5)
    both = Both(delay, shape, rotary_of(2), make_pool(shape, delay), seed=streams)
    for _ in range(4):
        token = both.token(torch.tensor([True, True, False]))
        views = []
        for keys, values, *rest in token:
            both_sides = torch.cat([keys, values], -1).transpose(0, 1).contiguous().transpose(0, 1)
            views.append((*both_sides.split(5, -1), *rest))
        both.step_host(torch.tensor([True, True, False]), token)
        both.step_device(torch.tensor([True, True, False]), views)
        both.positions += torch.tensor([1, 1, 0], dtype=torch.int32)
    both.check()


@pytest.mark.parametrize("name", ["fold 1", "dmc", "dmc of three"])
def test_a_seat_that_held_nan(backend: Backend, name: str) -> None:
    """Rows beside a row of NaN notice nothing of it, nor does a sequence that then begins in its seat with a step."""
    delay = DELAYS[name]
    shape = make_shape(delay)
    both = Both(delay, shape, rotary_of(3), make_pool(shape, delay), seed=5)
    for count in range(delay.tokens + 4):
        backend.alternate(count in (0, delay.tokens + 3))
        token = both.token(torch.tensor([True, True, False]), marked=0.9)
        for keys, values, marks, _ in token:
            for x in (keys, values, marks.log_carry, marks.weight):
                if x is not None:
                    x[1] = torch.nan
        both.step_host(torch.tensor([True, False, False]), token)
        both.step_device(torch.tensor([True, True, False]), token)
        both.positions += torch.tensor([1, 1, 0], dtype=torch.int32)
    both.restart(1)
    for count in range(delay.tokens + 6):
        backend.alternate(count == 0 or count > delay.tokens + 2)
        both.step(torch.tensor([True, True, False]), marked=0.9)
    backend.alternate(True)
    for row in (0, 1):
        for layer in range(LAYERS):
            for head in range(HEADS):
                assert all(bool(x.isfinite().all()) for x in stream(both.pool, row, layer, head).values())
    both.check()


@pytest.mark.parametrize("name", ["dms 1", "fold 5", "dmc"])
def test_out_of_pages(backend: Backend, name: str) -> None:
    """A step without enough pages changes nothing, nor do those that follow, until a row is released; then it can be
    repeated, as if nothing had been."""
    delay = DELAYS[name]
    shape = make_shape(delay)
    pages = LAYERS * HEADS * 3 - 1  # two rows need a page for each stream, and at the 17th token two
    both = Both(delay, shape, rotary_of(3), make_pool(shape, delay, pages), seed=3)
    active = torch.tensor([True, True, False])
    for count in range(40):
        backend.alternate(count % 16 < 2)
        token = both.token(active, marked=0.05)
        before = everything(both.pool)
        both.step_device(active, token)
        if int(both.pool.failed):
            break
        both.step_host(active, token)
        both.positions += active.int()
    grew = before["lengths"] % 16 == 0
    assert bool(grew.any()), "the pool was too large for this test"
    backend.alternate(True)
    for _ in range(2):
        check_same(everything(both.pool), before)
        assert 0 < int(both.pool.failed) <= LAYERS * HEADS * 2
        both.step_device(active, both.token(active))
    both.restart(1)
    alone = torch.tensor([True, False, False])
    before = everything(both.pool)
    both.step_device(alone, token)
    check_same(everything(both.pool), before)  # there are pages now, but nobody said that the step may be repeated
    both.pool.failed.zero_()
    both.step_device(alone, token)
    both.step_host(alone, token)
    both.positions += alone.int()
    both.check()


def test_streams_that_outgrow_the_page_table(backend: Backend) -> None:
    """Nothing is written beyond a stream's line of the table: it counts as a lack of pages."""
    pool = make_pool(make_shape(), None, pages=100, entries=32)
    counts = torch.zeros_like(pool.lengths)
    counts[0, 1, 2] = 33
    update.reserve(pool, counts)
    assert int(pool.failed) > 0
    check_integrity(pool)
    assert int(pool.free_count) == 100
    pool.failed.zero_()
    counts[0, 1, 2] = 32
    update.reserve(pool, counts)
    check_integrity(pool)
    assert (int(pool.failed), int(pool.free_count)) == (0, 98)


def test_tokens_without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who forgets to reserve is told so, and nothing is written."""
    pytest.importorskip("triton")
    monkeypatch.setattr(update, "_on_gpu", lambda pool: True)
    pool = make_pool(make_shape(), None)
    before, new = everything(pool), torch.ones(ROWS, HEADS, 6)
    positions, active = torch.zeros(ROWS, dtype=torch.int32), torch.tensor([True, False, True])
    update.append(pool, 1, positions, active, new, new)
    check_same(everything(pool), before)
    assert int(pool.failed) == 1


@pytest.mark.parametrize("shape", [make_shape(dtype=torch.float64), KVShape(1, 1, 1, 4, torch.float32, bits=8)])
def test_entries_that_kernels_do_not_know(shape: KVShape) -> None:
    with pytest.raises(UnsupportedError, match="know"):
        new_pool(shape, None, 1, 1, 16, CPU)


# ---- entries that leave at moments: against lists of tokens


class Model:
    """Pools that are told the same, one for each backend, and what they ought to hold: the positions in each stream."""

    def __init__(self, backend: Backend, pages: int) -> None:
        shape = make_shape(dim=3, fields=("position", "log_weight", "score"))
        self.backend, kinds = backend, {"torch", backend.kind}
        self.pools = {kind: make_pool(shape, None, pages, entries=96) for kind in kinds}
        self.held = {(r, i, h): set() for r in range(ROWS) for i in range(LAYERS) for h in range(HEADS)}
        self.positions = torch.zeros(ROWS, dtype=torch.int32)

    @property
    def pool(self) -> DevicePool:
        return self.pools["torch"]

    def all(self, change: Any) -> bool:
        """Do the same to all pools. False: there were too few pages, and nothing had happened."""
        for kind, pool in self.pools.items():
            self.backend.now = kind
            before = everything(pool)
            change(pool)
            if int(pool.failed):
                check_same(everything(pool), before)
        if int(self.pool.failed):
            assert len({int(pool.failed) for pool in self.pools.values()}) == 1
            for pool in self.pools.values():
                pool.failed.zero_()
            return False
        return True

    def start(self, count: int) -> None:
        """Tokens of the first two rows, by torch alone: that saves time."""
        pools, self.pools = self.pools, {"torch": self.pool}
        self.tokens([True, True, False], count)
        for pool in pools.values():
            for name, array in pool.arrays.items():
                array.copy_(self.pool.arrays[name])
            for name in ("holders", "free_pages", "free_count", "page_table", "num_pages", "lengths"):
                getattr(pool, name).copy_(getattr(self.pool, name))
        self.pools = pools

    def tokens(self, rows: list[bool], count: int) -> None:
        active = torch.tensor(rows)

        def append(pool: DevicePool) -> None:
            update.reserve_token(pool, self.positions, active)
            for layer in range(LAYERS):
                update.append(pool, layer, self.positions, active, *self.content(layer))

        for _ in range(count):
            if self.all(append):
                for (row, *_), held in self.held.items():
                    held |= {int(self.positions[row])} if rows[row] else set()
                self.positions += active.int()
        for pool in self.pools.values():  # as a policy would
            pool.arrays["score"].copy_(pool.arrays["position"] * 0.5)
            pool.arrays["log_weight"].copy_(pool.arrays["position"] * -0.25)

    def content(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that tell where they belong."""
        keys = self.positions[:, None, None] + torch.arange(HEADS)[:, None] / 8 + layer / 4 + torch.zeros(3)
        return keys, -keys

    def reserve(self, seed: int) -> None:
        counts = torch.randint(0, 40, self.pool.lengths.shape, generator=torch.Generator().manual_seed(seed)).int()
        self.all(lambda pool: update.reserve(pool, counts))

    def evict(self, rows: list[bool], layer: int, seed: int, share: float, width: int) -> None:
        random = torch.Generator().manual_seed(seed)
        keep = torch.rand(ROWS, HEADS, width, generator=random) < share
        for row in range(ROWS):
            for head in range(HEADS):
                at = stream(self.pool, row, layer, head)["position"][:width].tolist()
                if rows[row]:
                    stays = zip(at, keep[row, head].tolist(), strict=False)
                    self.held[row, layer, head] -= {position for position, kept in stays if not kept}
        assert self.all(lambda pool: update.evict(pool, layer, keep, torch.tensor(rows)))

    def give_back(self) -> None:
        assert self.all(update.give_back)
        size = self.pool.shape.page_size
        assert torch.equal(self.pool.num_pages, -(-self.pool.lengths // size))

    def release(self, rows: list[bool]) -> None:
        assert self.all(lambda pool: update.release(pool, torch.tensor(rows).nonzero().flatten()))
        for at in self.held:
            if rows[at[0]]:
                self.held[at] = set()
        self.positions[torch.tensor(rows)] = 0

    def check(self) -> None:
        check_integrity(self.pool)
        for pool in self.pools.values():
            check_same(everything(pool), everything(self.pool))
            assert torch.equal(pool.free_pages[: int(pool.free_count)], self.pool.free_pages[: int(pool.free_count)])
        for (row, layer, head), held in self.held.items():
            found = stream(self.pool, row, layer, head)
            position = found["position"]
            assert sorted(position.tolist()) == sorted(held)
            keys = (position + head / 8 + layer / 4)[:, None].expand(-1, 3)
            wanted = {"key": keys, "value": -keys, "score": position * 0.5, "log_weight": position * -0.25}
            check_same(found, wanted)


ACTIVE = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
OPERATIONS = st.one_of(
    st.tuples(st.just("tokens"), ACTIVE, st.integers(1, 5)),
    st.tuples(st.just("reserve"), st.integers(0, 99)),
    st.tuples(
        st.just("evict"),
        ACTIVE,
        st.integers(0, LAYERS - 1),
        st.integers(0, 99),
        st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        st.integers(1, 96),
    ),
    st.just(("give_back",)),
    st.tuples(st.just("release"), ACTIVE),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=st.integers(15, 34), operations=st.lists(OPERATIONS, min_size=1, max_size=7))
def test_any_operations(backend: Backend, first: int, operations: list[tuple[Any, ...]]) -> None:
    """Tokens, pages ahead, evictions and releases, in a pool that is sometimes too small: every stream holds what it
    ought to, no page has two owners, both backends give the same pages, and in the end all are free."""
    if backend.kind == "triton":
        update_triton = importlib.import_module("kvpleat.kernels.update_triton")
        update_triton.COUNTED, update_triton.PLANNED, update_triton.MOVED, update_triton.MOVERS = 4, 32, 4, 2
    model = Model(backend, pages=50)
    model.start(first)
    for kind, *arguments in operations:
        getattr(model, kind)(*arguments)
        model.check()
    model.release([True] * ROWS)
    model.check()
    assert int(model.pool.free_count) == 50


def test_checks_of_the_bench_pass() -> None:
    """What the GPU's script checks first, at sizes for the interpreter."""
    pytest.importorskip("triton")
    from kvpleat.bench import kernels_update
    from kvpleat.bench.kernel_timing import Machine

    checks = list(kernels_update.check(Machine(CPU, quick=True)))
    assert len(checks) == 3
    assert [check for check in checks if not check.passed] == []
