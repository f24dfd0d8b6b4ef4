"""The Triton kernels of `extend_triton`: what one program computes.

Two launches a layer. `leave` is one program a stream: what it decides, where everything goes, and the few entries of
the past that move. `settle` is one program a block of keys and a head: what is written. Programs of one launch change
different places, and none reads what another one changes.

Names: i and j count the keys of a chunk, the young ones of the past first; formed: the first of them, which are part of
a group by the chunk's end; place: which entry of its stream a key becomes, or NOWHERE.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from kvpleat.kernels.extend_groups_triton import form, raw
from kvpleat.kernels.prefill_kernels_triton import _block
from kvpleat.kernels.update_kernels_triton import LEAST_WEIGHT, _read, _slot

NOWHERE = tl.constexpr(-1)

# ---- entries that leave at moments or never


@triton.jit(do_not_specialize=["layer", "num_chunks"])
def append(key, value, position, log_weight, score, page_table, lengths, failed, new_key, new_value, seats, starts, new,
           past, layer, L, M, num_chunks, key_head, key_token, value_head, value_token, H: tl.constexpr,
           S: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """New tokens go behind the `past` [C, H] entries of a stream."""
    chunk, block = _block(new, tl.program_id(0), num_chunks, B, ROWS)
    head = tl.program_id(1).to(tl.int64)
    if chunk >= num_chunks:
        return
    begin = tl.load(new + chunk)
    count = tl.load(new + chunk + 1) - begin
    at = (tl.load(seats + chunk).to(tl.int64) * L + layer) * H + head
    length = tl.load(past + chunk * H + head)
    going = tl.load(failed) == 0
    i = block * B + tl.arange(0, B)
    on = i < tl.where(going, count, 0)
    slot, on = _slot(page_table, failed, at, length + i, on, M, S)
    channels = tl.arange(0, CHANNELS)[None, :]
    wide, token = on[:, None] & (channels < D), (begin + i).to(tl.int64)[:, None]
    to = slot[:, None] * D + channels
    keys = tl.load(new_key + head * key_head + token * key_token + channels, mask=wide, other=0.0)
    values = tl.load(new_value + head * value_head + token * value_token + channels, mask=wide, other=0.0)
    tl.store(key + to, keys, mask=wide)
    tl.store(value + to, values, mask=wide)
    if position is not None:
        tl.store(position + slot, tl.load(starts + chunk) + i, mask=on)
    if log_weight is not None:
        tl.store(log_weight + slot, tl.zeros([B], tl.float32), mask=on)
    if score is not None:
        tl.store(score + slot, tl.full([B], float("nan"), tl.float32), mask=on)
    if block == 0:  # one of the stream's programs, and none reads it
        tl.store(lengths + at, length + count, mask=going)


# ---- entries that leave one by one: what goes where


@triton.jit
def _mark(marked, said, ring, step, head, first, young, begin, num_new, i, on, RING: tl.constexpr,
          SINKS: tl.constexpr):  # fmt: skip
    """Whether keys i take over from the one before: the ring, which begins at `ring` and where tokens are `step` apart,
    says it of those of the past."""
    old = tl.load(marked + ring + ((first + i) % RING).to(tl.int64) * step, mask=on & (i < young), other=0) != 0
    new = tl.load(said + head * num_new + begin + i - young, mask=on & (i >= young), other=0) > 0
    return (old | new) & (first + i > SINKS)  # the first entries stay


@triton.jit
def _carried(log_carry, weight, said, said_carry, said_weight, ring, step, head, first, young, begin, num_new, i, on,
             H: tl.constexpr, RING: tl.constexpr, WEIGHS: tl.constexpr, LOGITS: tl.constexpr):  # fmt: skip
    """What else was decided about keys i: the log share that they take over, and their weights."""
    old, at = on & (i < young), ring + ((first + i) % RING).to(tl.int64) * step
    _, carry, share = _read(said, said_carry, said_weight, head * num_new + begin + i - young, H * num_new,
                            on & (i >= young), True, WEIGHS, LOGITS)  # fmt: skip
    carry = tl.where(old, tl.load(log_carry + at, mask=old, other=0.0), carry)
    if WEIGHS:
        share = tl.where(old, tl.load(weight + at, mask=old, other=0.0), share)
    return carry, share


@triton.jit(do_not_specialize=["layer", "num_new", "num_keys"])
def leave(key, value, log_weight, page_table, lengths, failed, slots, marked, log_carry, weight, members, member_carry,
          said, said_carry, said_weight, seats, starts, new, seen, raw_keys, raw_values, stays, places, carries, shares,
          before, before_carry, past, moves, layer, L, M, num_new, num_keys, H: tl.constexpr, S: tl.constexpr,
          D: tl.constexpr, CHANNELS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, LANES: tl.constexpr,
          WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr, MERGES: tl.constexpr, WEIGHS: tl.constexpr,
          LOGITS: tl.constexpr, COUNTED: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """One stream: young tokens are copied out, the last entries go where they were, and each key gets its place.

    Writes of [H, M]: stays; places; log shares of the group before (carries) and weights (shares). Of [C, H, ...]: the
    newest groups as they were (before, before_carry), and how many entries stay for good (past).
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, key_begin = tl.load(new + chunk), tl.load(seen + chunk)
    total = tl.load(seen + chunk + 1) - key_begin
    young = total - (tl.load(new + chunk + 1) - begin)
    first, seat = tl.load(starts + chunk) - young, tl.load(seats + chunk).to(tl.int64)
    at, stream = (seat * L + layer) * H + head, chunk * H + head
    length = tl.load(lengths + at)
    going = tl.load(failed) == 0
    if (total == 0) | (tl.load(failed) != 0):  # a row that was to be forked may have no ring yet
        tl.store(past + stream, length)
        return
    ring, step = (seat * RING * L + layer) * H + head, L * H
    lane = tl.arange(0, LANES)  # the newest group, and the young tokens behind it
    there = (lane <= young) & (first + lane > 0)
    ring_lane = ring + ((first + lane + RING - 1) % RING).to(tl.int64) * step
    entry = tl.load(slots + ring_lane, mask=there, other=0)
    newest = _mark(marked, said, ring, step, head, first, young, begin, num_new, tl.maximum(lane - 1, 0), there, RING,
                   SINKS)  # fmt: skip
    gone = there & ((lane > 0) | newest)  # the newest group leaves where the next token takes it over
    length -= tl.sum(gone.to(tl.int32))
    tl.store(past + stream, length)
    moves += stream * 3 * LANES
    holes = _plan(moves, entry, gone, length, lane, LANES)
    _move(key, value, log_weight, page_table, failed, slots, raw_keys, raw_values, moves, ring, step, at, first, young,
          tl.where(going, holes, 0), head * num_keys + key_begin, M, S, D, CHANNELS, RING, LANES, B)  # fmt: skip
    formed = tl.maximum(total - (RING - 1), 0)
    for n in range(0, total, COUNTED):
        i = n + tl.arange(0, COUNTED)
        on, out = i < total, head * num_keys + key_begin + i
        taken = _mark(marked, said, ring, step, head, first, young, begin, num_new, i + 1, i + 1 < total, RING,
                      SINKS)  # fmt: skip
        stay = (i < formed) & ~taken
        kept = (on & (stay | (i >= formed - 1))).to(tl.int32)  # nothing is decided about the newest group and after it
        tl.store(stays + out, stay.to(tl.uint8), mask=on)
        tl.store(places + out, tl.where(kept != 0, length + tl.cumsum(kept, 0) - 1, NOWHERE), mask=on)
        length += tl.sum(kept)
        if MERGES:
            mark = _mark(marked, said, ring, step, head, first, young, begin, num_new, i, on, RING, SINKS)
            carry, share = _carried(log_carry, weight, said, said_carry, said_weight, ring, step, head, first, young,
                                    begin, num_new, i, on, H, RING, WEIGHS, LOGITS)  # fmt: skip
            tl.store(carries + out, tl.where(mark, carry, float("-inf")), mask=on)
            if WEIGHS:
                tl.store(shares + out, tl.maximum(share, LEAST_WEIGHT), mask=on)
    if MERGES:
        kept = tl.where(first > 0, KNOWN, 0)  # what another sequence left in the seat does not count
        now = tl.where(going & (formed == 0), KNOWN, 0)
        sums, carried = members + at * KNOWN * WIDTH, member_carry + at * KNOWN
        _copy(sums, before + stream * KNOWN * WIDTH, kept * WIDTH, KNOWN * WIDTH, KNOWN * WIDTH)
        _copy(sums, sums, 0 * kept, now * WIDTH, KNOWN * WIDTH)
        if not SUMS:
            _copy(carried, before_carry + stream * KNOWN, kept, KNOWN, KNOWN)
            _copy(carried, carried, 0 * kept, now, KNOWN)
    last = tl.maximum(total - RING, 0) + lane  # the keys that the ring remembers from now on
    there = last < total
    marks = _mark(marked, said, ring, step, head, first, young, begin, num_new, last, there, RING, SINKS)
    if MERGES:
        carry, share = _carried(log_carry, weight, said, said_carry, said_weight, ring, step, head, first, young,
                                begin, num_new, last, there, H, RING, WEIGHS, LOGITS)  # fmt: skip
    tl.debug_barrier()
    there = last < tl.where(going, total, 0)
    ring_lane = ring + ((first + last) % RING).to(tl.int64) * step
    tl.store(slots + ring_lane, length - total + last, mask=there)
    tl.store(marked + ring_lane, marks.to(tl.uint8), mask=there)
    if MERGES:
        tl.store(log_carry + ring_lane, carry, mask=there)
    if WEIGHS:
        tl.store(weight + ring_lane, share, mask=there)
    tl.store(lengths + at, length, mask=going)


@triton.jit
def _plan(moves, entry, gone, length, lane, LANES: tl.constexpr):
    """Which entries beyond `length` go where others are gone before it: how many, and moves [3, LANES], of which the
    second line is where to and the third where from."""
    tl.store(moves + lane, tl.zeros([LANES], tl.int32))
    tl.debug_barrier()
    tl.store(moves + entry - length, tl.full([LANES], 1, tl.int32), mask=gone & (entry >= length))
    tl.debug_barrier()
    moved = ((lane < tl.sum(gone.to(tl.int32))) & (tl.load(moves + lane) == 0)).to(tl.int32)
    hole = (gone & (entry < length)).to(tl.int32)
    tl.store(moves + LANES + tl.cumsum(hole, 0) - 1, entry, mask=hole != 0)
    tl.store(moves + 2 * LANES + tl.cumsum(moved, 0) - 1, length + lane, mask=moved != 0)
    return tl.sum(hole)


@triton.jit
def _move(key, value, log_weight, page_table, failed, slots, raw_keys, raw_values, moves, ring, step, at, first, young,
          holes, out, M, S: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, RING: tl.constexpr,
          LANES: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Young tokens go to `out` of the raw ones, B at a time, and then moves take place."""
    channels = tl.arange(0, CHANNELS)[None, :]
    for n in range(0, young, B):
        i = n + tl.arange(0, B)
        place = ring + ((first + i) % RING).to(tl.int64) * step
        slot, on = _slot(page_table, failed, at, tl.load(slots + place, mask=i < young, other=0), i < young, M, S)
        wide, from_ = on[:, None] & (channels < D), slot[:, None] * D + channels
        to = (out + i)[:, None] * D + channels
        tl.store(raw_keys + to, tl.load(key + from_, mask=wide, other=0.0), mask=wide)
        tl.store(raw_values + to, tl.load(value + from_, mask=wide, other=0.0), mask=wide)
    tl.debug_barrier()
    for n in range(0, holes, B):
        i = n + tl.arange(0, B)
        on = i < holes
        to, on = _slot(page_table, failed, at, tl.load(moves + LANES + i, mask=on, other=0), on, M, S)
        from_, on = _slot(page_table, failed, at, tl.load(moves + 2 * LANES + i, mask=on, other=0), on, M, S)
        wide, old, new = on[:, None] & (channels < D), from_[:, None] * D + channels, to[:, None] * D + channels
        tl.store(key + new, tl.load(key + old, mask=wide, other=0.0), mask=wide)
        tl.store(value + new, tl.load(value + old, mask=wide, other=0.0), mask=wide)
        if log_weight is not None:
            tl.store(log_weight + to, tl.load(log_weight + from_, mask=on, other=0.0), mask=on)


@triton.jit
def _copy(from_, to, there, count, size: tl.constexpr):
    """`count` numbers, at most `size`; of these 0 from number `there` on."""
    for n in range(0, size, 256):
        i = n + tl.arange(0, 256)
        tl.store(to + i, tl.load(from_ + i, mask=i < there, other=0.0), mask=i < count)


# ---- entries that leave one by one: what is written


@triton.jit(do_not_specialize=["layer", "num_chunks", "num_keys"])
def settle(key, value, log_weight, page_table, failed, members, member_carry, keys, values, cos, sin, seats, new, seen,
           raw_keys, raw_values, group_keys, group_values, log_size, places, carries, shares, before, before_carry,
           layer, L, M, num_chunks, num_keys, key_head, key_token, value_head, value_token, H: tl.constexpr,
           S: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, RING: tl.constexpr,
           WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr, MERGES: tl.constexpr, WEIGHS: tl.constexpr,
           B: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Keys go to the raw ones, or form groups, and what is kept goes to the pages."""
    chunk, block = _block(seen, tl.program_id(0), num_chunks, B, ROWS)
    head = tl.program_id(1).to(tl.int64)
    if (chunk >= num_chunks) | (tl.load(failed) != 0):
        return
    begin, key_begin = tl.load(new + chunk), tl.load(seen + chunk)
    total = tl.load(seen + chunk + 1) - key_begin
    young = total - (tl.load(new + chunk + 1) - begin)
    at = (tl.load(seats + chunk).to(tl.int64) * L + layer) * H + head
    own, new_begin = head * num_keys + key_begin, (begin - young).to(tl.int64)
    raw_keys, raw_values = raw_keys + own * D, raw_values + own * D
    keys, values = keys + head * key_head + new_begin * key_token, values + head * value_head + new_begin * value_token
    i, channel = block * B + tl.arange(0, B), tl.arange(0, CHANNELS)[None, :]
    on = i < total
    wide, to = on[:, None] & (channel < D), i[:, None] * D + channel
    k = raw(keys, raw_keys, young, i[:, None], channel, wide, key_token, D)
    v = raw(values, raw_values, young, i[:, None], channel, wide, value_token, D)
    place = tl.load(places + own + i, mask=on, other=NOWHERE)
    going = tl.load(failed) == 0
    tl.store(raw_keys + to, k, mask=wide & (i >= young)[:, None])
    tl.store(raw_values + to, v, mask=wide & (i >= young)[:, None])
    size = tl.full([B], 1.0, tl.float32)
    if MERGES:
        formed = tl.maximum(total - (RING - 1), 0)
        cos, sin = cos + key_begin.to(tl.int64) * HALF, sin + key_begin.to(tl.int64) * HALF
        stream = (chunk * H + head) * KNOWN
        k, v, size = form(keys, values, raw_keys, raw_values, cos, sin, carries + own, shares + own,
                          before + stream * WIDTH, before_carry + stream, members + at * KNOWN * WIDTH,
                          member_carry + at * KNOWN, k, v, young, block, formed, going, key_token, value_token, D,
                          CHANNELS, HALF, WIDTH, KNOWN, SUMS, WEIGHS, B)  # fmt: skip
        there = wide & (i < formed)[:, None]
        tl.store(group_keys + own * D + to, k, mask=there)
        tl.store(group_values + own * D + to, v, mask=there)
    if log_weight is not None:
        tl.store(log_size + own + i, tl.log(size), mask=on)
    on = i < tl.where(going, total, 0)
    slot, on = _slot(page_table, failed, at, tl.maximum(place, 0), on & (place >= 0), M, S)
    wide, to = on[:, None] & (channel < D), slot[:, None] * D + channel
    tl.store(key + to, k, mask=wide)
    tl.store(value + to, v, mask=wide)
    if log_weight is not None:
        tl.store(log_weight + slot, tl.log(size), mask=on)
