"""`kernels.fork`, and what `update.release` does to shared pages, in Triton: kernels and what is launched.

Every launch follows from sizes alone. Pages of a stream are only ever shared by the same streams of other rows, so one
program that looks at a stream of all rows meets nobody: there are no atomics, and the same calls free pages in the same
order.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kvpleat.kernels.device_pool import DevicePool

FREE = tl.constexpr(-1)  # as in device_pool.py
LOOKED_AT = 1024  # pages of a stream that one program looks at, at a time
COPIED = 16  # pages that one program copies, if they are to be


def copy(pool: DevicePool, sources: Tensor, targets: Tensor) -> None:
    """Copy pages to others; arguments as in `fork`."""
    arrays = (pool.arrays.get(name) for name in ("key", "value", "position", "log_weight", "score"))
    count, size = sources.numel(), pool.shape.page_size
    _copy[(triton.cdiv(count, COPIED),)](
        *arrays, sources.contiguous(), targets.contiguous(), count, S=size, SIZE=size * pool.shape.head_dim,
        BLOCK=min(2048, triton.next_power_of_2(size * pool.shape.head_dim)), B=COPIED)  # fmt: skip


def leave(pool: DevicePool, rows: Tensor) -> None:
    """Rows hold their pages no more; arguments as in `update.release`."""
    _, layers, heads, limit = pool.page_table.shape
    _leave[(layers * heads,)](
        rows, pool.holders, pool.num_pages, pool.page_table, rows.shape[0], layers * heads, limit,
        BLOCK=min(LOOKED_AT, triton.next_power_of_2(limit)))  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _copy(key, value, position, log_weight, score, sources, targets, count, S: tl.constexpr, SIZE: tl.constexpr,
          BLOCK: tl.constexpr, B: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * B
    entry = tl.arange(0, S)
    for n in range(begin, tl.minimum(begin + B, count)):
        from_ = tl.load(sources + n).to(tl.int64)
        if from_ != FREE:
            to = tl.load(targets + n).to(tl.int64)
            for start in tl.static_range(0, SIZE, BLOCK):
                i = start + tl.arange(0, BLOCK)
                tl.store(key + to * SIZE + i, tl.load(key + from_ * SIZE + i, mask=i < SIZE), mask=i < SIZE)
                tl.store(value + to * SIZE + i, tl.load(value + from_ * SIZE + i, mask=i < SIZE), mask=i < SIZE)
            if position is not None:
                tl.store(position + to * S + entry, tl.load(position + from_ * S + entry))
            if log_weight is not None:
                tl.store(log_weight + to * S + entry, tl.load(log_weight + from_ * S + entry))
            if score is not None:
                tl.store(score + to * S + entry, tl.load(score + from_ * S + entry))


@triton.jit(do_not_specialize=["count"])
def _leave(rows, holders, num_pages, page_table, count, streams, M, BLOCK: tl.constexpr):
    """One stream of the rows, one after the other: pages that others go on with leave its line, and what is left comes
    to the front."""
    stream = tl.program_id(0)
    for n in range(0, count):
        at = tl.load(rows + n).to(tl.int64) * streams + stream
        have, left = tl.load(num_pages + at), 0
        line = page_table + at * M
        for start in range(0, have, BLOCK):
            i = start + tl.arange(0, BLOCK)
            page = tl.load(line + i, mask=i < have, other=0)
            others = tl.load(holders + page, mask=i < have, other=1) - 1
            tl.debug_barrier()
            tl.store(holders + page, others, mask=i < have)
            tl.store(line + i, tl.full([BLOCK], FREE, tl.int32), mask=i < have)
            last = ((i < have) & (others == 0)).to(tl.int32)
            tl.debug_barrier()
            tl.store(line + left + tl.cumsum(last, 0) - 1, page, mask=last != 0)
            left += tl.sum(last)
            tl.debug_barrier()
        tl.store(num_pages + at, left)
