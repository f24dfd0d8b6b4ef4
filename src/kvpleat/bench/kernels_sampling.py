"""Drawing tokens, for `bench.kernels`: what is checked and timed."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvpleat.bench.kernel_timing import Cases, Checked, Machine, Timed
from kvpleat.kernels import sampling, sampling_triton

VOCABULARY = 151_936  # tokens, of Qwen
MEMORY = 400 * 2**20  # bytes of logits that are drawn from in turn, more than a GPU's cache holds
CPU = torch.device("cpu")


def _problem(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Logits, the largest of each row, temperatures."""
    make = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, size, generator=make) * 2.5).to(dtype)
    temperature = torch.rand(rows, generator=make) * 1.5 + 0.2
    return tuple(x.to(device) for x in (logits, logits.amax(-1), temperature))


def _filters(rows: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """log min_p, top_k, top_p: none, each alone, all together."""
    kind = torch.arange(rows) % 5
    min_p = torch.where((kind == 1) | (kind == 4), math.log(0.01), -math.inf)
    top_k = torch.where((kind == 2) | (kind == 4), min(20, size), size)
    top_p = torch.where(kind >= 3, 0.9, 1.0).double()
    return tuple(x.to(device) for x in (min_p, top_k, top_p))


def check(here: Machine) -> Iterator[Checked]:
    """What stays, and who wins, against the specification on a CPU."""
    on_gpu = here.device.type == "cuda"
    rows, size = (40, VOCABULARY) if on_gpu else (5, 90)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: None if on_gpu else 1]:
        given, filters = _problem(rows, size, dtype, CPU), _filters(rows, size, CPU)
        on_device = [x.to(here.device) for x in (*given, *filters)]
        wanted = sampling.least_score(*given, *filters)
        found = sampling_triton.least_score(*on_device).cpu()
        scores = (given[0].float() - given[1].float()[:, None]) / given[2][:, None]
        counts = [(scores >= least[:, None]).sum(-1).double() for least in (found, wanted)]
        # A device's own exp: the border of top_p may lie one token beside, among hundreds.
        off = ((counts[0] - counts[1]).abs() / counts[1]).max()
        yield Checked(f"tokens that stay, V {size} {str(dtype)[6:]}: share of them", float(off), 0.01)
        yield _winners(given, wanted, here.device)


def _winners(given: tuple[Tensor, ...], least: Tensor, device: torch.device) -> Checked:
    """By how much the token drawn falls short of the best one, by the specification's numbers."""
    rows, size = given[0].shape
    seeds, noise = torch.arange(rows), torch.ones(rows)
    states = sampling.state_of(seeds, seeds)
    found = sampling_triton.race(*(x.to(device) for x in (*given, least, noise, states))).cpu()
    scores = (given[0].float() - given[1].float()[:, None]) / given[2][:, None]
    scores = scores.masked_fill(scores < least[:, None], -math.inf) + sampling.gumbel(states, size)
    short = scores.amax(-1) - scores.gather(1, found[:, None])[:, 0]
    return Checked(f"draws, V {size} {str(given[0].dtype)[6:]}: short of the best", float(short.max()), 1e-4)


def time(here: Machine) -> Iterator[Timed]:
    """Draws of a step: without filters, and with all of them."""
    for rows in (64,) if here.quick else (1, 16, 64, 256):
        count = max(1, math.ceil(MEMORY / (rows * VOCABULARY * 2)))
        copies = [_problem(rows, VOCABULARY, torch.bfloat16, here.device) for _ in range(min(count, 64))]
        filters, ones = _filters(rows, VOCABULARY, here.device), torch.ones(rows, device=here.device)
        least, states = filters[0], torch.arange(rows, device=here.device)
        read = copies[0][0].numel() * 2
        likeliest = here.seconds([partial(torch.max, x[0], -1) for x in copies])
        drawn = here.seconds([partial(sampling_triton.race, *(*x, least, ones, states)) for x in copies])
        kept = here.seconds([partial(sampling_triton.least_score, *x, *filters) for x in copies])
        yield Timed(f"race, {rows} rows of {VOCABULARY}", drawn, read, {"max alone": f"{likeliest * 1e6:.1f} us"})
        yield Timed(f"what stays, {rows} rows of {VOCABULARY}", kept, read)


CASES = Cases("sampling", check, time)
