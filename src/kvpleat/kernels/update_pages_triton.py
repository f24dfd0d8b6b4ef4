"""The Triton kernels of `update_triton` that hand out pages: what one program computes.

No program reads what another one changes in the same launch, as in update_kernels_triton.py.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

TOKEN, COUNTS, GIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # which pages change hands, and why
FREE = tl.constexpr(-1)  # as in device_pool.py
MOST = tl.constexpr(2**31 - 1)


@triton.jit
def _row(seats, active, number, streams):
    """The row of the pool that row `number` of a batch is, and its streams that may change: with seats, none of a row
    without a token, whose seat may be any number."""
    row = number
    if seats is not None:
        on = tl.load(active + number) != 0
        row, streams = tl.where(on, tl.load(seats + number), 0).to(tl.int64), tl.where(on, streams, 0)
    return row, streams


@triton.jit
def _change(lengths, num_pages, marked, counts, positions, active, number, row, stream, streams,
            RING: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """How many pages streams of a row take or give back, and how many they have."""
    inside = stream < streams
    at = row * streams + stream
    length = tl.load(lengths + at, mask=inside, other=0)
    have = tl.load(num_pages + at, mask=inside, other=0)
    if MODE == GIVE:
        more = 0 * length
    elif MODE == COUNTS:
        more = tl.load(counts + at, mask=inside, other=0)
    else:
        more = tl.where(inside, tl.load(active + number).to(tl.int32), 0)
        if RING > 1:  # what is due now was marked earlier
            oldest = (tl.load(positions + number) + 1) % RING
            due = tl.load(marked + (row * RING + oldest) * streams + stream, mask=inside, other=0)
            more = tl.where(due != 0, 0, more)
    missing = (length + more + S - 1) // S - have
    return tl.maximum(-missing if MODE == GIVE else missing, 0), have


@triton.jit
def count(lengths, num_pages, marked, counts, positions, active, seats, row_pages, streams, M, P,
          RING: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Pages that each row takes or gives back."""
    number = tl.program_id(0).to(tl.int64)
    row, streams = _row(seats, active, number, streams)
    total, longest = 0, 0
    for start in range(0, streams, BLOCK):
        stream = start + tl.arange(0, BLOCK)
        change, have = _change(
            lengths, num_pages, marked, counts, positions, active, number, row, stream, streams, RING, S, MODE
        )
        total += tl.sum(change)
        longest = tl.maximum(longest, tl.max(have + change))
    if MODE != GIVE:  # a stream that outgrows its line of the table asks for more than there is
        total = tl.where(longest > M, P + 1, total)
    tl.store(row_pages + number, total)


@triton.jit
def share(row_pages, free_count, failed, R, ROWS: tl.constexpr, MODE: tl.constexpr):
    """Where each row's share of the free pages lies: below it those to take, above it the room for those given back."""
    rows = tl.arange(0, ROWS)
    pages = tl.load(row_pages + rows, mask=rows < R, other=0).to(tl.int64)
    free, short = tl.load(free_count), tl.load(failed)
    before, total = tl.cumsum(pages, 0) - pages, tl.sum(pages)
    tl.debug_barrier()
    if MODE == GIVE:
        tl.store(row_pages + rows, (free + before).to(tl.int32), mask=rows < R)
        tl.store(free_count, (free + total).to(tl.int32))
    else:
        missing = tl.minimum(tl.maximum(total - free, 0), MOST).to(tl.int32)
        short = tl.where(short != 0, short, missing)
        tl.store(failed, short)
        tl.store(row_pages + rows, (free - before).to(tl.int32), mask=rows < R)
        tl.store(free_count, tl.where(short != 0, free, free - total).to(tl.int32))


@triton.jit
def settle(lengths, num_pages, marked, counts, positions, active, seats, row_pages, free_pages, page_table, holders,
           failed, streams, M, RING: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
           J: tl.constexpr):  # fmt: skip
    """The pages of each row change hands, J of each stream at a time."""
    number = tl.program_id(0).to(tl.int64)
    row, streams = _row(seats, active, number, streams)
    base = tl.load(row_pages + number)
    going = 1 if MODE == GIVE else (tl.load(failed) == 0).to(tl.int32)
    for start in range(0, streams, BLOCK):
        stream = start + tl.arange(0, BLOCK)
        change, have = _change(
            lengths, num_pages, marked, counts, positions, active, number, row, stream, streams, RING, S, MODE
        )
        change *= going
        before = tl.cumsum(change, 0) - change
        line = page_table + (row * streams + stream)[:, None] * M
        for first in range(0, tl.max(change), J):
            nth = first + tl.arange(0, J)[None, :]
            mask = nth < change[:, None]
            if MODE == GIVE:
                at = line + have[:, None] - 1 - nth
                page = tl.load(at, mask=mask, other=0)
                tl.debug_barrier()
                tl.store(free_pages + base + before[:, None] + nth, page, mask=mask)
                tl.store(at, tl.full(page.shape, FREE, tl.int32), mask=mask)
                tl.store(holders + page, tl.zeros(page.shape, tl.int32), mask=mask)
            else:
                page = tl.load(free_pages + base - 1 - before[:, None] - nth, mask=mask, other=0)
                tl.store(line + have[:, None] + nth, page, mask=mask)
                tl.store(holders + page, tl.full(page.shape, 1, tl.int32), mask=mask)
        total = tl.sum(change)
        tl.debug_barrier()
        if MODE == GIVE:
            tl.store(num_pages + row * streams + stream, have - change, mask=stream < streams)
            base += total
        else:
            tl.store(num_pages + row * streams + stream, have + change, mask=stream < streams)
            base -= total
