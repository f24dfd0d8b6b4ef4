"""The Triton kernels of `sampling_triton`: what one program computes. A row is cut into parts, a program for each.

What stays is found without a sort. A token's distance is what its logit lacks to the largest one; its bits are an
integer, and integers are halved fast. Of top_k and top_p each, all that is known is a bracket: the last distance that
stays is in low .. high - 1. Each round of `look` counts how many tokens, and about how much probability, are nearer
than some pivots, and narrows both brackets. Then `collect` writes down the distances inside, of few tokens by now, and
adds up exactly what is nearer; `find` halves the brackets over these few until one distance is left.

Only `find` decides, by exact sums: had a bracket been wrong, or are too many tokens inside, it looks at the whole row.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from kvpleat.kernels import sampling

GOLDEN = tl.constexpr(sampling.GOLDEN)
FIRST, SECOND = (tl.constexpr(factor) for factor in sampling.MIXED_BY)
MASS = tl.constexpr(2.0**sampling.MASS_BITS)
MOST_NOISE = tl.constexpr(sampling.MOST_NOISE)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(0x7F800000)  # bits of an infinite distance: such tokens have no probability
MOST = tl.constexpr(2**31 - 1)
PIVOTS = tl.constexpr(8)
EQUALS = tl.constexpr(16)  # neighbouring distances, of which some may have the same score
MARGIN = tl.constexpr(2.0**-18)  # of probabilities that `look` adds up in float32

# ---- rows


@triton.jit
def _given(logits, row, tokens, size, row_stride, token_stride):
    """Some logits of a row, float32 at least; -inf beyond its end."""
    given = tl.load(logits + row * row_stride + tokens * token_stride, tokens < size, other=-float("inf"))
    return given if logits.dtype.element_ty == tl.float64 else given.to(tl.float32)


@triton.jit
def _top(largest, row):
    """The largest logit of a row, and whether the row is sound: one that is not has none, and nothing is made of it."""
    top = tl.load(largest + row)
    if largest.dtype.element_ty != tl.float64:
        top = top.to(tl.float32)
    sound = tl.abs(top) < float("inf")
    return tl.where(sound, top, 0.0), sound


@triton.jit
def _bits(distances):
    return tl.abs(distances).to(tl.int32, bitcast=True)


@triton.jit
def _inverse(temperature, row):
    """What distances are multiplied by, rounded as torch does it."""
    given = tl.load(temperature + row)
    return tl.div_rn(tl.full(given.shape, 1.0, tl.float32), given)


@triton.jit
def _score(bits, by):
    """Of tokens at such a distance: s of `sampling`."""
    return -bits.to(tl.float32, bitcast=True) * by


@triton.jit
def _last(least, by):
    """Bits of the largest distance whose score is not below `least`."""
    all_stay = least == -float("inf")
    first = _bits(tl.where(all_stay, 0.0, least / by)) - EQUALS // 2
    near = first + tl.arange(0, EQUALS)
    before = tl.sum(((near < 0) | (_score(near, by) >= least)).to(tl.int32), 0)
    return tl.where(all_stay, FAR, first + before - 1)


# ---- the likeliest token, and the race


@triton.jit
def highest(logits, best, where, size, row_stride, token_stride, parts, BLOCK: tl.constexpr):
    """The largest logit of a part; infinity where there is NaN."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    given = _given(logits, row, part * BLOCK + tl.arange(0, BLOCK), size, row_stride, token_stride)
    top, index = tl.max(tl.where(given == given, given, float("inf")), 0, return_indices=True)
    tl.store(best + row * parts + part, top)
    tl.store(where + row * parts + part, part * BLOCK + index)


@triton.jit
def race(
    logits, largest, temperature, least, noise, states, best, where, size, row_stride, token_stride, parts,
    BLOCK: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """The winner of a part."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = part * BLOCK + tl.arange(0, BLOCK)
    top, _ = _top(largest, row)
    by, by_noise = _inverse(temperature, row), tl.load(noise + row)
    below = (_given(logits, row, tokens, size, row_stride, token_stride) - top).to(tl.float32)
    scores = below * by
    if by_noise != 0:
        scores += _gumbel(tl.load(states + row).to(tl.uint64, bitcast=True), tokens, COARSE) * by_noise
    stays = (_bits(below) <= _last(tl.load(least + row), by)) & (tokens < size)
    scores, index = tl.max(tl.where(stays, scores, -float("inf")), 0, return_indices=True)
    tl.store(best + row * parts + part, scores)
    tl.store(where + row * parts + part, part * BLOCK + index)


@triton.jit
def winner(best, where, values, tokens, parts, PARTS: tl.constexpr):
    """The best of a row's parts, the first one of equals."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    found = tl.load(best + row * parts + part, part < parts, other=-float("inf"))
    top, index = tl.max(found, 0, return_indices=True)
    if values is not None:
        tl.store(values + row, top.to(values.dtype.element_ty))
    tl.store(tokens + row, tl.load(where + row * parts + index).to(tl.int64))


@triton.jit
def _gumbel(state, tokens, COARSE: tl.constexpr):
    """`sampling.gumbel`."""
    bits = state + (tokens + 1).to(tl.uint64) * GOLDEN
    bits = (bits ^ (bits >> 30)) * FIRST
    bits = (bits ^ (bits >> 27)) * SECOND
    bits = bits ^ (bits >> 31)
    u = tl.minimum(((bits >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16, MOST_NOISE)  # 2**-53
    # -log(1 - u): the fast logarithm has too few digits next to 1, so there is a series for small u.
    small = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -_log(tl.where(u < 0.03, small, -_log(1 - u, COARSE)), COARSE)


@triton.jit
def _log(x, COARSE: tl.constexpr):
    """COARSE: to 2**-22, by one instruction of an NVIDIA GPU; `tl.log` has all digits and takes twenty."""
    if not COARSE:
        return tl.log(x)
    return LN_2 * tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


# ---- what stays


@triton.jit
def _asked(largest, temperature, log_min_p, top_k, top_p, row, size):
    """Largest logit of a row; 1 / temperature; its k, more than there are where all stay; its p; where distances end,
    for min_p; and whether there is anything to find."""
    top, sound = _top(largest, row)
    by, k, p = _inverse(temperature, row), tl.load(top_k + row), tl.load(top_p + row)
    end = tl.minimum(_last(tl.load(log_min_p + row), by) + 1, FAR)
    return top, by, tl.where(k < size, k, MOST), p, end, sound & ((k < size) | (p < 1))


@triton.jit
def _pivots(lane, brackets, by, end, ROUND: tl.constexpr):
    """Where to look next, PIVOTS of them: at first at some scores and at the end, then evenly over the brackets."""
    if ROUND == 0:
        at = _bits(tl.exp2(lane * 0.7 - 0.4) / by)  # scores of -0.75 to -14
        return tl.where(lane == PIVOTS - 1, end, tl.minimum(at, end))
    k_low, k_high, p_low, p_high, _, _ = brackets
    for_k, for_p = k_high - k_low > 1, p_high - p_low > 1
    both = for_k & for_p
    half = PIVOTS // 2
    mine = tl.where(both, lane < half, for_k)
    low, width = tl.where(mine, k_low, p_low), tl.where(mine, k_high - k_low, p_high - p_low)
    step = tl.where(both, lane % half, lane) + 1
    cuts = tl.where(both, half, PIVOTS) + 1
    return low + width // cuts * step + tl.minimum(width % cuts, step)


@triton.jit
def _brackets(counts, masses, row, parts, by, k, p, end, ROUNDS: tl.constexpr, PARTS: tl.constexpr):
    """What is known after some rounds: low and high of top_k, low and high of top_p, and about how much probability
    tokens hold that are nearer than the first two."""
    brackets = 0, end, 0, tl.where(p < 1, end, 0), 0.0, float("inf")
    p = p.to(tl.float32)
    part, lane = tl.arange(0, PARTS)[:, None], tl.arange(0, PIVOTS)
    for i in tl.static_range(ROUNDS):
        at = _pivots(lane, brackets, by, end, i)
        place = ((i * tl.num_programs(1) + row) * parts + part) * PIVOTS + lane[None, :]
        count = tl.sum(tl.load(counts + place, part < parts, other=0), 0)
        mass = tl.sum(tl.load(masses + place, part < parts, other=0.0), 0)
        k_low, k_high, p_low, p_high, least, most = brackets
        fewer = count < k
        k_low = tl.maximum(k_low, tl.max(tl.where(fewer, at, 0), 0))
        k_high = tl.minimum(k_high, tl.min(tl.where(fewer, MOST, at), 0))
        least = tl.maximum(least, tl.max(tl.where(fewer, mass, 0.0), 0))
        most = tl.minimum(most, tl.min(tl.where(fewer, float("inf"), mass), 0))
        most = tl.where(k_low == k_high, least, most)
        p_low = tl.maximum(p_low, tl.max(tl.where(mass < p * least * (1 - MARGIN), at, 0), 0))
        p_high = tl.minimum(p_high, tl.min(tl.where(mass > p * most * (1 + MARGIN), at, MOST), 0))
        brackets = k_low, k_high, p_low, p_high, least, most
    return brackets


@triton.jit
def look(
    logits, largest, temperature, log_min_p, top_k, top_p, counts, masses, used, size, row_stride, token_stride, parts,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """How many tokens of a part, and about how much probability, are nearer than each of the pivots of this round."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, by, k, p, end, going = _asked(largest, temperature, log_min_p, top_k, top_p, row, size)
    if ROUND == 0:
        tl.store(used + row, 0, part == 0)  # for `collect`
    if going:
        brackets = _brackets(counts, masses, row, parts, by, k, p, end, ROUND, PARTS)
        tokens = part * BLOCK + tl.arange(0, BLOCK)
        below = (_given(logits, row, tokens, size, row_stride, token_stride) - top).to(tl.float32)
        bits, mass = _bits(below), tl.exp2(below * (LOG2_E * by))
        place = ((ROUND * tl.num_programs(1) + row) * parts + part) * PIVOTS
        for i in tl.static_range(PIVOTS):
            nearer = bits < _pivots(i, brackets, by, end, ROUND)
            tl.store(counts + place + i, tl.sum(nearer.to(tl.int32), 0) if k < MOST else 0)
            tl.store(masses + place + i, tl.sum(tl.where(nearer, mass, 0.0), 0) if p < 1 else 0.0)


@triton.jit
def collect(
    logits, largest, temperature, log_min_p, top_k, top_p, counts, masses, used, sums, inside, size, row_stride,
    token_stride, parts, ROOM, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Distances inside the brackets go to inside [n, ROOM] as they come, used [n] of them; what is nearer in a part, to
    sums [n, parts, 3]: tokens and probability nearer than top_k's bracket, probability nearer than top_p's."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, by, k, p, end, going = _asked(largest, temperature, log_min_p, top_k, top_p, row, size)
    if going:
        k_low, k_high, p_low, p_high, _, _ = _brackets(counts, masses, row, parts, by, k, p, end, ROUNDS, PARTS)
        tokens = part * BLOCK + tl.arange(0, BLOCK)
        bits = _bits((_given(logits, row, tokens, size, row_stride, token_stride) - top).to(tl.float32))
        at = sums + (row * parts + part) * 3
        tl.store(at, tl.sum((bits < k_low).to(tl.int32), 0).to(tl.int64))
        if p < 1:
            mass = (tl.exp(_score(bits, by)) * MASS).to(tl.int64)
            tl.store(at + 1, tl.sum(tl.where(bits < k_low, mass, 0), 0))
            tl.store(at + 2, tl.sum(tl.where(bits < p_low, mass, 0), 0))
        # Those of the same score as the last one of top_k stay with it.
        of_k = (bits >= k_low) & (bits < tl.where(k_low < k_high, k_high + EQUALS, k_high)) & (bits < FAR)
        taken = (of_k | ((bits >= p_low) & (bits < p_high))).to(tl.int32)
        number = tl.sum(taken, 0)
        if number > 0:
            place = tl.atomic_add(used + row, number, sem="relaxed") + tl.cumsum(taken, 0) - 1
            tl.store(inside + row * ROOM + place, bits, (taken != 0) & (place < ROOM))


@triton.jit
def _total(
    logits, inside, row, size, row_stride, token_stride, top, by, number, whole, low, high, BLOCK: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """How many tokens, or how much probability, lie in low .. high - 1: of those inside, or of the whole row."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, number, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if whole:
            bits = _bits((_given(logits, row, i, size, row_stride, token_stride) - top).to(tl.float32))
        else:
            bits = tl.load(inside + i, i < number, other=FAR)
        there = (bits >= low) & (bits < high)
        if WEIGHED:
            total += tl.where(there, (tl.exp(-bits.to(tl.float32, bitcast=True) * by) * MASS).to(tl.int64), 0)
        else:
            total += there.to(tl.int64)
    return tl.sum(total, 0)


@triton.jit
def find(
    logits, largest, temperature, log_min_p, top_k, top_p, counts, masses, used, sums, inside, least, size, row_stride,
    token_stride, parts, ROOM, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The least score that stays in a row."""
    row, part = tl.program_id(1).to(tl.int64), tl.arange(0, PARTS)
    top, by, k, p, end, going = _asked(largest, temperature, log_min_p, top_k, top_p, row, size)
    found = tl.load(log_min_p + row)
    if going:
        k_low, k_high, p_low, p_high, _, _ = _brackets(counts, masses, row, parts, by, k, p, end, ROUNDS, PARTS)
        at = sums + (row * parts + part) * 3
        nearer = tl.sum(tl.load(at, part < parts, other=0), 0)
        number = tl.load(used + row)
        whole = number > ROOM
        number = tl.where(whole, size, number)
        inside += row * ROOM
        low, high = k_low, k_high
        while high - low > 1:
            middle = low + (high - low) // 2
            count = nearer + _total(logits, inside, row, size, row_stride, token_stride, top, by, number, whole, k_low,
                                    middle, BLOCK, False)  # fmt: skip
            low, high = tl.where(count < k, middle, low), tl.where(count < k, high, middle)
        last = low
        if p < 1:
            over = tl.where(last < end, _last(_score(tl.where(last < end, last, 0), by), by) + 1, end)
            every = tl.sum(tl.load(at + 1, part < parts, other=0), 0)
            every += _total(logits, inside, row, size, row_stride, token_stride, top, by, number, whole, k_low, over,
                            BLOCK, True)  # fmt: skip
            share = p * every.to(tl.float64)
            nearer = tl.sum(tl.load(at + 2, part < parts, other=0), 0)
            there = _total(logits, inside, row, size, row_stride, token_stride, top, by, number, whole, p_low, p_high,
                           BLOCK, True)  # fmt: skip
            right = (nearer.to(tl.float64) < share) & ((nearer + there).to(tl.float64) >= share)
            whole, number = whole | (right == 0), tl.where(right, number, size)
            nearer, p_low, p_high = tl.where(right, nearer, 0), tl.where(right, p_low, 0), tl.where(right, p_high, end)
            low, high = p_low, p_high
            while high - low > 1:
                middle = low + (high - low) // 2
                mass = nearer + _total(logits, inside, row, size, row_stride, token_stride, top, by, number, whole,
                                       p_low, middle, BLOCK, True)  # fmt: skip
                enough = mass.to(tl.float64) >= share
                low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
            last = tl.minimum(last, low)
        found = tl.where(last < end, _score(tl.where(last < end, last, 0), by), found)
    tl.store(least + row, found)
