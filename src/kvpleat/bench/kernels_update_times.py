"""How long what a decode step does to the cache takes, for `bench.kernels`, and what its launches can be told."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from kvpleat.bench.kernel_timing import Call, Machine, Timed
from kvpleat.kernels import update_triton
from kvpleat.kernels.device_pool import FREE, new_pool
from kvpleat.kernels.reference import Turn
from kvpleat.types import Delay, KVShape

DMS, FOLD, DMC = Delay(64), Delay(64, merges=True, log_size=True), Delay(0, merges=True, weighs=True)
STREAMS = 98304  # of all layers that are timed after each other: many times what a GPU's cache holds
HEADS, CHANNELS = 8, 128


class Steady:
    """A pool in which the same step can be repeated: what is due leaves, and the new token takes its place."""

    def __init__(self, delay: Delay | None, rows: int, layers: int, device: torch.device) -> None:
        fields = ("log_weight",) if delay is not None and delay.log_size else ()
        shape = KVShape(layers, HEADS, HEADS, CHANNELS, torch.bfloat16, 16, fields)
        streams = rows * layers * HEADS
        self.pool = new_pool(shape, delay, rows, streams, 16, device)
        self.pool.page_table.copy_(torch.randperm(streams, device=device).view(self.pool.page_table.shape))
        self.pool.holders.fill_(1)
        self.pool.num_pages.fill_(1)
        self.pool.lengths.fill_(9)
        self.pool.free_count.zero_()
        self.positions = torch.full((rows,), 1000, dtype=torch.int32, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.keys, self.values = (
            torch.randn(layers, rows, HEADS, CHANNELS, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        self.logits = torch.ones(layers, 2, rows, HEADS, device=device)
        angles = torch.zeros(rows, CHANNELS // 2, device=device)
        self.turn = Turn(angles.cos(), angles.sin()) if delay is not None and delay.merges else None
        if self.pool.ring is not None:
            self.pool.ring.marked.fill_(True)
            self.pool.ring.slots.copy_(torch.arange(self.pool.ring.slots.shape[-1], device=device) % 9)

    def step(self, layer: int) -> None:
        """One token in one layer."""
        new = self.keys[layer], self.values[layer], self.logits[layer]
        update_triton.step(self.pool, layer, self.positions, self.active, *new, self.turn)

    def append(self, layer: int) -> None:
        """The same where entries leave at moments; the stream is as long as before afterwards."""
        update_triton.append(self.pool, layer, self.positions, self.active, self.keys[layer], self.values[layer])
        self.reset(layer)

    def reset(self, layer: int) -> None:
        """What `append` and `evict` take besides to be repeated."""
        self.pool.lengths[:, layer] = 9

    @property
    def touched(self) -> int:
        """Bytes of a step in one layer: the token read and written, places in the ring, and the group it joins."""
        delay, shape = self.pool.delay, self.pool.shape
        vectors = 2 * shape.head_dim * shape.dtype.itemsize
        total = 2 * vectors + 3 * 4  # and lengths, page table
        if delay is not None:
            total += 2 * (4 + 1) + 4 * (2 if delay.merges else 1)
            if delay.merges:
                total += (2 if delay.tokens else 0) * vectors + 2 * 4 * (2 * shape.head_dim + 1) + 16
        return total * self.pool.page_table.shape[0] * HEADS


def time(here: Machine) -> Iterator[Timed]:
    """One layer's share of a step, and what is done once for all layers of a step."""
    for rows in (256,) if here.quick else (64, 256):
        layers = STREAMS // rows // HEADS
        for kind, delay in {"append": None, "dms, W 64": DMS, "fold, W 64": FOLD, "dmc": DMC}.items():
            if not here.wants(name := f"{kind}, {rows} rows x {HEADS}"):
                continue
            steady = Steady(delay, rows, layers, here.device)
            call, extra = (
                (steady.step, 0.0) if delay is not None else (steady.append, _seconds(here, steady.reset, layers))
            )
            yield Timed(name, _seconds(here, call, layers) - extra, steady.touched)
            del steady
        if here.wants(f"reserve, give back: {rows} rows"):
            yield _timed_pages(here, rows)
        if here.wants(f"evict 32 of 1024: {rows} rows"):
            yield _timed_moment(here, rows)


def _seconds(here: Machine, call: Callable[[int], None], layers: int) -> float:
    calls: list[Call] = [partial(call, layer) for layer in range(layers)]
    return here.seconds(calls)


def _timed_pages(here: Machine, rows: int) -> Timed:
    """Pages for a token in 32 layers, of which one stream in 16 needs one, and the same pages given back."""
    layers = 32
    shape = KVShape(layers, HEADS, HEADS, 8, torch.bfloat16, 16)
    streams = rows * layers * HEADS
    pool = new_pool(shape, DMS, rows, 3 * streams, 512, here.device)
    lengths = torch.randint(1, 33, pool.lengths.shape, device=here.device, dtype=torch.int32)
    update_triton.reserve(pool, lengths)
    pool.lengths.copy_(lengths)
    positions = torch.full((rows,), 1000, dtype=torch.int32, device=here.device)
    active = torch.ones(rows, dtype=torch.bool, device=here.device)

    def both() -> None:
        update_triton.reserve_token(pool, positions, active)
        update_triton.give_back(pool)

    reserved = partial(update_triton.reserve_token, pool, positions, active)
    seconds = here.seconds([both])
    nothing = here.seconds([reserved])  # they have their pages by now
    beside = {"reserved again": f"{nothing * 1e6:.1f} us"}
    return Timed(f"reserve, give back: {rows} rows x {layers} x {HEADS}", seconds, 2 * 2 * 9 * streams, beside)


def _timed_moment(here: Machine, rows: int, entries: int = 1024, leave: int = 32) -> Timed:
    """A moment of one layer at which some entries of each stream leave."""
    shape = KVShape(1, HEADS, HEADS, CHANNELS, torch.bfloat16, 16, ("position", "log_weight", "score"))
    pool = new_pool(shape, None, rows, rows * HEADS * entries // 16, entries, here.device)
    counts = torch.full_like(pool.lengths, entries)
    update_triton.reserve(pool, counts)
    assert bool((pool.page_table != FREE).all())
    keep = torch.ones(rows, HEADS, entries, dtype=torch.bool, device=here.device)
    keep[..., torch.randperm(entries)[:leave]] = False
    active = torch.ones(rows, dtype=torch.bool, device=here.device)

    def reset() -> None:
        pool.lengths.fill_(entries)

    def moment() -> None:
        reset()
        update_triton.evict(pool, 0, keep, active)

    touched = rows * HEADS * (2 * entries + 2 * leave * (4 * CHANNELS + 12))
    seconds = here.seconds([moment]) - here.seconds([reset])
    return Timed(f"evict {leave} of {entries}: {rows} rows x {HEADS}", seconds, touched)


def sweep(here: Machine) -> Iterator[str]:
    """Streams and warps of the programs that take in a token."""
    names = "STREAMS", "MERGED", "WARPS"
    kept = [getattr(update_triton, name) for name in names]
    for rows, (name, delay) in itertools.product((64, 256), {"dms": DMS, "fold": FOLD, "dmc": DMC}.items()):
        layers, found = STREAMS // rows // HEADS, {}
        steady = Steady(delay, rows, layers, here.device)
        now = _seconds(here, steady.step, layers)
        for streams, warps in itertools.product((1, 2, 4, 8), (1, 2, 4)):
            for option, value in zip(names, (streams, streams, warps), strict=True):
                setattr(update_triton, option, value)
            found[streams, warps] = _seconds(here, steady.step, layers)
        for option, value in zip(names, kept, strict=True):
            setattr(update_triton, option, value)
        best = sorted(found, key=lambda at: found[at])[:4]
        yield f"{name}, {rows} rows: now {now * 1e6:.2f} us; " + ", ".join(
            f"{found[at] * 1e6:.2f} us with (streams, warps) {at}" for at in best
        )
        del steady
