"""`kernels.sampling` in Triton: what is launched. The kernels are in sampling_kernels_triton.py.

A row is cut into parts of BLOCK tokens, so that a single row fills a GPU too. Logits are read once by `highest`, once
by `race` and three times by `least_score`, rows without filters not at all there.
"""

import torch
import triton
from torch import Tensor

from kvpleat.kernels import sampling_kernels_triton as kernels

BLOCK = 4096  # tokens of a part
ROUNDS = 2  # of `look`
ROOM = 8192  # tokens of a row that `find` can be left with; if there are more, it is slow
FOUND = 2048  # of which it looks at so many at a time
WARPS = 8


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`sampling.highest`; arguments as there."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    best, where, parts = _room(logits, wide)
    kernels.highest[parts, logits.shape[0]](
        logits, best, where, logits.shape[1], *logits.stride(), parts, BLOCK, num_warps=WARPS
    )
    values = logits.new_empty(logits.shape[0])
    return values, _winner(best, where, values)


def race(logits: Tensor, largest: Tensor, temperature: Tensor, least: Tensor, noise: Tensor, states: Tensor) -> Tensor:
    """`sampling.race`, where states [n] int64 stand for seeds and counters."""
    best, where, parts = _room(logits, torch.float32)
    kernels.race[parts, logits.shape[0]](
        logits, largest, temperature, least, noise, states, best, where, logits.shape[1], *logits.stride(), parts,
        BLOCK, COARSE=torch.version.cuda is not None and logits.is_cuda, num_warps=WARPS,
    )  # fmt: skip
    return _winner(best, where, None)


def least_score(
    logits: Tensor, largest: Tensor, temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """`sampling.least_score`."""
    (rows, size), device = logits.shape, logits.device
    parts = triton.cdiv(size, BLOCK)
    given = logits, largest, temperature, log_min_p, top_k, top_p
    counts = torch.empty(ROUNDS, rows, parts, kernels.PIVOTS.value, dtype=torch.int32, device=device)
    masses = torch.empty(counts.shape, device=device)
    used = torch.empty(rows, dtype=torch.int32, device=device)
    sums = torch.empty(rows, parts, 3, dtype=torch.int64, device=device)
    inside = torch.empty(rows, ROOM, dtype=torch.int32, device=device)
    least = torch.empty(rows, device=device)
    sizes, compiled_for = (size, *logits.stride(), parts), {"PARTS": triton.next_power_of_2(parts), "num_warps": WARPS}
    for i in range(ROUNDS):
        kernels.look[parts, rows](*given, counts, masses, used, *sizes, BLOCK=BLOCK, ROUND=i, **compiled_for)
    kernels.collect[parts, rows](
        *given, counts, masses, used, sums, inside, *sizes, ROOM, BLOCK=BLOCK, ROUNDS=ROUNDS, **compiled_for
    )
    kernels.find[1, rows](
        *given, counts, masses, used, sums, inside, least, *sizes, ROOM, BLOCK=FOUND, ROUNDS=ROUNDS, **compiled_for
    )
    return least


def _room(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """For the best of each part, where it is, and how many parts there are."""
    rows, parts = logits.shape[0], triton.cdiv(logits.shape[1], BLOCK)
    best = torch.empty(rows, parts, dtype=dtype, device=logits.device)
    return best, torch.empty(rows, parts, dtype=torch.int32, device=logits.device), parts


def _winner(best: Tensor, where: Tensor, values: Tensor | None) -> Tensor:
    """The best of all parts: the token it is; and how good it is, if there are `values` to write that to."""
    rows, parts = best.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=best.device)
    kernels.winner[(rows,)](best, where, values, tokens, parts, triton.next_power_of_2(parts), num_warps=1)
    return tokens
