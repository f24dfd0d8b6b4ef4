"""What a chunk of a prompt does to the cache, for `bench.kernels`: what is checked and timed, and what its launches can
be told."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed, difference
from kvpleat.bench.kernels_update_times import CHANNELS, DMC, DMS, FOLD, HEADS
from kvpleat.kernels import extend, extend_triton, prefill, update, update_triton
from kvpleat.kernels.device_pool import DevicePool, check_integrity, new_pool
from kvpleat.kernels.reference import turn
from kvpleat.types import Delay, KVShape, Rotary

ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CPU = torch.device("cpu")
DELAYS: dict[str, Delay | None] = {"append": None, "dms, W 64": DMS, "fold, W 64": FOLD, "dmc": DMC}


class Case(NamedTuple):
    """A pool whose entries leave one by one, or never; pairs: channels that rotate, in pairs."""

    name: str
    delay: Delay | None
    channels: int
    pairs: int
    page_size: int
    dtype: torch.dtype


CHECKED = [
    Case("dms", DMS, 128, 64, 32, torch.bfloat16),
    Case("fold", FOLD, 128, 64, 16, torch.bfloat16),
    Case("dmc", DMC, 128, 64, 32, torch.bfloat16),
    Case("append", None, 128, 64, 16, torch.bfloat16),
    Case("dms", Delay(5), 80, 0, 16, torch.float16),
    Case("dms", Delay(0), 64, 0, 32, torch.float32),
    Case("fold", Delay(1, merges=True, log_size=True), 96, 24, 32, torch.float32),
    Case("fold", Delay(200, merges=True, log_size=True), 64, 32, 16, torch.float16),
    Case("dmc", DMC, 64, 32, 16, torch.float32),
    Case("dmc of 12", Delay(0, merges=True, weighs=True, look_back=12), 128, 64, 16, torch.float32),
    Case("late, of 3", Delay(4, merges=True, weighs=True, look_back=3), 256, 0, 32, torch.bfloat16),
]
# New tokens of each row, by turns, on a GPU and in the interpreter; an int: as many steps of all rows but the last.
TURNS: list[list[int] | int] = [[300, 1, 0], [700, 40, 0], 70, [1, 333, 90], 3, [129, 64, 17]]
FEW_TURNS: list[list[int] | int] = [[9, 1, 0], [40, 3, 0], 4, [1, 8, 5]]


class Both:
    """The same chunks and steps by Triton and, on a CPU, by the specification."""

    def __init__(self, case: Case, layers: int, heads: int, tokens: int, device: torch.device) -> None:
        self.case, self.sizes, self.device = case, (3, layers, heads), device
        fields = ("log_weight",) if case.delay is not None and case.delay.log_size else ()
        shape = KVShape(layers, heads, heads, case.channels, case.dtype, case.page_size, fields)
        pages = 3 * layers * heads * (-(-tokens // case.page_size))
        self.mine, self.wanted = (new_pool(shape, case.delay, 3, pages, tokens, on) for on in (device, CPU))
        for pool in (self.mine, self.wanted):
            for array in pool.arrays.values():
                array.fill_(math.nan)
        self.rotary = Rotary(1e4 ** -(torch.arange(case.pairs) / max(1, case.pairs)))
        self.random = torch.Generator().manual_seed(case.channels + case.page_size)
        self.positions = [0, 0, 0]

    def error(self, turns: list[list[int] | int]) -> float:
        """Largest difference in attention: of new tokens in each chunk, and over all entries at the end."""
        errors = []
        for number in turns:
            if isinstance(number, int):
                for _ in range(number):
                    self._step()
            else:
                errors.append(self._chunk(number))
        try:
            check_integrity(self.mine)
        except AssertionError:
            return math.inf
        return max([*errors, self._entries()], key=lambda error: math.inf if math.isnan(error) else error)

    def _rand(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random)

    def _chunk(self, counts: list[int]) -> float:
        outs, heads, random = [], self.sizes[2], self._rand
        new = [random(4, heads, sum(counts), self.case.channels) for _ in range(self.sizes[1])]
        logits = [random(2, heads, sum(counts)) * 2 + 1 for _ in new]
        for kernels, updates, pool in ((extend_triton, update_triton, self.mine), (extend, update, self.wanted)):
            rotary = Rotary(self.rotary.inv_freq.to(pool.key.device))
            starts, sizes = ([each[row] for row in (2, 0, 1)] for each in (self.positions, counts))
            chunks = extend.plan(pool, [2, 0, 1], starts, sizes, rotary)
            extend.reserve(pool, chunks)
            for layer, (numbers, said) in enumerate(zip(new, logits, strict=True)):
                outs.append(self._attend(kernels, pool, layer, chunks, numbers, said))
            updates.give_back(pool)
        self.positions = [position + count for position, count in zip(self.positions, counts, strict=True)]
        return max(itertools.starmap(difference, zip(outs[: len(new)], outs[len(new) :], strict=True)))

    def _attend(self, kernels: Any, pool: DevicePool, layer: int, chunks: Any, numbers: Tensor, said: Tensor) -> Tensor:
        """What the new tokens read of one layer, in float32."""
        first, second, k, v = numbers.to(pool.key.device, self.case.dtype).split(1)
        q, k, v = torch.cat([first, second], 1)[0].float(), k[0], v[0]
        if self.case.delay is None:
            past = kernels.append(pool, layer, chunks, k, v)
            return prefill.attend_plain(q, k, v, chunks.rows, past, None, self.case.channels**-0.5).to(CPU)
        seen = kernels.extend(pool, layer, chunks, k, v, said.to(k.device))
        return prefill.attend_plain(
            q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, self.case.channels**-0.5
        ).to(CPU)

    def _step(self) -> None:
        """One token of all rows but the last."""
        rows, layers, heads = self.sizes
        new = [self._rand(2, rows, heads, self.case.channels) for _ in range(layers)]
        logits = [self._rand(2, rows, heads) * 2 + 1 for _ in range(layers)]
        positions, active = torch.tensor(self.positions, dtype=torch.int32), torch.tensor([True, True, False])
        delay = self.case.delay
        for kernels, pool in ((update_triton, self.mine), (update, self.wanted)):
            at, on = positions.to(pool.key.device), active.to(pool.key.device)
            kernels.reserve_token(pool, at, on)
            for layer in range(layers):
                k, v = new[layer].to(at.device, self.case.dtype)
                if delay is None:
                    kernels.append(pool, layer, at, on, k, v)
                else:
                    rotary = Rotary(self.rotary.inv_freq.to(at.device))
                    by = turn(at - delay.tokens, rotary, torch.float32) if delay.merges else None
                    kernels.step(pool, layer, at, on, k, v, logits[layer].to(at.device), by)
        self.positions = [position + int(on) for position, on in zip(self.positions, active, strict=True)]

    def _entries(self) -> float:
        """Difference of what one query for each stream reads, in whatever order the entries are; or infinity."""
        if not torch.equal(self.mine.lengths.to(CPU), self.wanted.lengths):
            return math.inf
        q, outs = self._rand(self.case.channels).double(), []
        for pool in (self.mine, self.wanted):
            index = torch.arange(int(pool.lengths.max()), device=pool.key.device)
            live = index < pool.lengths[..., None]
            size = pool.shape.page_size
            slots = torch.where(live, pool.page_table.long()[..., index // size] * size + index % size, 0)
            keys, values = (x.flatten(0, 1)[slots].masked_fill(~live[..., None], 0.0) for x in (pool.key, pool.value))
            logits = keys.double() @ q.to(keys.device) * self.case.channels**-0.5
            if pool.log_weight is not None:
                logits = logits + pool.log_weight.flatten()[slots].masked_fill(~live, 0.0)
            weights = logits.masked_fill(~live, -1e30).softmax(-1)
            outs.append((weights[..., None] * values.double()).sum(-2).to(CPU))
        return difference(*outs)


def check(here: Machine) -> Iterator[Checked]:
    """Ragged chunks of rows in turn with steps, in poisoned pages."""
    large = here.large
    for case in CHECKED[:4] if here.quick else CHECKED:
        small, delay = case, case.delay
        if not large:
            if delay is not None:
                delay = Delay(min(delay.tokens, 3), *list(vars(delay).values())[1:])
            small = case._replace(channels=case.channels // 16, pairs=case.pairs // 16, delay=delay)
        both = Both(small, *((3, 5, 2048) if large else (1, 2, 64)), here.device)
        window = "" if delay is None else f" W {delay.tokens}"
        name = f"{case.name},{window} D {small.channels} S {case.page_size} {str(case.dtype)[6:]}"
        yield Checked(name, both.error(TURNS if large else FEW_TURNS), ALLOWED[case.dtype])


class Steady:
    """A pool that takes in the same chunks again and again: what they changed is put back."""

    def __init__(self, delay: Delay | None, rows: int, count: int, layers: int, device: torch.device) -> None:
        fields = ("log_weight",) if delay is not None and delay.log_size else ()
        shape = KVShape(layers, HEADS, HEADS, CHANNELS, torch.bfloat16, 16, fields)
        held = 8192 // 4
        pages = rows * layers * HEADS * (-(-(held + count) // 16))
        self.pool = new_pool(shape, delay, rows, pages, held + count, device)
        self.pool.lengths.fill_(held)
        rotary = Rotary(1e4 ** -(torch.arange(CHANNELS // 2, device=device) * 2 / CHANNELS))
        self.chunks = extend.plan(self.pool, list(range(rows)), [8192] * rows, [count] * rows, rotary)
        extend.reserve(self.pool, self.chunks)
        tokens, self.held, self.count = rows * count, held, count
        self.keys, self.values = (
            torch.randn(layers, tokens, HEADS, CHANNELS, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        self.logits = torch.randn(layers, 2, HEADS, tokens, device=device) + 0.67  # three of four are marked
        self.q = torch.randn(4 * HEADS, tokens, CHANNELS, dtype=torch.bfloat16, device=device)
        if self.pool.ring is not None:  # the youngest are scattered, as after steps
            slots = self.pool.ring.slots
            self.slots = torch.randperm(held, device=device)[: slots.shape[-1]].int().expand(slots.shape).clone()
            slots.copy_(self.slots)

    def call(self, layer: int) -> Any:
        """The chunks in one layer."""
        new = self.keys[layer].transpose(0, 1), self.values[layer].transpose(0, 1)
        if self.pool.ring is None:
            extend_triton.append(self.pool, layer, self.chunks, *new)
        else:
            extend_triton.extend(self.pool, layer, self.chunks, *new, self.logits[layer])
        self.reset(layer)

    def reset(self, layer: int) -> None:
        """The streams are as long as before, and the ring knows where their youngest are."""
        self.pool.lengths[:, layer] = self.held
        if self.pool.ring is not None:
            self.pool.ring.slots[:, layer] = self.slots[:, layer]

    def attend(self) -> Call:
        """Attention of the same chunks, in the first layer."""
        new = self.keys[0].transpose(0, 1), self.values[0].transpose(0, 1)
        scale = CHANNELS**-0.5
        if self.pool.ring is None:
            past = extend_triton.append(self.pool, 0, self.chunks, *new)
            return partial(prefill.attend, self.q, *new, self.chunks.rows, past, None, scale)
        seen = extend_triton.extend(self.pool, 0, self.chunks, *new, self.logits[0])
        return partial(prefill.attend, self.q, *seen[:2], self.chunks.rows, seen.past, seen.rule, scale)

    @property
    def touched(self) -> int:
        """Bytes of the chunks in one layer: keys and values read, written as they are for attention, as groups where
        they merge, and, a quarter of them, to pages."""
        delay, vectors = self.pool.delay, 2 * CHANNELS * 2 * HEADS * self.keys.shape[1]
        return vectors * 2 if delay is None else vectors * (9 + 4 * delay.merges) // 4


def time(here: Machine) -> Iterator[Timed]:
    """One layer's share of a forward over chunks, beside the attention that follows."""
    for rows, count in ((1, 2048),) if here.quick else ((1, 2048), (8, 256), (4, 17)):
        layers = 16
        for kind, delay in DELAYS.items():
            if not here.wants(name := f"{kind}, {rows} x {count} tokens"):
                continue
            steady = Steady(delay, rows, count, layers, here.device)
            extra = _seconds(here, steady.reset, layers)
            attention = here.seconds([steady.attend()])
            steady.reset(0)
            seconds = _seconds(here, steady.call, layers) - extra
            beside = {} if here.once else {"of attention": f"{seconds / attention:.0%}"}
            yield Timed(name, seconds, steady.touched, beside)
            del steady


def _seconds(here: Machine, call: Any, layers: int) -> float:
    calls: list[Call] = [partial(call, layer) for layer in range(layers)]
    return here.seconds(calls)


def sweep(here: Machine) -> Iterator[str]:
    """Keys and warps of the programs that write, and entries and warps of those that take a stream's young tokens."""
    names = ("SETTLED", "MERGED", "SETTLE_WARPS", "MERGE_WARPS", "MOVED", "LEAVE_WARPS")
    kept = {name: getattr(extend_triton, name) for name in names}
    for name, delay in list(DELAYS.items())[1:]:
        steady, found = Steady(delay, 1, 2048, 16, here.device), {}
        extra = _seconds(here, steady.reset, 16)
        for settled, warps, moved, leave in itertools.product((16, 32, 64), (2, 4, 8), (16, 32, 64), (2, 4, 8)):
            if (settled, warps) != (16 if delay is not None and delay.merges else 32, 4) and (moved, leave) != (32, 4):
                continue  # one pair after the other
            for option, value in zip(names, (settled, settled, warps, warps, moved, leave), strict=True):
                setattr(extend_triton, option, value)
            found[settled, warps, moved, leave] = _seconds(here, steady.call, 16) - extra
        for option, value in kept.items():
            setattr(extend_triton, option, value)
        now = _seconds(here, steady.call, 16) - extra
        best = sorted(found, key=lambda at: found[at])[:6]
        yield f"{name}: now {now * 1e6:.2f} us; " + ", ".join(
            f"{found[at] * 1e6:.2f} us with (keys, warps, moved, leave's warps) {at}" for at in best
        )
        del steady


CASES = Cases("extend", check, time, sweep)
