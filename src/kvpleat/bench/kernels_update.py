"""What a decode step does to the cache, for `bench.kernels`: what is checked. Times: kernels_update_times.py."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpleat.bench.kernel_timing import Cases, Checked, Machine, Timed, difference
from kvpleat.bench.kernels_update_times import DMC, DMS, FOLD, sweep, time
from kvpleat.kernels import fork, update, update_triton
from kvpleat.kernels.device_pool import DevicePool, check_integrity, new_pool
from kvpleat.kernels.reference import turn
from kvpleat.types import Delay, KVShape, Rotary

ALLOWED = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A pool whose entries leave one by one; pairs: channels that rotate, in pairs."""

    name: str
    delay: Delay
    channels: int
    pairs: int
    page_size: int
    dtype: torch.dtype
    logits: bool = False


CHECKED = [
    Case("dms", DMS, 128, 64, 32, torch.bfloat16, logits=True),
    Case("fold", FOLD, 128, 64, 16, torch.bfloat16, logits=True),
    Case("dmc", DMC, 128, 64, 32, torch.bfloat16, logits=True),
    Case("dms", Delay(5), 80, 0, 16, torch.float16),
    Case("dms", Delay(0), 64, 0, 32, torch.float32),
    Case("fold", Delay(1, merges=True, log_size=True), 96, 24, 32, torch.float32),
    Case("fold", FOLD, 64, 32, 16, torch.float16),
    Case("dmc", DMC, 64, 32, 16, torch.float32),
    Case("dmc of 12", Delay(0, merges=True, weighs=True, look_back=12), 128, 64, 16, torch.float32),
    Case("late, of 3", Delay(4, merges=True, weighs=True, look_back=3), 256, 0, 32, torch.bfloat16),
]


class Both:
    """The same steps by Triton and, on a CPU, by the specification."""

    def __init__(self, case: Case, rows: int, layers: int, heads: int, tokens: int, device: torch.device) -> None:
        self.case, self.sizes, self.device = case, (rows, layers, heads), device
        fields = ("log_weight",) if case.delay.log_size else ()
        shape = KVShape(layers, heads, heads, case.channels, case.dtype, case.page_size, fields)
        pages = rows * layers * heads * (-(-tokens // case.page_size))
        self.mine, self.wanted = (new_pool(shape, case.delay, rows, pages, tokens, on) for on in (device, CPU))
        for pool in (self.mine, self.wanted):
            for array in pool.arrays.values():
                array.fill_(math.nan)
        self.rotary = Rotary(1e4 ** -(torch.arange(case.pairs, device=device) / max(1, case.pairs)))
        self.random = torch.Generator().manual_seed(rows + case.channels + case.delay.tokens)
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.given = [x.to(device) for x in self._new()]
        self.graph: Any = None

    def _new(self) -> list[Tensor]:
        """Keys and values [L, R, H, D] of one token a row; logits [L, 2, R, H]."""
        rows, layers, heads = self.sizes
        keys, values = (torch.randn(layers, rows, heads, self.case.channels, generator=self.random) for _ in range(2))
        logits = torch.randn(layers, 2, rows, heads, generator=self.random) * 2 + 0.5
        return [keys.to(self.case.dtype), values.to(self.case.dtype), logits]

    def _step(self, kernels: Any, pool: DevicePool, positions: Tensor, active: Tensor, given: list[Tensor]) -> None:
        """One token, in all layers: `kernels` is the module of the specification or that of Triton."""
        by = None
        if self.case.pairs and self.case.delay.merges:
            rotary = Rotary(self.rotary.inv_freq.to(positions.device))
            by = turn(positions - self.case.delay.tokens, rotary, torch.float32)
        kernels.reserve_token(pool, positions, active)
        for layer, (keys, values, logits) in enumerate(zip(*given, strict=True)):
            said = logits if self.case.logits else update.read_logits(logits, self.case.delay)
            kernels.step(pool, layer, positions, active, keys, values, said, by)

    def step(self) -> None:
        """One token of some rows; on a GPU, from the second token on, by replaying a graph."""
        active = torch.rand(self.sizes[0], generator=self.random) < 0.8
        new = self._new()
        self._step(update, self.wanted, self.positions.to(CPU), active, new)
        self.active.copy_(active)
        for mine, theirs in zip(self.given, new, strict=True):
            mine.copy_(theirs)
        arguments = update_triton, self.mine, self.positions, self.active, self.given
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step(*arguments)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # captures a step, and does not run it
                    self._step(*arguments)
        self.positions += self.active.int()

    def error(self) -> float:
        return _difference(self.mine, self.wanted)


def _difference(mine: DevicePool, wanted: DevicePool) -> float:
    """Largest difference of an entry, or infinity where lengths or pages differ at all."""
    try:
        check_integrity(mine)
    except AssertionError:
        return math.inf
    for name in ("lengths", "num_pages", "page_table", "holders", "free_count", "failed"):
        if not torch.equal(getattr(mine, name).to(CPU), getattr(wanted, name)):
            return math.inf
    size = wanted.shape.page_size
    index = torch.arange(wanted.page_table.shape[-1] * size)
    slots = wanted.page_table.long().repeat_interleave(size, -1) * size + index % size
    slots = slots[index < wanted.lengths[..., None]]
    return max(
        difference(mine.arrays[name].to(CPU).flatten(0, 1)[slots], array.flatten(0, 1)[slots])
        for name, array in wanted.arrays.items()
    )


def check(here: Machine) -> Iterator[Checked]:
    """Ragged rows in poisoned pages; entries that leave at moments; a pool that is too small."""
    large = here.large
    for case in CHECKED[:3] if here.quick else CHECKED:
        small = case
        if not large:
            delay = Delay(min(case.delay.tokens, 3), *list(vars(case.delay).values())[1:])
            small = case._replace(channels=case.channels // 16, pairs=case.pairs // 16, delay=delay)
        tokens = small.delay.tokens + (40 if large else 6)
        both = Both(small, *((13, 3, 5) if large else (2, 1, 2)), tokens, here.device)
        for _ in range(tokens):
            both.step()
        name = f"{case.name}, W {small.delay.tokens} D {small.channels} S {case.page_size} {str(case.dtype)[6:]}"
        yield Checked(name + " logits" * case.logits, both.error(), ALLOWED[case.dtype])
    if here.quick and not large:
        return
    yield Checked("moments: appended, evicted, given back, released", _moments(here.device, large), 0.0)
    yield Checked("out of pages: nothing is lost", _out_of_pages(here.device), 0.0)
    for name, delay in {"dms": DMS, "fold": FOLD, "dmc": DMC}.items():
        yield Checked(f"forks of {name}: pages shared, copied, left", _forks(name, delay, here.device), 6e-2)


def _moments(device: torch.device, large: bool) -> float:
    rows, heads, channels = (37, 8, 128) if large else (2, 2, 8)
    shape = KVShape(2, heads, heads, channels, torch.float32, 16, ("position", "log_weight", "score"))
    random = torch.Generator().manual_seed(rows)
    pools = [new_pool(shape, None, rows, 2 * rows * heads * 8, 128, on) for on in (device, CPU)]
    errors = []
    for position in range(100 if large else 34):
        positions, active = torch.full((rows,), position, dtype=torch.int32), torch.rand(rows, generator=random) < 0.9
        new = [torch.randn(rows, heads, channels, generator=random) for _ in range(2)]
        keep = torch.rand(rows, heads, 128, generator=random) < 0.7
        for kernels, pool in zip((update_triton, update), pools, strict=True):
            at, on, flags = (x.to(pool.key.device) for x in (positions, active, keep))
            kernels.reserve_token(pool, at, on)
            for layer in range(2):
                kernels.append(pool, layer, at, on, *(x.to(at.device) for x in new))
                if position % 16 == 15 + layer:
                    kernels.evict(pool, layer, flags, on)
            pool.arrays["score"].copy_(pool.arrays["position"])
            if position % 16 == 15:
                kernels.give_back(pool)
        if position % 16 == 15:
            errors.append(_difference(*pools))
    for pool in pools:
        update.release(pool, torch.arange(1, rows, 3, dtype=torch.int32, device=pool.key.device))
    return max(*errors, _difference(*pools))


def _forks(name: str, delay: Delay, device: torch.device) -> float:
    """Rows become copies of another one, which goes on, and leaves first."""
    tokens = delay.tokens + 60
    both = Both(Case(name, delay, 128, 64, 16, torch.bfloat16, logits=True), 5, 2, 4, 2 * tokens, device)
    for _ in range(tokens):
        both.step()
    for pool in (both.mine, both.wanted):
        zero, two, three = (torch.tensor(rows, device=pool.key.device) for rows in ([0, 0], [2, 3], [4]))
        stay = torch.zeros(2, dtype=torch.bool, device=pool.key.device)
        update.release(pool, two)
        fork.fork(pool, zero, two, moves=stay)
        update.release(pool, three)
        fork.fork(pool, two[:1], three, moves=stay)
    both.positions[2:] = both.positions[0]
    errors = [both.error()]
    for number in range(40):
        both.step()
        if number == 20:
            for pool in (both.mine, both.wanted):
                update.release(pool, torch.tensor([3, 0], device=pool.key.device))
            both.positions[0] = both.positions[3] = 0
    return max(*errors, both.error())


def _out_of_pages(device: torch.device) -> float:
    """A step more than there are pages for, and one after it."""
    case = Case("dms", Delay(1), 8, 0, 16, torch.float32)
    both = Both(case, 2, 1, 2, 16, device)  # a page for each stream
    for _ in range(60):
        both.step()
        if int(both.wanted.failed):
            break
    before = both.error()
    both.step()
    return max(before, both.error()) if int(both.mine.failed) else math.inf


CASES = Cases("update", check, time, sweep)


def check_update(device: torch.device) -> list[Checked]:
    """All checks at once."""
    return list(check(Machine(device, quick=False)))


def time_update(device: torch.device) -> list[Timed]:
    """All times at once, on a GPU."""
    return list(time(Machine(device, quick=False)))
