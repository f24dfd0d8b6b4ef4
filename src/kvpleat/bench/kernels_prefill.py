"""Prefill attention for `bench.kernels`: what is checked, what is timed, and what its launch can be told."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.bench.kernel_streams import Model, Pool
from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed, difference
from kvpleat.kernels import prefill, prefill_triton
from kvpleat.kernels.prefill import Leaving, Past, Recent, Rows, Rule
from kvpleat.kernels.prefill_triton import Blocks

ALLOWED = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Shares of tokens that stay in each head, a quarter in all: as uneven as trained gates are.
KEPT = {8: (0.04, 0.9, 0.08, 0.3, 0.1, 0.18, 0.06, 0.34), 3: (0.06, 0.6, 0.09), 1: (0.25,)}
LENGTHS = (8192, 32768)
DELAY = 64


class Inputs(NamedTuple):
    """The arguments of `prefill.attend`."""

    q: Tensor
    keys: Tensor
    values: Tensor
    rows: Rows
    past: Past | None
    rule: Rule
    scale: float
    softcap: float | None


# rule, delay, group, channels, page size, dtype, log-weights, soft cap
CHECKED: list[tuple[str, int, int, int, int, torch.dtype, bool, float | None]] = [
    ("dms", 64, 4, 128, 32, torch.bfloat16, False, None),
    ("dms", 7, 3, 64, 16, torch.float16, False, None),
    ("fold", 7, 3, 64, 16, torch.float32, True, 20.0),
    ("dmc", 0, 4, 128, 32, torch.bfloat16, False, None),
    ("fold", 64, 3, 64, 16, torch.bfloat16, True, None),
    ("full", 0, 4, 128, 16, torch.bfloat16, False, None),
    ("full", 0, 3, 64, 16, torch.bfloat16, True, 20.0),
    ("window", 0, 4, 128, 32, torch.bfloat16, False, None),
    ("dms", 200, 8, 128, 32, torch.float16, True, None),
    ("dmc", 0, 1, 96, 16, torch.float16, False, 20.0),
    ("fold", 1, 2, 256, 32, torch.bfloat16, True, None),
    ("dms", 64, 2, 256, 32, torch.float16, False, None),
    ("window", 0, 5, 80, 16, torch.float16, False, None),
    ("full", 0, 32, 128, 16, torch.bfloat16, False, None),
    ("dms", 64, 4, 128, 32, torch.float32, False, None),
    ("window", 0, 1, 32, 16, torch.float32, False, None),
]


def made(
    device: torch.device,
    model: Model,
    kind: str,
    delay: int,
    new: list[int],
    young: list[int],
    lengths: Tensor | None,
    weighs: bool = False,
    softcap: float | None = None,
    poison: bool = False,
) -> Inputs:
    """Random numbers for rows of so many new and young tokens.

    Args:
        lengths: [R, 1, H] of the streams in pages; None: no past.
        poison: NaN in all that must not be read.
    """
    entry = model.heads, sum(new) + sum(young), model.channels

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(model.dtype)

    def starts(counts: list[int]) -> Tensor:
        return F.pad(torch.tensor(counts, device=device).cumsum(0), (1, 0)).int()

    rows = Rows(starts(new), starts([a + b for a, b in zip(new, young, strict=True)]))
    q = noise(sum(new), model.heads * model.group, model.channels).transpose(0, 1)
    keys, values = (noise(*entry) for _ in range(2))
    past, first = None, torch.zeros(len(new), dtype=torch.int32, device=device)
    if lengths is not None:
        pool = Pool(model, lengths.clone(), weighs, poison)
        reach = int(lengths.max()) + 1
        position = torch.randint(reach, pool.keys.shape[:2], device=device, dtype=torch.int32)
        past = Past(pool.keys, pool.values, pool.table[:, 0], pool.lengths[:, 0], pool.log_weight, position)
        first += reach
    rule: Rule = None
    if kind == "window":
        place = torch.cat([torch.arange(count, device=device) + first[0] for count in new])
        rule = Recent((place // 16 * 16 - max(new) // 3).clamp(min=4).int(), first, 4)
    elif kind != "full":
        share = torch.tensor(KEPT.get(model.heads, (0.0, 0.4, 1.0)[: model.heads]), device=device)
        stays = torch.rand(entry[:2], device=device) < share[:, None]
        old = _old(new, young, delay, device)
        groups = None if kind == "dms" else (noise(*entry), noise(*entry))
        if groups is not None and poison:
            groups[0][:, ~old] = groups[1][:, ~old] = math.nan
        rule = Leaving(delay, stays & old, groups, noise(*entry[:2]).float() if kind == "fold" else None)
    return Inputs(q, keys, values, rows, past, rule, model.channels**-0.5, softcap)


def _old(new: list[int], young: list[int], delay: int, device: torch.device) -> Tensor:
    """[M] bool, all but the last `delay` tokens of each row."""
    spans = [a + b for a, b in zip(new, young, strict=True)]
    return torch.cat([torch.arange(span, device=device) < span - delay for span in spans])


def _wanted(given: Inputs) -> Tensor:
    """The specification, in float32 throughout."""
    return prefill.attend_plain(*given._replace(q=given.q.float()))


def check_prefill(here: Machine) -> Iterator[Checked]:
    """Ragged rows over poisoned pages; a long row; and a graph that is replayed after everything has changed."""
    large = here.large
    new, past = ([700, 0, 1, 333], 400) if large else ([45, 0, 1, 20], 30)
    for kind, delay, group, channels, page_size, dtype, weighs, softcap in CHECKED[:6] if here.quick else CHECKED:
        if here.device.type == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter multiplies it as if it were integers
        model = Model(len(new), 3, group, channels if large else min(channels, 32), page_size, dtype)
        lengths = torch.randint(1, past, (len(new), 1, 3), device=here.device, dtype=torch.int32)
        lengths[torch.rand(lengths.shape, device=here.device) < 0.2] = 0
        young = [delay, delay // 2, delay, 0]
        given = made(here.device, model, kind, delay, new, young, lengths, weighs, softcap, poison=True)
        name = f"{kind} {delay} G {group} D {model.channels} S {page_size} {str(dtype)[6:]}" + " weights" * weighs
        name += "" if softcap is None else f" cap {softcap:g}"
        error = difference(prefill_triton.attend(*given), _wanted(given))
        yield Checked(name, error, ALLOWED[dtype])
    if large:
        for kind, delay in (("dms", DELAY), ("dmc", 0)):
            given = made(here.device, Model(1, 8, 4, 128), kind, delay, [5000], [0], None)
            error = difference(prefill.attend(*given), _wanted(given))
            yield Checked(f"{kind} {delay}, 5,000 tokens at once", error, ALLOWED[torch.bfloat16])
        yield _graph(here)


def _graph(here: Machine) -> Checked:
    """One graph, replayed with other rows, lengths, pages and entries that stay; and the same call gives the same
    bits."""
    model, errors = Model(3, 8, 4, 128), []
    cuts = ([300, 20, 5], [64, 10, 64]), ([1, 200, 124], [10, 64, 64])
    some = torch.randint(0, 300, (3, 1, 8), device=here.device, dtype=torch.int32)
    lengths = [some, some.flip(0, 2)]  # pools of one size
    held = made(here.device, model, "dms", DELAY, *cuts[0], lengths[0])
    out = prefill.attend(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill.attend(*held)
    for cut, of_streams in zip(cuts, lengths, strict=True):
        other = made(here.device, model, "dms", DELAY, *cut, of_streams, poison=True)
        for mine, theirs in zip(_tensors(held), _tensors(other), strict=True):
            mine.copy_(theirs)
        graph.replay()
        once = out.clone()
        graph.replay()
        errors += [difference(once, _wanted(other)), difference(once, out) and math.inf]
    return Checked("one graph, other rows and streams; the same bits", max(errors, key=_worse), ALLOWED[torch.bfloat16])


def _worse(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _tensors(given: Inputs) -> list[Tensor]:
    """All that a graph reads."""
    assert given.past is not None
    assert isinstance(given.rule, Leaving)
    found = (*given[:3], *given.rows, *given.past[:4], given.rule.stays)
    return [x for x in found if x is not None]


def time_prefill(here: Machine) -> Iterator[Timed]:
    """A prompt at once, beside dense attention; and a chunk over a compressed past."""
    for length in LENGTHS[:1] if here.quick else LENGTHS:
        for model in (Model(1, 8, 4, 128), Model(1, 3, 3, 64)):
            kinds = {"full": 0, "window": 0, "dms": DELAY, "fold": DELAY, "dmc": 0}
            kinds = {kind: delay for kind, delay in kinds.items() if here.wants(f"{_name(kind, model)} {length}")}
            dense = {} if here.once or not kinds else _dense(here, model, length)
            for kind, delay in kinds.items():
                given = made(here.device, model, kind, delay, [length], [0], None)
                yield _timed(here, f"{_name(kind, model)} {length}", given, dense)
            if not here.wants(name := f"  of it packing what stays, D {model.channels} {length}"):
                continue
            given = made(here.device, model, "dms", DELAY, [length], [0], None)
            assert isinstance(given.rule, Leaving)
            packing = partial(prefill_triton.pack_kept, given.keys, given.values, given.rule.stays, None)
            yield Timed(name, here.seconds([packing]))
    for rows, new in ((1, 2048), (4, 512)):
        model = Model(rows, 8, 4, 128)
        if not here.wants(name := f"{_name('dms', model)} {rows} x {new} over 30000 / 4"):
            continue
        kept = torch.tensor(KEPT[8], device=here.device)
        lengths = (kept * 30000).int().expand(rows, 1, 8).contiguous()
        given = made(here.device, model, "dms", DELAY, [new] * rows, [DELAY] * rows, lengths)
        yield _timed(here, name, given, {})


def _name(kind: str, model: Model) -> str:
    return f"{kind} D {model.channels} {model.heads * model.group} x {model.heads}"


def _timed(here: Machine, name: str, given: Inputs, dense: dict[str, float]) -> Timed:
    seconds = here.seconds([lambda: prefill.attend(*given)])
    beside = {f"of {way}": f"{seconds / took:.2f}" for way, took in dense.items()}
    beside["TFLOP/s"] = f"{_operations(given) / seconds / 1e12:.0f}"
    return Timed(name, seconds, None, beside)


def _operations(given: Inputs) -> float:
    """Multiplications and additions that the function asks for, in all rows alike: two products of each query with each
    entry it sees."""
    length = given.q.shape[1] // (given.rows.new.shape[0] - 1)
    place = torch.arange(length, device=given.q.device)
    heads = given.keys.shape[0]
    seen = (place + 1).expand(heads, -1).double()
    if isinstance(given.rule, Recent):
        seen = (place + 1 - given.rule.starts.clamp(min=0)).expand(heads, -1) + float(given.rule.num_sinks)
    elif isinstance(given.rule, Leaving):
        delay, keys = given.rule.delay, given.keys.shape[1] // (given.rows.new.shape[0] - 1)
        place = place + keys - length
        kept = F.pad(given.rule.stays[:, :keys].cumsum(1), (1, 0))
        seen = kept[:, (place - delay).clamp(min=0)] + place.clamp(max=delay) + 1.0
    if given.past is not None:
        seen = seen + given.past.lengths[0][:, None]
    pairs = float(seen.sum()) * (given.rows.new.shape[0] - 1)
    return 4.0 * given.q.shape[2] * pairs * given.q.shape[0] / heads


def _dense(here: Machine, model: Model, length: int) -> dict[str, float]:
    """Seconds of torch's causal attention over all tokens, by backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, model.heads * model.group, length, model.channels, device=here.device).to(model.dtype)
    k, v = (torch.randn(1, model.heads, length, model.channels, device=here.device).to(model.dtype) for _ in range(2))

    def call(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=model.group > 1)

    ways = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {name: here.seconds([partial(call, backend)]) for name, backend in ways.items()}


def sweep_prefill(here: Machine) -> Iterator[str]:
    """Blocks, warps and stages on prompts under DMS; then the band and who shares a block, with the best of these."""
    shapes = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 4), (128, 64, 4, 2)]
    shapes += [(128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4)]
    for model in (Model(1, 8, 4, 128), Model(1, 3, 3, 64)):
        cases = {length: made(here.device, model, "dms", DELAY, [length], [0], None) for length in LENGTHS}
        found: dict[Blocks, list[float]] = {}

        def attempt(cut: Blocks, cases: dict[int, Inputs] = cases, found: dict[Blocks, list[float]] = found) -> None:
            from triton.runtime.errors import OutOfResources

            try:
                found[cut] = [here.seconds([_call(given, cut)]) for given in cases.values()]
            except OutOfResources:
                return

        for queries, entries, warps, stages in shapes:
            attempt(Blocks(queries, entries, 32, model.group, warps, stages))
        best = min(found, key=lambda cut: math.prod(found[cut]))
        for change in ({"band": 16}, {"band": 64}, {"members": 1}):
            attempt(best._replace(**change))
        default = prefill_triton.choose_blocks(model.group, model.channels, model.dtype, here.device)
        attempt(default)
        yield f"{_name('dms', model)}, tokens {LENGTHS}: (queries, entries, band, members, warps, stages)"
        for cut in sorted(found, key=lambda cut: math.prod(found[cut])):
            rates = (_operations(given) / took / 1e12 for given, took in zip(cases.values(), found[cut], strict=True))
            times = ", ".join(f"{took * 1e3:.3f} ms" for took in found[cut])
            yield f"  {times}, {', '.join(f'{rate:.0f}' for rate in rates)} TFLOP/s {tuple(cut)}" + (
                " <- now" if cut == default else ""
            )


def _call(given: Inputs, cut: Blocks) -> Call:
    return lambda: prefill_triton.attend(*given, blocks=cut)


CASES = Cases("prefill", check_prefill, time_prefill, sweep_prefill)
