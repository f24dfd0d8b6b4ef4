"""The cache on a device: torch and Triton (in its interpreter) against the cache on a host, and against lists of tokens."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
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
from kvpleat.kernels import device_pool, update
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
        monkeypatch.setattr(update_triton, "STREAMS", 16)  # the interpreter takes programs one by one
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
    named = {name: getattr(pool, name) for name in ("owner", "free_count", "page_table", "num_pages", "lengths")}
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
        self.given = torch.zeros_like(pool.owner, dtype=torch.bool)  # pages that were ever somebody's

    def new_cache(self) -> PagedKVCache:
        return PagedKVCache(self.pages, 1, rotary=self.rotary, delay=self.delay)

    def rand(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.random)

    def token(self, active: Tensor, policy: Learned | None = None, marked: float = 0.6) -> list[Any]:
        """Keys, values, marks and what is said of them, of one token a row in each layer. Inactive rows bring poison."""
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
        self.given |= self.pool.owner >= 0
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
        update.release(self.pool, torch.arange(ROWS) == row)
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
    for count in range(delay.tokens + 28):
        backend.alternate(count < 4 or (count > delay.tokens and count % 8 < 4))
        active = both.rand(ROWS) < torch.tensor([0.9, 0.6, 0.0])
        both.step(active, marked=0.2 if count % 12 < 6 else 0.8)
        if count == delay.tokens + 18:
            both.restart(1)
        if count % 9 == 0 or count in (1, 2, 3):
            both.check()
    both.check()
    update.release(both.pool, torch.ones(ROWS, dtype=torch.bool))
    check_integrity(both.pool)
    assert int(both.pool.free_count) == both.pool.owner.numel()
