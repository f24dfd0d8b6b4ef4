"""`sampling.race` and `least_score` in Triton.

The race is noise, filter and the search for the largest in one pass over the logits. What stays is found without a
sort: scores are 0 or less, so their bits without the sign are integers in reverse order. The bits of the last one that
stays are found one after the other, from the highest on, and each is one pass over the row: how many tokens, or how
much probability, would be better than it if this bit were set.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpleat.kernels import sampling

BLOCK = 4096  # tokens of a program
GOLDEN = tl.constexpr(sampling.GOLDEN)
FIRST, SECOND = (tl.constexpr(factor) for factor in sampling.MIXED_BY)
MASS = tl.constexpr(2.0**sampling.MASS_BITS)
MOST_NOISE = tl.constexpr(sampling.MOST_NOISE)


def race(logits: Tensor, largest: Tensor, temperature: Tensor, least: Tensor, noise: Tensor, states: Tensor) -> Tensor:
    """`sampling.race`, where states [n] int64 stand for seeds and counters."""
    rows, size = logits.shape
    parts = triton.cdiv(size, BLOCK)
    best = torch.empty(rows, parts, device=logits.device)
    where = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _race[(parts, rows)](
        logits, largest, temperature, least, noise, states, best, where, size, *logits.stride(), parts, BLOCK,
        num_warps=8,
    )  # fmt: skip
    return where.gather(1, best.argmax(-1, keepdim=True))[:, 0]


def least_score(
    logits: Tensor, largest: Tensor, temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """`sampling.least_score`."""
    rows, size = logits.shape
    least = torch.empty(rows, device=logits.device)
    _least[(rows,)](
        logits, largest, temperature, log_min_p, top_k, top_p, least, size, *logits.stride(), BLOCK, num_warps=16
    )
    return least


@triton.jit
def _scores(logits, row, tokens, size, row_stride, token_stride, top, temperature):
    """Of some tokens of a row; -inf beyond its end."""
    given = tl.load(logits + row * row_stride + tokens * token_stride, tokens < size, other=-float("inf"))
    below = (given - top).to(tl.float32) if logits.dtype.element_ty == tl.float64 else given.to(tl.float32) - top
    return tl.div_rn(below, temperature + tl.zeros_like(below))


@triton.jit
def _top(largest, row):
    """Of a row; one that is not sound has none, and nothing is made of it."""
    top = tl.load(largest + row)
    if largest.dtype.element_ty != tl.float64:
        top = top.to(tl.float32)
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def _race(
    logits, largest, temperature, least, noise, states, best, where, size, row_stride, token_stride, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = part * BLOCK + tl.arange(0, BLOCK)
    top, by = _top(largest, row), tl.load(temperature + row)
    scores = _scores(logits, row, tokens, size, row_stride, token_stride, top, by)
    scores = tl.where(scores >= tl.load(least + row), scores, -float("inf"))
    drawn = _gumbel(tl.load(states + row).to(tl.uint64, bitcast=True), tokens)
    scores, index = tl.max(scores + drawn * tl.load(noise + row), 0, return_indices=True)
    tl.store(best + row * parts + part, scores)
    tl.store(where + row * parts + part, (part * BLOCK + index).to(tl.int64))


@triton.jit
def _gumbel(state, tokens):
    """`sampling.gumbel`."""
    bits = state + (tokens + 1).to(tl.uint64) * GOLDEN
    bits = (bits ^ (bits >> 30)) * FIRST
    bits = (bits ^ (bits >> 27)) * SECOND
    bits = bits ^ (bits >> 31)
    u = tl.minimum(((bits >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16, MOST_NOISE)  # 2**-53
    # -log(1 - u): the logarithm of a GPU has too few digits next to 1, so there is a series for small u.
    small = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -tl.log(tl.where(u < 0.03, small, -tl.log(1 - u)))


@triton.jit
def _least(
    logits, largest, temperature, log_min_p, top_k, top_p, least, size, row_stride, token_stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, by, k, p = _top(largest, row), tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    last = tl.abs(tl.load(log_min_p + row)).to(tl.int32, bitcast=True)  # bits of the last score that stays
    if k < size:
        found = 0
        for i in range(31):
            tried = found | (1 << (30 - i))
            better = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, size, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                scores = _scores(logits, row, tokens, size, row_stride, token_stride, top, by)
                better += (tl.abs(scores).to(tl.int32, bitcast=True) < tried).to(tl.int32)
            found = tl.where(tl.sum(better, 0) < k, tried, found)
        last = tl.minimum(last, found)
    if p < 1:
        every = _mass(logits, row, size, row_stride, token_stride, top, by, last + 1, BLOCK)
        share = p * every.to(tl.float64)
        found = 0
        for i in range(31):
            tried = found | (1 << (30 - i))
            better = _mass(logits, row, size, row_stride, token_stride, top, by, tl.minimum(tried, last + 1), BLOCK)
            found = tl.where(better.to(tl.float64) < share, tried, found)
        last = tl.minimum(last, found)
    tl.store(least + row, -last.to(tl.float32, bitcast=True))


@triton.jit
def _mass(logits, row, size, row_stride, token_stride, top, by, limit, BLOCK: tl.constexpr):
    """How probable the tokens are together whose score has bits below `limit`."""
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        scores = _scores(logits, row, tokens, size, row_stride, token_stride, top, by)
        counts = tl.abs(scores).to(tl.int32, bitcast=True) < limit
        mass += tl.where(counts, tl.exp(scores) * MASS, 0.0).to(tl.int64)
    return tl.sum(mass, 0)
