"""Decode attention for `bench.kernels`: what is checked, what is timed, and what its launch can be told."""

import itertools
import math
import time as clock
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.bench.kernel_streams import CONTEXT, Model, Pool, as_kept, uneven
from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed, difference
from kvpleat.kernels import decode
from kvpleat.kernels.decode import Launch, Work

ALLOWED = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
TOGETHER = 2**30  # bytes of all layers that are timed after each other: many times a GPU's cache


# group, channels, page size, dtype, log-weights, soft cap, mass
CHECKED: list[tuple[int, int, int, torch.dtype, bool, float | None, bool]] = [
    (4, 128, 32, torch.bfloat16, False, None, True),
    (4, 128, 16, torch.bfloat16, True, 20.0, False),
    (8, 128, 32, torch.float16, True, None, True),
    (1, 128, 16, torch.float32, True, None, True),
    (3, 64, 16, torch.bfloat16, False, None, True),
    (3, 64, 32, torch.float32, False, 20.0, False),
    (1, 80, 16, torch.float16, False, None, False),
    (4, 96, 32, torch.bfloat16, True, None, False),
    (8, 256, 16, torch.bfloat16, False, 20.0, True),
    (2, 32, 32, torch.float16, True, None, False),
]


def room(pool: Pool, launch: Launch | None = None, programs: int | None = None) -> Work:
    """Room for the work of all layers of a pool."""
    model = pool.model
    return decode.room(pool.lengths, model.channels, model.dtype, model.page_size, launch, programs)


def run(pool: Pool, work: Work, layer: int, softcap: float | None = None, mass: Tensor | None = None) -> Tensor:
    """The kernel on one layer."""
    table, lengths = pool.table[:, layer], pool.lengths[:, layer]
    streams = pool.keys, pool.values, table, lengths, work.layer(layer)
    return decode.on_gpu(pool.q, *streams, pool.scale, pool.log_weight, softcap, mass)


def specified(pool: Pool, layer: int, softcap: float | None = None, mass: Tensor | None = None) -> Tensor:
    """The specification, in float32 throughout."""
    streams = pool.keys.float(), pool.values.float(), pool.table[:, layer], pool.lengths[:, layer]
    return decode.by_definition(pool.q.float(), *streams, pool.scale, pool.log_weight, softcap, mass)


def check(here: Machine) -> Iterator[Checked]:
    """Uneven streams in poisoned pages, then a graph that is replayed after everything has changed."""
    large = here.large
    for group, channels, page_size, dtype, weighs, softcap, with_mass in CHECKED[:3] if here.quick else CHECKED:
        if here.device.type == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter multiplies it as if it were integers
        model = Model(5, 3, group, channels if large else min(channels, 32), page_size, dtype)
        lengths = uneven(5, 2, 3, 500 if large else 60, here.device)
        lengths[torch.rand(lengths.shape, device=here.device) < 0.2] = 0
        pool = Pool(model, lengths, weighs, poison=True)
        name = f"G {group} D {model.channels} S {page_size} {str(dtype)[6:]}" + " weights" * weighs
        name += "" if softcap is None else f" cap {softcap:g}"
        yield from _compare(pool, f"{name}, as launched", room(pool), softcap, with_mass)
        yield from _compare(pool, f"{name}, 7 programs", room(pool, programs=7), softcap, False)
    if large:
        yield _graph(here)


def _compare(pool: Pool, name: str, work: Work, softcap: float | None, with_mass: bool) -> Iterator[Checked]:
    decode.plan_on_gpu(work, pool.lengths, ahead=0)
    masses = [torch.zeros(pool.keys.shape[:2], device=pool.q.device) for _ in range(2)] if with_mass else [None, None]
    errors = [
        difference(run(pool, work, layer, softcap, masses[0]), specified(pool, layer, softcap, masses[1]))
        for layer in range(pool.lengths.shape[1])
    ]
    yield Checked(name, max(errors, key=_worse), ALLOWED[pool.model.dtype])
    if masses[0] is not None and masses[1] is not None:
        yield Checked(f"{name}, mass", difference(*masses), ALLOWED[pool.model.dtype])
    yield Checked(f"{name}, arrivals left", float(work.arrivals.abs().max()), 0.0)


def _worse(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _graph(here: Machine) -> Checked:
    """Plan and attention in one graph, replayed with other lengths and pages than it was captured with; and the same
    call again gives the same bits."""
    first, second = (Pool(Model(6, 4, 4, 128), uneven(6, 2, 4, 900, here.device), poison=True) for _ in range(2))
    pages = max(first.table.shape[-1], second.table.shape[-1])
    pool = Pool(first.model, torch.full_like(first.lengths, pages * 32))  # room enough for both

    def put(other: Pool) -> None:
        for mine, theirs in ((pool.keys, other.keys), (pool.values, other.values)):
            mine.fill_(math.nan)[: theirs.shape[0]] = theirs
        pool.table.fill_(-1)[..., : other.table.shape[-1]] = other.table
        pool.lengths.copy_(other.lengths)
        pool.q.copy_(other.q)

    work = room(pool)

    def step() -> list[Tensor]:
        decode.plan(work, pool.lengths)
        return [
            decode.attend(
                pool.q, pool.keys, pool.values, pool.table[:, i], pool.lengths[:, i], work.layer(i), pool.scale
            )
            for i in range(2)
        ]

    compiled: Callable[[], list[Tensor]] = torch.compile(step, backend="aot_eager", fullgraph=True)
    put(first)
    errors = [difference(a, b) for a, b in zip(compiled(), step(), strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for other in (first, second, first):
        put(other)
        graph.replay()
        again = [x.clone() for x in out]
        graph.replay()
        errors += [difference(a, b) and math.inf for a, b in zip(out, again, strict=True)]
        errors += [difference(x, specified(other, i)) for i, x in enumerate(out)]
    return Checked("one graph, other streams; torch.compile; the same bits", max(errors, key=_worse), 4e-2)


def _timed_cases(device: torch.device) -> Iterator[tuple[str, Model, Callable[[int], Tensor], int]]:
    """Name, model, lengths for so many layers, and how many of them are read after each other."""
    llama3, llama2, smollm2 = Model(32, 8, 4, 128), Model(16, 32, 1, 128), Model(64, 3, 3, 64, 16)
    one, short = Model(1, 8, 4, 128), Model(2000, 12, 1, 64, 16)

    def ragged(model: Model, mean: float, longest: int = CONTEXT) -> tuple[Callable[[int], Tensor], int]:
        rows, heads = model.rows, model.heads
        return lambda layers: uneven(rows, layers, heads, mean, device, longest), _layers(model, mean)

    def even(model: Model, length: int) -> tuple[Callable[[int], Tensor], int]:
        shape = model.rows, model.heads
        return lambda layers: torch.full(
            (shape[0], layers, shape[1]), length, dtype=torch.int32, device=device
        ), _layers(model, length)

    def kept(model: Model, of: int, tokens: int) -> tuple[Callable[[int], Tensor], int]:
        """All layers: they keep very different shares."""
        return lambda layers: as_kept(model.rows, of, model.heads, device, tokens)[:, :layers], of

    yield "dense, 32 x 8 x 8192", llama3, *even(llama3, CONTEXT)
    yield "ragged, mean 8192/4", llama3, *ragged(llama3, CONTEXT / 4)
    yield "ragged, mean 8192/8", llama3, *ragged(llama3, CONTEXT / 8)
    yield "as gates keep of 8192", llama3, *kept(llama3, 32, CONTEXT)
    yield "32 KV heads, G 1, 16 rows, mean 8192/8", llama2, *ragged(llama2, CONTEXT / 8)
    yield "1 row, 128k / 8", one, *ragged(one, 2**17 / 8, 2**17)
    yield "1 row, 32k / 8", one, *ragged(one, 2**15 / 8, 2**15)
    yield "D 64, G 3, 64 rows, mean 8192/4", smollm2, *ragged(smollm2, CONTEXT / 4)
    yield "D 64, G 1, 2,000 rows, as kept of 768", short, *kept(short, 12, 768)
    yield "dense, 32 x 8 x 1024", llama3, *even(llama3, 1024)
    yield "empty: what a call costs", llama3, *even(llama3, 0)


def _layers(model: Model, mean: float) -> int:
    """As many as are read after each other. mean: entries of a stream."""
    entries = model.rows * model.heads * mean
    return max(2, min(48, math.ceil(TOGETHER / max(1, entries * 2 * model.channels * model.dtype.itemsize))))


def time(here: Machine) -> Iterator[Timed]:
    """Attention of a layer, planned before; what the plan of all layers costs; and SDPA over as many bytes."""
    for index, (name, model, lengths, layers) in enumerate(_timed_cases(here.device)):
        if here.quick and index > 2:
            return
        if not here.wants(name):
            continue
        layers = 2 if here.once else layers
        pool = Pool(model, lengths(layers))
        work = room(pool)
        decode.plan(work, pool.lengths)
        seconds = here.seconds(_calls(pool, work))
        if here.once:
            yield Timed(name, seconds)
            continue
        planned = here.seconds([partial(decode.plan, work, pool.lengths)])
        beside = {"plan": f"{planned * 1e6:.1f} us for {layers} layers"}
        if pool.read:
            beside["SDPA"] = _sdpa(here, pool)
        yield Timed(name, seconds, pool.read, beside)
        if index == 0:
            mass = torch.zeros(pool.keys.shape[:2], device=here.device)
            calls = [partial(run, pool, work, layer, None, mass) for layer in range(layers)]
            yield Timed(f"{name}, with mass", here.seconds(calls), pool.read * 3 // 2)
        del pool, work


def _calls(pool: Pool, work: Work) -> list[Call]:
    return [partial(run, pool, work, layer) for layer in range(pool.lengths.shape[1])]


def _sdpa(here: Machine, pool: Pool) -> str:
    """torch's attention over dense tensors of as many bytes: the queries of a group as rows of one head, or as heads of
    their own, whichever is faster. The tensors are views of the pool, so they are as cold as its pages."""
    rows, heads, group, channels = pool.model[:4]
    length = int(pool.lengths.long().sum()) // (pool.lengths.numel()) or 1
    layers = pool.keys.numel() // (rows * heads * length * channels)
    shape = layers, rows, heads, length, channels
    keys, values = (x.view(-1)[: math.prod(shape)].view(shape) for x in (pool.keys, pool.values))
    together, apart = pool.q.view(rows, heads, group, channels), pool.q[:, :, None]

    def call(q: Tensor, layer: int, **more: Any) -> Call:
        return partial(F.scaled_dot_product_attention, q, keys[layer], values[layer], **more)

    ways: dict[str, Sequence[Call]] = {
        "rows": [call(together, layer) for layer in range(layers)],
        "heads": [call(apart, layer, enable_gqa=group > 1) for layer in range(layers)],
    }
    took = {way: here.seconds(calls) for way, calls in ways.items()}
    best = min(took, key=lambda way: took[way])
    read = math.prod(shape[1:]) * 2 * pool.keys.itemsize
    return (
        f"{took[best] * 1e6:.1f} us, {read / took[best] / here.bandwidth:.1%} (group as {best}, {length} entries each)"
    )


SWEEP_SECONDS = 60  # of all cases together, most of them the compiler's
SWEPT = (
    "ragged, mean 8192/8",
    "1 row, 32k / 8",
    "D 64, G 3, 64 rows, mean 8192/4",
    "D 64, G 1, 2,000 rows, as kept of 768",
    "as gates keep of 8192",
)


def sweep(here: Machine) -> Iterator[str]:
    """Tiles, warps, stages and programs on the cases that differ most, as many as the time allows: the best of each
    case, and the best for each number of channels, as decode.LAUNCHES has it."""
    from triton.runtime.errors import OutOfResources

    here, found = replace(here, quick=True), dict[int, list[dict[Launch, float]]]()
    for name, model, lengths, layers in _timed_cases(here.device):
        if name not in SWEPT or not here.wants(name):
            continue
        pool, default = Pool(model, lengths(layers)), launch_of(model)
        shares: dict[Launch, float] = {}
        _attempt(here, pool, default, shares)
        stop = clock.perf_counter() + SWEEP_SECONDS / sum(map(here.wants, SWEPT))
        for cut in sorted(_launches(model), key=lambda cut: _unlike(cut, default)):
            if clock.perf_counter() > stop:
                break
            with suppress(OutOfResources):  # too many stages for the shared memory
                for programs in (2, 3, 4, 6, 8):
                    _attempt(here, pool, cut._replace(programs=programs), shares)
        if torch.cuda.get_device_capability(here.device) >= (9, 0):
            for launch in sorted(shares, key=lambda launch: -shares[launch])[:2]:
                _attempt(here, pool, launch._replace(early=True), shares)
        found.setdefault(model.channels, []).append(shares)
        yield f"{name}: {len(shares)} tried, of a copy's bandwidth, with (tile, warps, stages, programs, early)"
        yield f"  {shares[default]:.1%} {tuple(default)}: launch_for"
        yield from (f"  {shares[x]:.1%} {tuple(x)}" for x in sorted(shares, key=lambda x: -shares[x])[:8])
    for channels, of_cases in found.items():
        # The one that loses least where it loses most.
        common = [x for x in of_cases[0] if all(x in its for its in of_cases)]
        worst = {x: min(its[x] / max(its.values()) for its in of_cases) for x in common}
        best = max(worst, key=lambda x: worst[x])
        yield f"{channels}: {best},  # at least {worst[best]:.1%} of the best in each case"


def launch_of(model: Model) -> Launch:
    """As decode would be launched."""
    return decode.launch_for(model.channels, model.dtype, model.page_size)


def _launches(model: Model) -> Iterator[Launch]:
    """Tiles of whole pages, warps and stages; each of these is compiled."""
    for tile, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4)):
        if tile % model.page_size == 0 and 8 <= tile // warps <= 64:  # warps with work, and with registers for it
            yield Launch(tile, warps, stages, 2)


def _unlike(launch: Launch, other: Launch) -> float:
    """In how many steps of the tile, the warps and the stages launches differ."""
    return sum(abs(math.log2(a / b)) for a, b in zip(launch[:3], other[:3], strict=True))


def _attempt(here: Machine, pool: Pool, launch: Launch, shares: dict[Launch, float]) -> None:
    work = room(pool, launch)
    decode.plan(work, pool.lengths)
    shares[launch] = pool.read / here.seconds(_calls(pool, work)) / here.bandwidth


CASES = Cases("decode", check, time, sweep)
