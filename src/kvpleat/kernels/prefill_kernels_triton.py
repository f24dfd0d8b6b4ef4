"""The Triton kernels of `prefill_triton`: what one program computes.

What could be faster on Hopper, and is not depended on: tensor descriptors for packed entries, keys and values (a
block of them is one rectangle, so TMA would take the address arithmetic away), and Triton's warp specialisation of the
loops without masks.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
FOREVER = tl.constexpr(2**30)  # an age that no token reaches
# Which columns of a block a pass may use: all; those before `high`; of these, those of certain ages.
ALL, BEFORE, AGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _update(q, keys, values, bias, visible, top, total, acc, factor, cap, BIASED: tl.constexpr, MASKED: tl.constexpr,
            CAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step of the online softmax, logits in base 2: keys, values [N, D]; bias [N], visible [M or 1, N] if used."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if CAPPED:  # c * tanh(x / c), x the logit; infinities come out right
        scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * factor)))
    if BIASED:
        scores = (scores if CAPPED else scores * factor) + bias[None, :]
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    if BIASED or CAPPED:
        higher = tl.maximum(top, tl.max(scores, axis=1))
    else:  # scaled only after the maximum is known: one multiplication and addition per logit
        higher = tl.maximum(top, tl.max(scores, axis=1) * factor)
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    weights = tl.exp2((scores if BIASED or CAPPED else scores * factor) - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _past_pass(q, keys, values, log_weight, position, table, low, high, starts, num_sinks, top, total, acc, factor, cap,
               S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
               WINDOW: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Entries [low, high) of a stream in pages; a multiple of N of them where nothing is masked."""
    channels = tl.arange(0, DP)
    for n in range(low, high, N):
        index = n + tl.arange(0, N)
        inside = index < high
        pages = tl.load(table + index // S, mask=inside, other=0) if MASKED else tl.load(table + index // S)
        slots = pages.to(tl.int64) * S + index % S
        at = slots[:, None] * D + channels[None, :]
        visible = inside[None, :]
        bias = top
        if MASKED:
            there = inside[:, None] & (channels < D)[None, :]
            k = tl.load(keys + at, mask=there, other=0.0)
            v = tl.load(values + at, mask=there, other=0.0)
        elif DP != D:
            k = tl.load(keys + at, mask=(channels < D)[None, :], other=0.0)
            v = tl.load(values + at, mask=(channels < D)[None, :], other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        if BIASED:
            bias = tl.load(log_weight + slots, mask=inside, other=0.0) * LOG2_E
        if WINDOW:
            place = tl.load(position + slots, mask=inside, other=0)
            visible = visible & ((place[None, :] >= starts[:, None]) | (place < num_sinks)[None, :])
        top, total, acc = _update(q, k, v, bias, visible, top, total, acc, factor, cap, BIASED, MASKED, CAPPED,
                                  PRECISION)  # fmt: skip
    return top, total, acc


@triton.jit
def _pass(q, keys, values, log_size, stays, step, low, high, places, youngest, oldest, starts, top, total, acc, factor,
          cap, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, STAYS: tl.constexpr,
          WINDOW: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Keys [low, high), one after the other in memory, a multiple of N of them where MODE is ALL. Under AGES a query at
    places [M] sees those of ages in [youngest, oldest), and older ones that stay; under WINDOW none before starts."""
    channels = tl.arange(0, DP)
    at = tl.arange(0, N)[:, None] * step + channels[None, :]
    begin = (tl.full([], 0, tl.int64) + low) * step  # may be beyond 32 bits, so offsets are taken from here
    keys += begin
    values += begin
    for n in range(low, high, N):
        index = n + tl.arange(0, N)
        inside = index < high
        visible = inside[None, :]
        bias = top
        if MODE != ALL:
            there = inside[:, None] & (channels < D)[None, :]
            k = tl.load(keys + at, mask=there, other=0.0)
            v = tl.load(values + at, mask=there, other=0.0)
        elif DP != D:
            k = tl.load(keys + at, mask=(channels < D)[None, :], other=0.0)
            v = tl.load(values + at, mask=(channels < D)[None, :], other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        if BIASED:
            bias = tl.load(log_size + index, mask=inside, other=0.0) * LOG2_E
        if MODE == AGES:
            age = places[:, None] - index[None, :]
            seen = age < oldest
            if STAYS:
                stay = tl.load(stays + index, mask=inside, other=0) != 0
                seen = seen | stay[None, :]
            if WINDOW:
                seen = seen & (index[None, :] >= starts[:, None])
            visible = visible & seen & (age >= youngest)
        keys += N * step
        values += N * step
        top, total, acc = _update(q, k, v, bias, visible, top, total, acc, factor, cap, BIASED, MODE != ALL, CAPPED,
                                  PRECISION)  # fmt: skip
    return top, total, acc


@triton.jit
def _block(new, number, num_rows, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """The row that block `number` of all rows' queries belongs to, its first query, and which of its blocks it is: the
    last ones come first, since they have most to read. num_rows and more: there is no such block."""
    index = tl.arange(0, ROWS)
    begins = tl.load(new + index, mask=index < num_rows, other=0)
    ends = tl.load(new + index + 1, mask=index < num_rows, other=0)
    blocks = (ends - begins + TOKENS - 1) // TOKENS
    row = tl.sum((tl.cumsum(blocks, 0) <= number).to(tl.int32), 0)
    before = tl.sum(tl.where(index < row, blocks, 0), 0)
    own = tl.sum(tl.where(index == row, blocks, 0), 0)
    return row, own - 1 - (number - before)


@triton.jit
def _count(kept, stop):
    """How many of the first `stop` entries stay, from the running count [M]."""
    return tl.load(kept + stop - 1, mask=stop > 0, other=0)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "delay", "num_sinks"])
def forward(q, keys, values, group_keys, group_values, log_size, stays, kept, packed_keys, packed_values, packed_size,
            past_keys, past_values, log_weight, position, table, lengths, starts, first, new, seen, out,
            num_rows, num_keys, delay, num_sinks, factor, cap, q_head, q_token, key_head, key_token, group_head,
            group_token, table_row, table_head, length_row, length_head, out_head, out_token, Q,
            G: tl.constexpr, MEMBERS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            M: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, PAST: tl.constexpr,
            LEAVES: tl.constexpr, POOLED: tl.constexpr, YOUNG: tl.constexpr, WINDOW: tl.constexpr,
            WEIGHED: tl.constexpr, SIZED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of queries: M // MEMBERS tokens of one row, MEMBERS query heads of one KV head each."""
    TOKENS: tl.constexpr = M // MEMBERS
    tiles = Q // MEMBERS
    tile = tl.program_id(0) % tiles
    row, block = _block(new, tl.program_id(0) // tiles, num_rows, TOKENS, ROWS)
    if row >= num_rows:
        return
    head = tile * MEMBERS // G
    new_begin, key_begin = tl.load(new + row), tl.load(seen + row)
    count = tl.load(new + row + 1) - new_begin
    young = tl.load(seen + row + 1) - key_begin - count  # keys before the first query's
    lane = tl.arange(0, M)
    token = block * TOKENS + lane // MEMBERS
    valid = (lane < TOKENS * MEMBERS) & (token < count)
    channels = tl.arange(0, DP)
    there = valid[:, None] & (channels < D)[None, :]
    at = (new_begin + token).to(tl.int64)[:, None], (tile * MEMBERS + lane % MEMBERS)[:, None]
    queries = tl.load(q + at[0] * q_token + at[1].to(tl.int64) * q_head + channels[None, :], mask=there, other=0.0)
    places = young + token
    low = young + block * TOKENS  # the first query's place, and behind the last one's
    stop = tl.minimum(low + TOKENS, young + count)
    key_base = key_begin.to(tl.int64) * key_token + head.to(tl.int64) * key_head
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    start = lane
    if WINDOW:
        start = tl.load(starts + new_begin + token, mask=valid, other=0)
    if PAST:
        table += row.to(tl.int64) * table_row + head * table_head
        length = tl.load(lengths + row * length_row + head * length_head)
        full = 0 if WINDOW else length // N * N
        if not WINDOW:
            top, total, acc = _past_pass(queries, past_keys, past_values, log_weight, position, table, 0, full, start,
                                         num_sinks, top, total, acc, factor, cap, S, D, DP, N, False, False, WEIGHED,
                                         CAPPED, PRECISION)  # fmt: skip
        top, total, acc = _past_pass(queries, past_keys, past_values, log_weight, position, table, full, length, start,
                                     num_sinks, top, total, acc, factor, cap, S, D, DP, N, True, WINDOW, WEIGHED,
                                     CAPPED, PRECISION)  # fmt: skip
    if LEAVES:
        done = tl.maximum(low - delay, 0)  # keys before it are older than the delay for all queries
        flags = head.to(tl.int64) * num_keys
        since = _count(kept + flags, key_begin)
        long = _count(kept + flags, key_begin + done) - since
        packed = flags + since
        full = long // N * N
        top, total, acc = _pass(queries, packed_keys + packed * D, packed_values + packed * D, packed_size + packed,
                                stays, D, 0, full, places, 0, 0, start, top, total, acc, factor, cap, D, DP, N, ALL,
                                False, False, SIZED, CAPPED, PRECISION)  # fmt: skip
        top, total, acc = _pass(queries, packed_keys + packed * D, packed_values + packed * D, packed_size + packed,
                                stays, D, full, long, places, 0, 0, start, top, total, acc, factor, cap, D, DP, N,
                                BEFORE, False, False, SIZED, CAPPED, PRECISION)  # fmt: skip
        flags += key_begin
        if POOLED:
            group_base = key_begin.to(tl.int64) * group_token + head.to(tl.int64) * group_head
            top, total, acc = _pass(queries, group_keys + group_base, group_values + group_base, log_size + flags,
                                    stays + flags, group_token, done, tl.maximum(stop - delay, 0), places, delay,
                                    delay + 1, start, top, total, acc, factor, cap, D, DP, BAND, AGES, True, False,
                                    SIZED, CAPPED, PRECISION)  # fmt: skip
            if YOUNG:
                top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays, key_token,
                                        tl.maximum(low - delay + 1, 0), stop, places, 0, delay, start, top, total, acc,
                                        factor, cap, D, DP, BAND, AGES, False, False, False, CAPPED,
                                        PRECISION)  # fmt: skip
        else:
            top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays + flags, key_token,
                                    done, stop, places, 0, delay + 1, start, top, total, acc, factor, cap, D, DP, BAND,
                                    AGES, True, False, False, CAPPED, PRECISION)  # fmt: skip
    else:
        clear_low = 0
        begin = 0
        if WINDOW:
            start -= tl.load(first + row)
            sinks = tl.minimum(tl.maximum(num_sinks - tl.load(first + row), 0), stop)
            top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays, key_token, 0, sinks,
                                    places, 0, FOREVER, start, top, total, acc, factor, cap, D, DP, N, AGES, False,
                                    False, False, CAPPED, PRECISION)  # fmt: skip
            begin = tl.maximum(tl.min(tl.where(valid, start, FOREVER)), sinks)
            last = tl.max(tl.where(valid, start, -FOREVER))
            clear_low = begin + (tl.maximum(last - begin, 0) + N - 1) // N * N  # all queries reach back that far
            top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays, key_token, begin,
                                    tl.minimum(clear_low, stop), places, 0, FOREVER, start, top, total, acc, factor,
                                    cap, D, DP, N, AGES, False, True, False, CAPPED, PRECISION)  # fmt: skip
        clear_high = clear_low + tl.maximum(low + 1 - clear_low, 0) // N * N
        top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays, key_token, clear_low,
                                clear_high, places, 0, FOREVER, start, top, total, acc, factor, cap, D, DP, N, ALL,
                                False, False, False, CAPPED, PRECISION)  # fmt: skip
        top, total, acc = _pass(queries, keys + key_base, values + key_base, log_size, stays, key_token, clear_high,
                                stop, places, 0, FOREVER, start, top, total, acc, factor, cap, D, DP, BAND, AGES,
                                False, WINDOW, False, CAPPED, PRECISION)  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at[0] * out_token + at[1].to(tl.int64) * out_head + channels[None, :], acc.to(out.dtype.element_ty),
             mask=there)  # fmt: skip


@triton.jit(do_not_specialize=["num_keys"])
def count(stays, kept, num_keys, N: tl.constexpr):
    """How many of a head's entries up to each stay: one program a head, since few numbers are read."""
    begin = tl.program_id(0).to(tl.int64) * num_keys
    total = tl.program_id(0) * 0
    for n in range(0, num_keys, N):
        index = n + tl.arange(0, N)
        stay = (tl.load(stays + begin + index, mask=index < num_keys, other=0) != 0).to(tl.int32)
        tl.store(kept + begin + index, total + tl.cumsum(stay, 0), mask=index < num_keys)
        total += tl.sum(stay, 0)


@triton.jit(do_not_specialize=["num_keys"])
def pack(keys, values, log_size, stays, kept, out_keys, out_values, out_size, num_keys, key_head, key_token,
         D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SIZED: tl.constexpr):  # fmt: skip
    """Entries that stay, one after the other for each head: `kept` [H, M] says how many there are up to each."""
    index = tl.program_id(0) * N + tl.arange(0, N)
    head = tl.program_id(1).to(tl.int64)
    flags = head * num_keys
    stay = tl.load(stays + flags + index, mask=index < num_keys, other=0) != 0
    target = flags + tl.load(kept + flags + index, mask=stay, other=1) - 1
    channels = tl.arange(0, DP)
    there = stay[:, None] & (channels < D)[None, :]
    source = head * key_head + index.to(tl.int64)[:, None] * key_token + channels[None, :]
    at = target[:, None] * D + channels[None, :]
    tl.store(out_keys + at, tl.load(keys + source, mask=there, other=0.0), mask=there)
    tl.store(out_values + at, tl.load(values + source, mask=there, other=0.0), mask=there)
    if SIZED:
        tl.store(out_size + target, tl.load(log_size + flags + index, mask=stay, other=0.0), mask=stay)
