"""The Triton kernels of `update_triton`: what one program computes. Those that hand out pages: update_pages_triton.py.

A state that a program reads and then changes (a length, a place in the ring) may be read by several warps of it, so a
barrier stands between its last read and its first change. Programs change different streams, and no program reads what
another one changes in the same launch: the order of programs is of no consequence, and there are no atomics.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

EMPTY, FREE = tl.constexpr(-1), tl.constexpr(-1)  # as in device_pool.py
LEAST_WEIGHT = tl.constexpr(1e-20)  # as in pooling.py

# ---- one token of every row: all that can be read is read before anything is written, so that reads overlap


@triton.jit
def _streams(seats, active, failed, R, H: tl.constexpr, B: tl.constexpr):
    """B streams of a layer: rows of the batch, rows of the pool, heads, which of them there are, and which take in a
    token. Rows of the pool are those of the batch or, with seats, these: 0 of a row without a token."""
    stream = tl.program_id(0) * B + tl.arange(0, B)
    row, inside = stream // H, stream < R * H
    on = inside & (tl.load(active + row, mask=inside, other=0) != 0)
    on = on & (tl.load(failed + 0 * row, mask=inside, other=1) == 0)
    row = row.to(tl.int64)
    seat = row
    if seats is not None:
        seat = tl.where(on, tl.load(seats + row, mask=inside, other=0), 0).to(tl.int64)
    return row, seat, stream % H, inside, on


@triton.jit
def _slot(page_table, failed, at, index, on, M, S: tl.constexpr):
    """Slots in the pool of entries number `index` of streams, and where there is one. No page at all means that none
    was reserved: nothing is written then, and `failed` is set."""
    page = tl.load(page_table + at * M + index // S, mask=on & (index < M * S), other=FREE)
    tl.store(failed + 0 * page, tl.full(page.shape, 1, tl.int32), mask=on & (page == FREE))
    return page.to(tl.int64) * S + index % S, on & (page != FREE)


@triton.jit(do_not_specialize=["layer"])
def append(key, value, position, log_weight, score, page_table, lengths, failed, new_key, new_value, positions, active,
           seats, layer, R, L, M, key_row, key_head, value_row, value_head, H: tl.constexpr, S: tl.constexpr,
           D: tl.constexpr, CHANNELS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    row, seat, head, inside, on = _streams(seats, active, failed, R, H, B)
    at = (seat * L + layer) * H + head
    channels = tl.arange(0, CHANNELS)[None, :]
    wide = inside[:, None] & (channels < D)
    keys = tl.load(new_key + (row * key_row + head * key_head)[:, None] + channels, mask=wide, other=0.0)
    values = tl.load(new_value + (row * value_row + head * value_head)[:, None] + channels, mask=wide, other=0.0)
    now = tl.load(positions + row, mask=inside, other=0)
    length = tl.load(lengths + at, mask=inside, other=0)
    slot, on = _slot(page_table, failed, at, length, on, M, S)
    to, wide = slot[:, None] * D + channels, on[:, None] & (channels < D)
    tl.debug_barrier()
    tl.store(lengths + at, length + 1, mask=on)
    tl.store(key + to, keys, mask=wide)
    tl.store(value + to, values, mask=wide)
    if position is not None:
        tl.store(position + slot, now, mask=on)
    if log_weight is not None:
        tl.store(log_weight + slot, tl.zeros([B], tl.float32), mask=on)
    if score is not None:
        tl.store(score + slot, tl.full([B], float("nan"), tl.float32), mask=on)


@triton.jit
def _read(said, said_carry, said_weight, at, number, on, MERGES: tl.constexpr, WEIGHS: tl.constexpr,
          LOGITS: tl.constexpr):  # fmt: skip
    """What was decided about new tokens (marked, log_carry, weight): marks, or logits [outputs, number]."""
    log_carry, weight = tl.zeros(at.shape, tl.float32), tl.full(at.shape, 1.0, tl.float32)
    marked = tl.load(said + at, mask=on, other=0) > 0
    if MERGES:
        if LOGITS:
            logit = tl.load(said + number + at, mask=on, other=0.0)
            if WEIGHS:
                weight = 1.0 / (1.0 + tl.exp(-logit))
            else:
                log_carry = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
        else:
            log_carry = tl.load(said_carry + at, mask=on, other=0.0)
            if WEIGHS:
                weight = tl.load(said_weight + at, mask=on, other=0.0)
    return marked, log_carry, weight


@triton.jit(do_not_specialize=["layer"])
def step(key, value, log_weight, page_table, lengths, failed, slots, marked, log_carry, weight, members, member_carry,
         new_key, new_value, cos, sin, said, said_carry, said_weight, positions, active,
         seats, layer, R, L, M, key_row, key_head, value_row, value_head, H: tl.constexpr, S: tl.constexpr,
         D: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
         RING: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr,
         MERGES: tl.constexpr, WEIGHS: tl.constexpr, LOGITS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    row, seat, head, inside, on = _streams(seats, active, failed, R, H, B)
    at = (seat * L + layer) * H + head
    channels = tl.arange(0, CHANNELS)[None, :]
    from_key, from_value = row * key_row + head * key_head, row * value_row + head * value_head
    if RING > 1 or not MERGES:
        wide = inside[:, None] & (channels < D)
        keys = tl.load(new_key + from_key[:, None] + channels, mask=wide, other=0.0)
        values = tl.load(new_value + from_value[:, None] + channels, mask=wide, other=0.0)
    now = tl.load(positions + row, mask=inside, other=0)
    length = tl.load(lengths + at, mask=inside, other=0)
    mark, carry, share = _read(said, said_carry, said_weight, row * H + head, R * H, inside, MERGES, WEIGHS, LOGITS)
    mark = mark & (now > SINKS)
    newest = ((seat * RING + now % RING) * L + layer) * H + head
    oldest = ((seat * RING + (now + 1) % RING) * L + layer) * H + head
    due, due_carry, due_weight = mark, carry, share  # of the token that is W tokens old now
    if RING > 1:
        due = tl.load(marked + oldest, mask=on, other=0) != 0
        if MERGES:
            due_carry = tl.load(log_carry + oldest, mask=on, other=0.0)
            old = tl.load(slots + oldest, mask=on, other=EMPTY)
            old_slot, joins = _slot(page_table, failed, at, tl.maximum(old, 0), on & (old != EMPTY), M, S)
        if WEIGHS:
            due_weight = tl.load(weight + oldest, mask=on, other=0.0)
    index = tl.where(due, tl.load(slots + newest, mask=on, other=0), length)
    slot, on = _slot(page_table, failed, at, index, on, M, S)
    if MERGES:
        if RING > 1:
            _merge(key, value, log_weight, members, member_carry, key, value, old_slot * D, old_slot * D, old_slot,
                   cos + row * HALF, sin + row * HALF, at, due, due_carry, due_weight, on & joins,
                   D, CHANNELS, HALF, PAIRS, REST, WIDTH, KNOWN, SUMS, WEIGHS, False, B)  # fmt: skip
        else:
            _merge(key, value, log_weight, members, member_carry, new_key, new_value, from_key, from_value, slot,
                   cos + row * HALF, sin + row * HALF, at, due, due_carry, due_weight, on,
                   D, CHANNELS, HALF, PAIRS, REST, WIDTH, KNOWN, SUMS, WEIGHS, True, B)  # fmt: skip
    tl.debug_barrier()
    tl.store(lengths + at, length + tl.where(due, 0, 1), mask=on)
    tl.store(slots + newest, index, mask=on)
    tl.store(marked + newest, mark.to(tl.uint8), mask=on)
    if MERGES:
        tl.store(log_carry + newest, carry, mask=on)
    if WEIGHS:
        tl.store(weight + newest, share, mask=on)
    if RING > 1 or not MERGES:
        to, wide = slot[:, None] * D + channels, on[:, None] & (channels < D)
        tl.store(key + to, keys, mask=wide)
        tl.store(value + to, values, mask=wide)
        if log_weight is not None:
            tl.store(log_weight + slot, tl.zeros([B], tl.float32), mask=on)


@triton.jit
def _merge(key, value, log_weight, members, member_carry, keys, values, from_key, from_value, slot, cos, sin, at,
           due, log_carry, weight, on, D: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr,
           PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr,
           WEIGHS: tl.constexpr, ALL: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Tokens [B] take over what is left of the groups before them, where `due`. They are read at from_key of `keys` and
    from_value of `values` and go to `slot` of the pool; ALL: also those that nothing joins.

    Names: first and second (of the channels that rotate), rest, value, each as it was read (raw), what it adds to its
    group (x), and the group's sum (sum).
    """
    carry = tl.where(due, tl.exp(log_carry), 0.0)[:, None]
    weight = (tl.maximum(weight, LEAST_WEIGHT) if WEIGHS else tl.full([B], 1.0, tl.float32))[:, None]
    sums, carries = members + at[:, None] * (KNOWN * WIDTH), member_carry + at[:, None] * KNOWN
    taking, due, written = on[:, None], due[:, None], (on if ALL else on & due)[:, None]
    from_key, from_value, to = from_key[:, None], from_value[:, None], slot[:, None] * D
    channels, pair = tl.arange(0, CHANNELS)[None, :], tl.arange(0, PAIRS)[None, :]
    rest = 2 * HALF + tl.arange(0, REST)[None, :]
    size = _sum(weight, sums, carries, 2 * D, taking, carry, WIDTH, KNOWN, SUMS)
    raw_value = tl.load(values + from_value + channels, mask=taking & (channels < D), other=0.0)
    x_value = raw_value.to(tl.float32) * weight
    sum_value = _sum(x_value, sums, carries, D + channels, taking & (channels < D), carry, WIDTH, KNOWN, SUMS)
    if HALF > 0:
        turns = taking & (pair < HALF)
        c, s = tl.load(cos[:, None] + pair, mask=turns, other=1.0), tl.load(sin[:, None] + pair, mask=turns, other=0.0)
        raw_first = tl.load(keys + from_key + pair, mask=turns, other=0.0)
        raw_second = tl.load(keys + from_key + HALF + pair, mask=turns, other=0.0)
        first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
        x_first, x_second = (first * c + second * s) * weight, (second * c - first * s) * weight
        sum_first = _sum(x_first, sums, carries, pair, turns, carry, WIDTH, KNOWN, SUMS)
        sum_second = _sum(x_second, sums, carries, HALF + pair, turns, carry, WIDTH, KNOWN, SUMS)
    if D > 2 * HALF:
        raw_rest = tl.load(keys + from_key + rest, mask=taking & (rest < D), other=0.0)
        x_rest = raw_rest.to(tl.float32) * weight
        sum_rest = _sum(x_rest, sums, carries, rest, taking & (rest < D), carry, WIDTH, KNOWN, SUMS)
    tl.debug_barrier()
    if log_weight is not None:
        tl.store(log_weight + slot[:, None], tl.log(size), mask=taking)
    _store(value, to + channels, sum_value / size, raw_value, due, written & (channels < D))
    _keep(weight, size, sums, 2 * D, taking, WIDTH, KNOWN, SUMS)
    _keep(x_value, sum_value, sums, D + channels, taking & (channels < D), WIDTH, KNOWN, SUMS)
    if HALF > 0:
        first, second = sum_first / size, sum_second / size
        _store(key, to + pair, first * c - second * s, raw_first, due, written & turns)
        _store(key, to + HALF + pair, second * c + first * s, raw_second, due, written & turns)
        _keep(x_first, sum_first, sums, pair, turns, WIDTH, KNOWN, SUMS)
        _keep(x_second, sum_second, sums, HALF + pair, turns, WIDTH, KNOWN, SUMS)
    if D > 2 * HALF:
        _store(key, to + rest, sum_rest / size, raw_rest, due, written & (rest < D))
        _keep(x_rest, sum_rest, sums, rest, taking & (rest < D), WIDTH, KNOWN, SUMS)
    if not SUMS:
        newest = tl.where(due, log_carry[:, None], float("-inf"))
        _keep(newest, newest, carries, 0, taking, 1, KNOWN, SUMS)


@triton.jit
def _sum(x, sums, carries, places, mask, share, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr):
    """x [B, n] and what is left of the members of its group.

    sums, carries: [B, 1] where the members of streams and their shares begin. places: of the n channels in a sum.
    """
    for back in tl.static_range(KNOWN):
        at = sums + ((KNOWN - 1 - back) * WIDTH + places)
        x += tl.where(share > 0, share * tl.load(at, mask=mask & (share > 0), other=0.0), 0.0)
        if not SUMS:
            share *= tl.exp(tl.load(carries + (KNOWN - 1 - back), mask=mask, other=0.0))
    return x


@triton.jit
def _store(target, to, mean, raw, due, mask):
    """Means where something joined, and elsewhere what there was, bit for bit."""
    tl.store(target + to, tl.where(due, mean.to(raw.dtype), raw), mask=mask)


@triton.jit
def _keep(x, total, sums, places, mask, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr):
    """For the next token: the sum, or x as the newest of the members, of which the oldest one goes."""
    if SUMS:
        tl.store(sums + places, total, mask=mask)
    else:
        for back in tl.static_range(KNOWN):
            at = sums + ((KNOWN - 1 - back) * WIDTH + places)
            old = tl.load(at, mask=mask, other=0.0)
            tl.debug_barrier()
            tl.store(at, x, mask=mask)
            x = old


# ---- moments


@triton.jit(do_not_specialize=["layer"])
def plan(keep, active, failed, lengths, moves, counts, layer, L, H, N, ROOM, BLOCK: tl.constexpr):
    """What moves in one stream so that it has no holes: moves [R, H, 2, ROOM], into holes and from the end."""
    stream = tl.program_id(0).to(tl.int64)
    row, head = stream // H, stream % H
    at = (row * L + layer) * H + head
    tl.store(counts + stream, 0)
    if (tl.load(active + row) == 0) | (tl.load(failed) != 0):
        return
    length = tl.load(lengths + at)
    count = 0
    for start in range(0, length, BLOCK):
        count += tl.sum(_stays(keep + stream * N, start, length, N, BLOCK).to(tl.int32))
    holes, last = 0, 0
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        stays = _stays(keep + stream * N, start, length, N, BLOCK)
        hole = ((stays == 0) & (index < count)).to(tl.int32)
        moved = (stays & (index >= count)).to(tl.int32)
        to = moves + stream * 2 * ROOM
        tl.store(to + holes + tl.cumsum(hole, 0) - 1, index, mask=hole != 0)
        tl.store(to + ROOM + last + tl.cumsum(moved, 0) - 1, index, mask=moved != 0)
        holes += tl.sum(hole)
        last += tl.sum(moved)
    tl.debug_barrier()
    tl.store(lengths + at, count)
    tl.store(counts + stream, holes)


@triton.jit
def _stays(keep, start, length, N, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    return (tl.load(keep + index, mask=index < tl.minimum(N, length), other=1) != 0) & (index < length)


@triton.jit(do_not_specialize=["layer"])
def move(key, value, position, log_weight, score, page_table, failed, moves, counts, layer, L, H, M, ROOM,
         S: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """The last entries of one stream go where `plan` wants them, B at a time."""
    stream = tl.program_id(0).to(tl.int64)
    at = (stream // H * L + layer) * H + stream % H
    count = tl.load(counts + stream)
    channels = tl.arange(0, CHANNELS)[None, :]
    for start in range(tl.program_id(1) * B, count, tl.num_programs(1) * B):
        number = start + tl.arange(0, B)
        on = number < count
        place = moves + stream * 2 * ROOM + number
        to, on = _slot(page_table, failed, at, tl.load(place, mask=on, other=0), on, M, S)
        from_, on = _slot(page_table, failed, at, tl.load(place + ROOM, mask=on, other=0), on, M, S)
        wide = on[:, None] & (channels < D)
        old, new = from_[:, None] * D + channels, to[:, None] * D + channels
        tl.store(key + new, tl.load(key + old, mask=wide, other=0.0), mask=wide)
        tl.store(value + new, tl.load(value + old, mask=wide, other=0.0), mask=wide)
        if position is not None:
            tl.store(position + to, tl.load(position + from_, mask=on, other=0), mask=on)
        if log_weight is not None:
            tl.store(log_weight + to, tl.load(log_weight + from_, mask=on, other=0.0), mask=on)
        if score is not None:
            tl.store(score + to, tl.load(score + from_, mask=on, other=0.0), mask=on)
