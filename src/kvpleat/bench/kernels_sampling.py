"""Drawing tokens, for `bench.kernels`: what is checked and timed."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed
from kvpleat.kernels import sampling, sampling_triton

VOCABULARY = 151_936  # tokens, of Qwen
MEMORY = 400 * 2**20  # bytes of logits that are drawn from in turn, more than a GPU's cache holds
CPU = torch.device("cpu")
SPREAD = {"flat": 0.05, "spread 2": 2.0}  # standard deviations of logits; of other kinds 2.5


def _problem(rows: int, size: int, dtype: torch.dtype, device: torch.device, kind: str = "") -> tuple[Tensor, ...]:
    """Logits, the largest of each row, temperatures."""
    make = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, size, generator=make) * SPREAD.get(kind, 2.5)
    if kind == "equals":
        logits = logits.round()
    elif kind == "forbidden":
        logits[:, 11:] = -math.inf
    elif kind == "peaked":
        logits[:, size // 2] = 40.0
    logits = logits.to(dtype)
    temperature = torch.rand(rows, generator=make) * 1.5 + 0.2
    return tuple(x.to(device) for x in (logits, logits.amax(-1), temperature))


def _filters(rows: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """log min_p, top_k, top_p: none, each alone, all together."""
    kind = torch.arange(rows) % 5
    min_p = torch.where((kind == 1) | (kind == 4), math.log(0.01), -math.inf)
    top_k = torch.where((kind == 2) | (kind == 4), min(20, size), size)
    top_p = torch.where(kind >= 3, 0.9, 1.0).double()
    return tuple(x.to(device) for x in (min_p, top_k, top_p))


def _alike(filters: tuple[Tensor, ...], top_k: int, top_p: float) -> tuple[Tensor, ...]:
    """The same filters for all rows."""
    return filters[0], torch.full_like(filters[1], top_k), torch.full_like(filters[2], top_p)


def check(here: Machine) -> Iterator[Checked]:
    """The largest, what stays, and who wins, against the specification on a CPU."""
    large = here.large
    rows, size = (40, VOCABULARY) if large else (5, 90)
    plain = [(dtype, "") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    cases = [*plain, (torch.float32, "equals"), (torch.float32, "flat")]
    cases += [(torch.bfloat16, kind) for kind in ("forbidden", "peaked", *SPREAD)]
    for dtype, kind in cases if large else cases[:1]:
        given, filters = _problem(rows, size, dtype, CPU, kind), _filters(rows, size, CPU)
        on_device = [x.to(here.device) for x in (*given, *filters)]
        wanted = sampling.least_score(*given, *filters)
        found = sampling_triton.least_score(*on_device).cpu()
        scores = (given[0].float() - given[1].float()[:, None]) * given[2].reciprocal()[:, None]
        counts = [(scores >= least[:, None]).sum(-1).double() for least in (found, wanted)]
        # A device's own exp: the border of top_p may lie one token beside, among hundreds.
        off = ((counts[0] - counts[1]).abs() / counts[1]).max()
        name = f"V {size} {str(dtype)[6:]} {kind}"
        yield Checked(f"tokens that stay, {name}: share of them", float(off), 0.01)
        yield _winners(given, wanted, here.device, name)
        largest = (x.cpu() for x in sampling_triton.highest(on_device[0]))
        wrong = [float((mine != its).sum()) for mine, its in zip(largest, given[0].max(-1), strict=True)]
        yield Checked(f"the largest, {name}: wrong", max(wrong), 0.0)


def _winners(given: tuple[Tensor, ...], least: Tensor, device: torch.device, name: str) -> Checked:
    """By how much the token drawn falls short of the best one, by the specification's numbers."""
    rows, size = given[0].shape
    seeds, noise = torch.arange(rows), torch.ones(rows)
    states = sampling.state_of(seeds, seeds)
    found = sampling_triton.race(*(x.to(device) for x in (*given, least, noise, states))).cpu()
    scores = (given[0].float() - given[1].float()[:, None]) * given[2].reciprocal()[:, None]
    scores = scores.masked_fill(scores < least[:, None], -math.inf) + sampling.gumbel(states, size)
    short = scores.amax(-1) - scores.gather(1, found[:, None])[:, 0]
    return Checked(f"draws, {name}: short of the best", float(short.max()), 1e-4)


def time(here: Machine) -> Iterator[Timed]:
    """Draws of a step: without filters, with each alone in all rows, and with one in a row after the other; and what
    stays of logits that are flat or peaked."""
    cases = (
        [(64, "")]
        if here.quick
        else [(1, ""), (16, ""), (64, ""), (64, "peaked"), *((64, x) for x in SPREAD), (256, "")]
    )
    for rows, kind in cases:
        count = 1 if here.once else min(64, max(1, math.ceil(MEMORY / (rows * VOCABULARY * 2))))
        copies = [_problem(rows, VOCABULARY, torch.bfloat16, here.device, kind) for _ in range(count)]
        for name, calls in _calls(copies, here.device, kind).items():
            if here.wants(name):
                seconds, beside = here.seconds(calls), {}
                if name.startswith("the largest") and not here.once:
                    torchs = here.seconds([partial(torch.max, x[0], -1) for x in copies])
                    beside = {"torch's": f"{torchs * 1e6:.1f} us"}
                yield Timed(name, seconds, copies[0][0].numel() * 2, beside)


def _calls(copies: list[tuple[Tensor, ...]], device: torch.device, logits: str) -> dict[str, list[Call]]:
    """What is timed, by name, on each of some problems, whose logits are of one kind."""
    rows = copies[0][0].shape[0]
    mixed, name = _filters(rows, VOCABULARY, device), f"{rows} rows of {VOCABULARY} {logits}".rstrip()
    ones, states = torch.ones(rows, device=device), torch.arange(rows, device=device)
    kinds = {"k, ": (50, 1.0), "p, ": (VOCABULARY, 0.95), "k and p, ": (20, 0.8)}
    filters = {kind: _alike(mixed, *given) for kind, given in kinds.items()} | {"": mixed}
    calls: dict[str, list[Call]] = {}
    if not logits:
        calls[f"the largest, {name}"] = [partial(sampling_triton.highest, x[0]) for x in copies]
        calls[f"race, {name}"] = [partial(sampling_triton.race, *(*x, mixed[0], ones, states)) for x in copies]
    for kind, given in filters.items():
        calls[f"what stays, {kind}{name}"] = [partial(sampling_triton.least_score, *(*x, *given)) for x in copies]
    return calls


def sweep(here: Machine) -> Iterator[str]:
    """Tokens of a part, warps of a program, and rounds."""
    names = "BLOCK", "WARPS", "ROUNDS"
    kept = [getattr(sampling_triton, name) for name in names]
    for rows in (1, 64):
        given = _problem(rows, VOCABULARY, torch.bfloat16, here.device)
        some = _filters(rows, VOCABULARY, here.device)
        every = _alike(some, VOCABULARY, 0.95)
        ones, states = torch.ones(rows, device=here.device), torch.arange(rows, device=here.device)
        calls = {
            "race": partial(sampling_triton.race, *(*given, some[0], ones, states)),
            "p": partial(sampling_triton.least_score, *given, *every),
            "mixed": partial(sampling_triton.least_score, *given, *some),
        }
        for what, call in calls.items():
            found = {}
            for option in itertools.product((2048, 4096, 8192), (4, 8), (2,) if what == "race" else (1, 2, 3)):
                for name, value in zip(names, option, strict=True):
                    setattr(sampling_triton, name, value)
                found[option] = here.seconds([call])
            best = sorted(found, key=lambda at: found[at])[:4]
            yield f"{what}, {rows} rows: now {found[tuple(kept)] * 1e6:.1f} us; " + ", ".join(
                f"{found[at] * 1e6:.1f} us with (tokens, warps, rounds) {at}" for at in best
            )
    for name, value in zip(names, kept, strict=True):
        setattr(sampling_triton, name, value)


CASES = Cases("sampling", check, time, sweep)
