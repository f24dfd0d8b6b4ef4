"""The Triton kernels of `decode_triton`: what one program computes. Shapes and words: `decode.Work`."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)
SHARE = tl.constexpr(8)  # numbers of a share
# Tables of different layers begin anywhere: code that relies on where would be compiled several times over.
ONE_CODE = {
    "do_not_specialize": ["streams", "ahead", "steps", "capacity"],
    "do_not_specialize_on_alignment": ["table", "lengths", "active", "seats", "starts", "tiles", "shares", "arrivals"],
}


@triton.jit
def _find(starts, page, streams, steps):
    """The stream that a page lies in: the last one that starts at it or before."""
    low = tl.zeros_like(page)
    high = low + streams
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= page
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _row(z, active, seats, here, H: tl.constexpr):
    """The row of the pool of stream z of a batch, where it is `here`: with seats, 0 if it has no token."""
    row = z // H
    if seats is not None:
        seat = tl.load(seats + row, mask=here, other=0)
        if active is not None:  # else the seat may be any number
            seat = tl.where(tl.load(active + row, mask=here, other=0), seat, 0)
        row = seat
    return row.to(tl.int64)


@triton.jit(**ONE_CODE)
def plan(lengths, active, seats, starts, tiles, shares, streams, ahead, steps, row, layer, head, room, programs,
         H: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
         PROGRAMS: tl.constexpr):  # fmt: skip
    """One layer: pages and tiles before each stream, then the share of each program."""
    number = tl.program_id(0).to(tl.int64)
    lengths += number * layer
    starts += number * room
    tiles += number * room
    pages_before = 0
    tiles_before = 0
    for first in range(0, streams, BLOCK):
        z = first + tl.arange(0, BLOCK)
        here = z < streams
        length = tl.load(lengths + _row(z, active, seats, here, H) * row + z % H * head, mask=here, other=0)
        pages = tl.maximum(tl.cdiv(length + ahead, S), 1)  # zeros have to be written where there is nothing
        if active is not None:  # rows without a token: zeros are written as well, but they are nobody's share
            pages = tl.where(tl.load(active + z // H, mask=here, other=0), pages, 0)
        pages = tl.where(here, pages, 0)
        count = tl.where(here, tl.maximum(tl.cdiv(pages, TILE), 1), 0)  # who walks over one needs a step for it
        tl.store(starts + z, pages_before + tl.cumsum(pages, 0) - pages, mask=here)
        tl.store(tiles + z, tiles_before + tl.cumsum(count, 0) - count, mask=here)
        pages_before += tl.sum(pages, 0)
        tiles_before += tl.sum(count, 0)
    tl.store(starts + streams, pages_before)
    tl.store(tiles + streams, tiles_before)
    tl.debug_barrier()  # what other threads stored is read below
    program = tl.arange(0, PROGRAMS)
    inside = program < programs
    each, more = pages_before // programs, pages_before % programs
    low = program * each + tl.minimum(program, more)
    high = low + each + tl.where(program < more, 1, 0)
    work = inside & (low < high)
    z = _find(starts, tl.where(work, low, 0), streams, steps)
    last = _find(starts, tl.where(work, high - 1, 0), streams, steps)
    begin, stop = tl.load(starts + z), tl.load(starts + z + 1)
    between = tl.load(tiles + last) - tl.load(tiles + z + 1)
    several = tl.cdiv(stop - low, TILE) + between + tl.cdiv(high - tl.load(starts + last), TILE)
    count = tl.where(z == last, tl.cdiv(high - low, TILE), several)
    share = shares + (number * programs + program) * SHARE
    tl.store(share, tl.where(work, z, 0), mask=inside)
    tl.store(share + 1, tl.where(work, begin, 0), mask=inside)
    tl.store(share + 2, tl.where(work, stop, 0), mask=inside)
    tl.store(share + 3, tl.where(work, low, 0), mask=inside)
    tl.store(share + 4, tl.where(work, high, 0), mask=inside)
    tl.store(share + 5, tl.where(work, count, 0), mask=inside)
    tl.store(share + 6, pages_before, mask=inside)


@triton.jit
def _stream(table, lengths, active, seats, z, place, capacity, table_row, table_head, lengths_row, lengths_head,
            H: tl.constexpr, S: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[N] page of each of N entries of stream z, from its page `place` on; and how many entries it has."""
    row, head = _row(z, active, seats, True, H), z % H
    places = place + tl.arange(0, N) // S
    pages = tl.load(table + row * table_row + head * table_head + places, mask=places < capacity, other=0)
    length = tl.load(lengths + row * lengths_row + head * lengths_head)
    if active is not None:
        length = tl.where(tl.load(active + z // H), length, 0)
    return pages, length


@triton.jit
def _scores(q, keys, log_weight, slots, live, scale, softcap, PRECISION: tl.constexpr):
    """Logits (base 2) [group, N]."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if softcap is not None:
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))  # tanh
    scores *= LOG2_E
    if log_weight is not None:
        scores += (tl.load(log_weight + slots, mask=live, other=0.0) * LOG2_E)[None, :]
    return tl.where(live[None, :], scores, float("-inf"))


@triton.jit
def _store(z, top, total, acc, out, lse, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
           CHANNELS: tl.constexpr):  # fmt: skip
    """A finished stream. Where nothing was seen, zeros."""
    group, channels = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    safe = tl.where(total == 0.0, 1.0, total)
    heads = z.to(tl.int64) * G + group
    here = (group < G)[:, None] & (channels < D)[None, :]
    tl.store(out + heads[:, None] * D + channels[None, :], (acc / safe[:, None]).to(out.dtype.element_ty), mask=here)
    if lse is not None:
        tl.store(lse + heads, top + tl.log2(safe), mask=group < G)


@triton.jit
def _program_of(page, each, more):
    """The program in whose share a page is: the first `more` of them have one page more than `each`."""
    longer = more * (each + 1)
    return tl.where(page < longer, page // (each + 1), more + (page - longer) // tl.maximum(each, 1))


@triton.jit
def _combine(z, begin, stop, before, all_pages, arrivals, parts, peaks, out, lse, H: tl.constexpr, G: tl.constexpr,
             D: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Put the parts of a stream together, if none is missing: `before` were written before this program's."""
    each, more = all_pages // tl.num_programs(0), all_pages % tl.num_programs(0)
    first = _program_of(begin, each, more)
    count = _program_of(stop - 1, each, more) - first + 1
    if before == count - 1:
        tl.store(arrivals + z, 0)  # for the next call
        late = tl.where(begin > first * each + tl.minimum(first, more), 1, 0)
        group, channels = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
        top = tl.full([GROUP], float("-inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        acc = tl.zeros([GROUP, CHANNELS], tl.float32)
        for n in range(0, count, PIECES):
            for i in tl.static_range(PIECES):  # loads of all of them are under way at the same time
                piece = n + i
                at = ((first + piece) * 2 + tl.where(piece == 0, late, 0)) * G + group
                here = tl.where(piece < count, group, G) < G
                # .cg: other programs wrote this, so it is read where all of them see it.
                peak = tl.load(peaks + at * 2, mask=here, other=float("-inf"), cache_modifier=".cg")
                weight = tl.load(peaks + at * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
                here = here[:, None] & (channels < D)[None, :]
                numbers = at[:, None] * D + channels[None, :]
                part = tl.load(parts + numbers, mask=here, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(top, peak)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                factor = tl.exp2(peak - base)
                shrink = tl.exp2(top - base)
                total = total * shrink + weight * factor
                acc = acc * shrink[:, None] + part * factor[:, None]
                top = higher
        _store(z, top, total, acc, out, lse, H, G, D, GROUP, CHANNELS)


@triton.jit(**ONE_CODE)
def attend(q, keys, values, log_weight, table, lengths, active, seats, starts, shares, arrivals, parts, peaks, out,
           lse, scale, softcap, streams, capacity, q_row, q_head, table_row, table_head, lengths_row, lengths_head,
           H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
           CHANNELS: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """The share of one program, a tile of N entries at a time."""
    if EARLY:
        gdc_wait()  # until the kernel before this one has ended
    program = tl.program_id(0)
    shares += program * SHARE
    z, begin, stop = tl.load(shares), tl.load(shares + 1), tl.load(shares + 2)
    low, high, tiles, all_pages = tl.load(shares + 3), tl.load(shares + 4), tl.load(shares + 5), tl.load(shares + 6)
    first, first_begin, first_stop, at = z, begin, stop, low
    group, channels = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    seen = (group < G)[:, None] & (channels < D)[None, :]
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP, N], tl.float32)  # added up where a stream ends, not in every tile
    acc = tl.zeros([GROUP, CHANNELS], tl.float32)
    if active is not None:
        for turn in range(0, tl.cdiv(streams // H, tl.num_programs(0))):
            row = program + turn * tl.num_programs(0)
            if tl.load(active + row, mask=row < streams // H, other=1) == 0:
                for head in range(H):
                    _store(row * H + head, top, tl.sum(total, axis=1), acc, out, lse, H, G, D, GROUP, CHANNELS)
    # What says where the next tile lies is read while this one is computed, so nothing waits for it.
    pages, length = _stream(table, lengths, active, seats, z, at - begin, capacity, table_row, table_head,
                            lengths_row, lengths_head, H, S, N)  # fmt: skip
    for _ in range(tiles):
        end = tl.minimum(stop, high)
        entries = (at - begin) * S + tl.arange(0, N)
        live = entries < tl.minimum(length, (end - begin) * S)
        here = live[:, None] & (channels < D)[None, :]
        slots = pages.to(tl.int64) * S + tl.arange(0, N) % S
        numbers = slots[:, None] * D + channels[None, :]
        query = (z // H).to(tl.int64) * q_row + (z % H * G + group)[:, None] * q_head + channels[None, :]
        queries = tl.load(q + query, mask=seen, other=0.0)
        k = tl.load(keys + numbers, mask=here, other=0.0)
        scores = _scores(queries, k, log_weight, slots, live, scale, softcap, PRECISION)
        fresh = (at == low) | (at == begin)
        top = tl.where(fresh, float("-inf"), top)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = tl.where(fresh, 0.0, total * shrink[:, None]) + weights
        v = tl.load(values + numbers, mask=here, other=0.0)
        acc = tl.where(fresh, 0.0, acc * shrink[:, None])
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = higher
        at = tl.minimum(at + N // S, end)
        if at == end:
            summed = tl.sum(total, axis=1)
            # More entries than were planned for would be left out without a word: not a number instead.
            summed = tl.where((at == stop) & (length > (stop - begin) * S), float("nan"), summed)
            if (begin >= low) & (stop <= high):
                _store(z, top, summed, acc, out, lse, H, G, D, GROUP, CHANNELS)
            else:
                part = (program * 2 + tl.where(begin > low, 1, 0)) * G + group
                tl.store(peaks + part * 2, top, mask=group < G)
                tl.store(peaks + part * 2 + 1, summed, mask=group < G)
                tl.store(parts + part[:, None] * D + channels[None, :], acc, mask=seen)
        z, begin = tl.where(at == stop, z + 1, z), tl.where(at == stop, stop, begin)
        stop = tl.load(starts + tl.minimum(z + 1, streams))
        pages, length = _stream(table, lengths, active, seats, tl.minimum(z, streams - 1), at - begin, capacity,
                                table_row, table_head, lengths_row, lengths_head, H, S, N)  # fmt: skip
    if EARLY:
        gdc_launch_dependents()  # the next kernel may come in; it waits for the end of this one as well
    # The first stream may have begun in the share before this one, the last one may go on in the next.
    first_split, last_split = (first_begin < low) | (first_stop > high), (first_stop < high) & (begin < high)
    if first_split | last_split:
        tl.debug_barrier()  # all threads of the program have written their parts
        sides = tl.arange(0, 2)
        split = tl.where(sides == 0, first_split, last_split) != 0
        arrived = tl.atomic_add(arrivals + tl.where(sides == 0, first, z), 1, mask=split)
        ROWS: tl.constexpr = triton.next_power_of_2(G)  # nothing is multiplied any more: no 16 rows
        for side in range(2):
            if ((side == 0) & first_split) | ((side == 1) & last_split):
                before = tl.sum(tl.where(sides == side, arrived, 0))
                number, start = tl.where(side == 0, first, z), tl.where(side == 0, first_begin, begin)
                _combine(number, start, tl.where(side == 0, first_stop, stop), before, all_pages, arrivals, parts,
                         peaks, out, lse, H, G, D, ROWS, CHANNELS, PIECES)  # fmt: skip


@triton.jit(**ONE_CODE)
def mass_received(q, keys, log_weight, table, lengths, active, seats, starts, shares, lse, mass, scale, softcap,
                  streams, capacity, q_row, q_head, table_row, table_head, lengths_row, lengths_head, H: tl.constexpr,
                  G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
                  CHANNELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The walk of `attend` over keys alone: probabilities, from the sums that it left."""
    shares += tl.program_id(0) * SHARE
    z, begin, stop = tl.load(shares), tl.load(shares + 1), tl.load(shares + 2)
    low, high, tiles = tl.load(shares + 3), tl.load(shares + 4), tl.load(shares + 5)
    group, channels = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    seen = (group < G)[:, None] & (channels < D)[None, :]
    at = low
    pages, length = _stream(table, lengths, active, seats, z, at - begin, capacity, table_row, table_head,
                            lengths_row, lengths_head, H, S, N)  # fmt: skip
    for _ in range(tiles):
        end = tl.minimum(stop, high)
        entries = (at - begin) * S + tl.arange(0, N)
        live = entries < tl.minimum(length, (end - begin) * S)
        here = live[:, None] & (channels < D)[None, :]
        slots = pages.to(tl.int64) * S + tl.arange(0, N) % S
        query = (z // H).to(tl.int64) * q_row + (z % H * G + group)[:, None] * q_head + channels[None, :]
        queries = tl.load(q + query, mask=seen, other=0.0)
        k = tl.load(keys + slots[:, None] * D + channels[None, :], mask=here, other=0.0)
        scores = _scores(queries, k, log_weight, slots, live, scale, softcap, PRECISION)
        logs = tl.load(lse + z.to(tl.int64) * G + group, mask=group < G, other=float("inf"))
        probability = tl.exp2(scores - tl.where(logs == float("-inf"), 0.0, logs)[:, None])
        tl.store(mass + slots, tl.sum(probability, axis=0), mask=live)
        at = tl.minimum(at + N // S, end)
        z, begin = tl.where(at == stop, z + 1, z), tl.where(at == stop, stop, begin)
        stop = tl.load(starts + tl.minimum(z + 1, streams))
        pages, length = _stream(table, lengths, active, seats, tl.minimum(z, streams - 1), at - begin, capacity,
                                table_row, table_head, lengths_row, lengths_head, H, S, N)  # fmt: skip
