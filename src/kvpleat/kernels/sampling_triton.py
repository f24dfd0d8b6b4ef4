"""`kernels.sampling` in Triton: what is launched. The kernels are in sampling_kernels_triton.py.

A row is cut into parts of BLOCK tokens, so that a single row fills a GPU too. Logits are read once by `highest`, once
by `race` and three times by `least_score`, rows without filters not at all there. Everything is launched whatever the
logits are, so that graphs can hold it.
"""

import torch
import triton
from torch import Tensor

from kvpleat.kernels import sampling_kernels_triton as kernels

BLOCK = 4096  # tokens of a part; of `race`, where much comes before the first one, twice as many
RUNGS = 512  # of a ladder: two rounds of `look` leave 1 / 81 of them, and of the tokens
ROUNDS = 2
ROOM = 32768  # tokens of a row that `find` can be left with; if there are more, it is slow
FOUND = 4096  # of which it looks at so many at a time
CHUNK = 1024  # tokens of a part that `race` looks at at a time
WARPS = 8


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`sampling.highest`; arguments as there."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    best, where, parts = _room(logits, wide, BLOCK)
    kernels.highest[parts, logits.shape[0]](
        logits, best, where, logits.shape[1], *logits.stride(), parts, BLOCK, num_warps=WARPS
    )
    values = logits.new_empty(logits.shape[0])
    return values, _winner(best, where, values)


def race(logits: Tensor, largest: Tensor, temperature: Tensor, least: Tensor, noise: Tensor, states: Tensor) -> Tensor:
    """`sampling.race`, where states [n] int64 stand for seeds and counters."""
    best, where, parts = _room(logits, torch.float32, 2 * BLOCK)
    kernels.race[parts, logits.shape[0]](
        logits, largest, temperature, least, noise, states, best, where, logits.shape[1], *logits.stride(), parts,
        2 * BLOCK, min(CHUNK, BLOCK), COARSE=torch.version.cuda is not None and logits.is_cuda, num_warps=WARPS,
    )  # fmt: skip
    return _winner(best, where, None)


def least_score(
    logits: Tensor, largest: Tensor, temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """`sampling.least_score`."""
    (rows, size), device = logits.shape, logits.device
    parts = triton.cdiv(size, BLOCK)
    rungs, pivots, brackets, inside = (
        torch.empty(rows, columns, dtype=torch.int32, device=device)
        for columns in (RUNGS + 1, kernels.PIVOTS.value, 2, ROOM)
    )
    amounts, wanted, least = (
        torch.empty(rows, *shape, device=device) for shape in ((parts, kernels.PIVOTS.value), (), ())
    )
    used = torch.empty(rows, dtype=torch.int32, device=device)
    sums = torch.empty(rows, parts, 3, dtype=torch.int64, device=device)
    asked, sizes, padded = (largest, temperature), (size, *logits.stride()), triton.next_power_of_2(parts)
    filters, found = (top_k, top_p), (rungs, brackets, used, sums, inside)
    kernels.ladder[(rows,)](logits, *asked, log_min_p, *filters, rungs, used, *sizes, RUNGS=RUNGS, num_warps=4)
    step = RUNGS // kernels.PIVOTS.value
    for i in range(ROUNDS):
        at = pivots if i else rungs[:, step::step]
        kernels.look[parts, rows](
            logits, *asked, *filters, at, amounts, *sizes, parts, *at.stride(), BLOCK=BLOCK, num_warps=WARPS // 2
        )
        kernels.narrow[(rows,)](
            *asked, *filters, rungs, at, amounts, wanted, brackets, pivots, size, parts, *at.stride(),
            PARTS=padded, RUNGS=RUNGS, ROUND=i, num_warps=4,
        )  # fmt: skip
    kernels.collect[parts, rows](
        logits, *asked, *filters, *found, *sizes, parts, ROOM, BLOCK=BLOCK, RUNGS=RUNGS, num_warps=WARPS
    )
    kernels.find[(rows,)](
        logits, *asked, log_min_p, *filters, *found, least, *sizes, parts, ROOM,
        BLOCK=FOUND, PARTS=padded, RUNGS=RUNGS, num_warps=2 * WARPS,
    )  # fmt: skip
    return least


def _room(logits: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor, int]:
    """For the best of each part, where it is, and how many parts there are."""
    rows, parts = logits.shape[0], triton.cdiv(logits.shape[1], block)
    best = torch.empty(rows, parts, dtype=dtype, device=logits.device)
    return best, torch.empty(rows, parts, dtype=torch.int32, device=logits.device), parts


def _winner(best: Tensor, where: Tensor, values: Tensor | None) -> Tensor:
    """The best of all parts: the token it is; and how good it is, if there are `values` to write that to."""
    rows, parts = best.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=best.device)
    kernels.winner[(rows,)](best, where, values, tokens, parts, triton.next_power_of_2(parts), num_warps=1)
    return tokens
