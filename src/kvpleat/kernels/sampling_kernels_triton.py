"""The Triton kernels of `sampling_triton`: what one program computes. A row is cut into parts, a program for each.

What stays is found without sorting a row. A token's distance is what its logit lacks to the largest one; its bits are
an integer, and integers are halved fast. Of top_k, or of top_p where no k is given, all that is known is a bracket: the
last distance that stays is in low .. high - 1. `look` counts, or weighs, the tokens that are nearer than some pivots,
and `narrow` makes a narrower bracket of that, and pivots inside it. Pivots are rungs of the row's `ladder`, some of its
own distances in order: flat or peaked, each round leaves the same share of tokens. Then `collect` writes down the
distances inside, of few tokens by now, and adds up exactly what is nearer; `find` halves the bracket over these few
until one distance is left. For top_k and top_p together all that may stay with k is written down, and halved twice.

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
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """The winner of a part, of which a lane sees one token of each chunk."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, _ = _top(largest, row)
    by, by_noise = _inverse(temperature, row), tl.load(noise + row)
    last = _last(tl.load(least + row), by)
    lane = tl.arange(0, CHUNK)
    bits = tl.load(states + row).to(tl.uint64, bitcast=True) + (part * BLOCK + lane + 1).to(tl.uint64) * GOLDEN
    most, winner = tl.full((CHUNK,), -float("inf"), tl.float32), tl.zeros((CHUNK,), tl.int32)
    for first in range(part * BLOCK, (part + 1) * BLOCK, CHUNK):
        below = (_given(logits, row, first + lane, size, row_stride, token_stride) - top).to(tl.float32)
        scores = below * by
        if by_noise != 0:
            scores += _gumbel(bits, COARSE) * by_noise
        wins = (scores > most) & (_bits(below) <= last)  # nothing beyond the end of the row does
        most, winner = tl.where(wins, scores, most), tl.where(wins, first, winner)
        bits += CHUNK * GOLDEN % 2**64
    top = tl.max(most, 0)
    tl.store(best + row * parts + part, top)
    tl.store(where + row * parts + part, tl.min(tl.where(most == top, winner + lane, MOST), 0))


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
def _gumbel(bits, COARSE: tl.constexpr):
    """`sampling.gumbel` of states of SplitMix64."""
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
def _asked(largest, temperature, top_k, top_p, row, size):
    """Largest logit of a row; 1 / temperature; its k, more than there are where all stay; its p; and whether there is
    anything to find."""
    top, sound = _top(largest, row)
    by, k, p = _inverse(temperature, row), tl.load(top_k + row), tl.load(top_p + row)
    return top, by, tl.where(k < size, k, MOST), p, sound & ((k < size) | (p < 1))


@triton.jit
def _distances(its, tokens):
    """Of some tokens of a row: bits of what they lack to the largest one, endlessly much beyond its end."""
    logits, row, size, row_stride, token_stride, top = its
    return _bits((_given(logits, row, tokens, size, row_stride, token_stride) - top).to(tl.float32))


@triton.jit
def ladder(
    logits, largest, temperature, log_min_p, top_k, top_p, rungs, used, size, row_stride, token_stride,
    RUNGS: tl.constexpr,
):  # fmt: skip
    """Distances of RUNGS tokens from all over a row, in order, to rungs [n, RUNGS + 1]; last where distances end, for
    min_p. used [n] is set to 0, for `collect`."""
    row, rung = tl.program_id(0).to(tl.int64), tl.arange(0, RUNGS)
    top, by, _, _, going = _asked(largest, temperature, top_k, top_p, row, size)
    rungs += row * (RUNGS + 1)
    if going:
        end = tl.minimum(_last(tl.load(log_min_p + row), by) + 1, FAR)
        bits = _distances((logits, row, size, row_stride, token_stride, top), rung * size // RUNGS)
        tl.store(rungs + rung, tl.sort(tl.minimum(bits, end)))
        tl.store(rungs + RUNGS, end)
        tl.store(used + row, 0)


@triton.jit
def look(
    logits, largest, temperature, top_k, top_p, pivots, amounts, size, row_stride, token_stride, parts, pivot_row,
    pivot_step, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens of a part, or about how much probability where no k is given, are nearer than each of PIVOTS
    pivots."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, by, k, _, going = _asked(largest, temperature, top_k, top_p, row, size)
    if going:
        tokens = part * BLOCK + tl.arange(0, BLOCK)
        below = (_given(logits, row, tokens, size, row_stride, token_stride) - top).to(tl.float32)
        bits = _bits(below)
        pivots += row * pivot_row
        amounts += (row * parts + part) * PIVOTS
        if k < MOST:
            for i in tl.static_range(PIVOTS):
                nearer = bits < tl.load(pivots + i * pivot_step)
                tl.store(amounts + i, tl.sum(nearer.to(tl.int32), 0).to(tl.float32))
        else:
            mass = tl.exp2(below * (LOG2_E * by))
            for i in tl.static_range(PIVOTS):
                nearer = bits < tl.load(pivots + i * pivot_step)
                tl.store(amounts + i, tl.sum(tl.where(nearer, mass, 0.0), 0))


@triton.jit
def narrow(
    largest, temperature, top_k, top_p, rungs, pivots, amounts, wanted, brackets, following, size, parts, pivot_row,
    pivot_step, PARTS: tl.constexpr, RUNGS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """After a round: low and high of the bracket to brackets [n, 2], the amount that is looked for to wanted [n], and
    where to look next to following [n, PIVOTS]."""
    row, part, lane = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)[:, None], tl.arange(0, PIVOTS)
    _, _, k, p, going = _asked(largest, temperature, top_k, top_p, row, size)
    rungs += row * (RUNGS + 1)
    brackets += row * 2
    if going:
        place = (row * parts + part) * PIVOTS + lane[None, :]
        amount = tl.sum(tl.load(amounts + place, part < parts, other=0.0), 0)
        if ROUND == 0:
            low, high = 0, tl.load(rungs + RUNGS)
            every = tl.sum(tl.where(lane == PIVOTS - 1, amount, 0.0), 0)
            want = tl.where(k < MOST, k.to(tl.float32) - 0.5, p.to(tl.float32) * every)
            tl.store(wanted + row, want)
        else:
            low, high, want = tl.load(brackets), tl.load(brackets + 1), tl.load(wanted + row)
        at = tl.load(pivots + row * pivot_row + lane * pivot_step)
        margin = tl.where(k < MOST, 0.0, MARGIN * want)
        low = tl.maximum(low, tl.max(tl.where(amount < want - margin, at, 0), 0))
        high = tl.minimum(high, tl.min(tl.where(amount > want + margin, at, MOST), 0))
        tl.store(brackets, low)
        tl.store(brackets + 1, high)
        # The rungs from low to high, evenly. Of equal ones the second is a pivot behind them: as many tokens as have
        # several rungs become a bracket of their own.
        every = tl.load(rungs + tl.arange(0, RUNGS))
        first = tl.sum((every < low).to(tl.int32), 0)
        number = tl.sum((every < high).to(tl.int32), 0) - first
        at = tl.load(rungs + first + number * (lane + 1) // (PIVOTS + 1))
        before = tl.where(lane == 0, low, tl.load(rungs + first + number * lane // (PIVOTS + 1)))
        tl.store(following + row * PIVOTS + lane, at + (at == before).to(tl.int32))


@triton.jit
def _taken(brackets, row, k, p):
    """Low and high of a bracket, and from where to where distances are written down: those inside, unless it is a
    single one. For k and p all that may stay with k, and EQUALS more: of the same score as its last one, perhaps."""
    low, high = tl.load(brackets + row * 2), tl.load(brackets + row * 2 + 1)
    both = (k < MOST) & (p < 1)
    stop = tl.where(both, tl.minimum(high + EQUALS, FAR), tl.where(high - low > 1, high, low))
    return low, high, tl.where(both, 0, low), stop


@triton.jit
def collect(
    logits, largest, temperature, top_k, top_p, rungs, brackets, used, sums, inside, size, row_stride, token_stride,
    parts, ROOM, BLOCK: tl.constexpr, RUNGS: tl.constexpr,
):  # fmt: skip
    """Distances inside the bracket go to inside [n, ROOM] as they come, used [n] of them; what is nearer in a part, to
    sums [n, parts, 3]: tokens, or without k the probability nearer than low, than high, and of all."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, by, k, p, going = _asked(largest, temperature, top_k, top_p, row, size)
    if going:
        low, high, start, stop = _taken(brackets, row, k, p)
        bits = _distances((logits, row, size, row_stride, token_stride, top), part * BLOCK + tl.arange(0, BLOCK))
        at = sums + (row * parts + part) * 3
        if k < MOST:
            tl.store(at, tl.sum((bits < low).to(tl.int32), 0).to(tl.int64))
        else:
            mass = (tl.exp(_score(bits, by)) * MASS).to(tl.int64)
            tl.store(at, tl.sum(tl.where(bits < low, mass, 0), 0))
            tl.store(at + 1, tl.sum(tl.where(bits < high, mass, 0), 0))
            tl.store(at + 2, tl.sum(tl.where(bits < tl.load(rungs + row * (RUNGS + 1) + RUNGS), mass, 0), 0))
        taken = ((bits >= start) & (bits < stop)).to(tl.int32)
        number = tl.sum(taken, 0)
        if number > 0:
            place = tl.atomic_add(used + row, number, sem="relaxed") + tl.cumsum(taken, 0) - 1
            tl.store(inside + row * ROOM + place, bits, (taken != 0) & (place < ROOM))


@triton.jit
def _split(its, inside, by, number, whole, low, middle, high, BLOCK: tl.constexpr, WEIGHED: tl.constexpr):
    """How many tokens, or how much probability, lie in low .. middle - 1, and the last distance there; and the first in
    middle .. high - 1: of those inside, or of the whole row."""
    total = tl.zeros((BLOCK,), tl.int64)
    before, after = tl.zeros((BLOCK,), tl.int32), tl.full((BLOCK,), MOST, tl.int32)
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        bits = _distances(its, i) if whole else tl.load(inside + i, i < number, other=FAR)
        there = (bits >= low) & (bits < middle)
        before = tl.maximum(before, tl.where(there, bits, 0))
        after = tl.minimum(after, tl.where(bits >= middle, bits, MOST))
        if WEIGHED:
            total += tl.where(there, (tl.exp(_score(bits, by)) * MASS).to(tl.int64), 0)
        else:
            total += there.to(tl.int64)
    return tl.sum(total, 0), tl.maximum(tl.max(before, 0), low), tl.minimum(tl.min(after, 0), high - 1)


@triton.jit
def _halved(its, inside, by, number, whole, nearer, wanted, low, high, BLOCK: tl.constexpr, WEIGHED: tl.constexpr):
    """The last distance of low .. high - 1 with less than `wanted` before it, where `nearer` is what is before low.
    Brackets end at distances that tokens have: there are only as many steps as halve those."""
    while high - low > 1:
        middle = low + (high - low) // 2
        there, before, after = _split(its, inside, by, number, whole, low, middle, high, BLOCK, WEIGHED)
        enough = (nearer + there).to(tl.float64) >= wanted
        nearer = tl.where(enough, nearer, nearer + there)
        low, high = tl.where(enough, low, after), tl.where(enough, before + 1, high)
    return low


@triton.jit
def find(
    logits, largest, temperature, log_min_p, top_k, top_p, rungs, brackets, used, sums, inside, least, size, row_stride,
    token_stride, parts, ROOM, BLOCK: tl.constexpr, PARTS: tl.constexpr, RUNGS: tl.constexpr,
):  # fmt: skip
    """The least score that stays in a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    top, by, k, p, going = _asked(largest, temperature, top_k, top_p, row, size)
    found = tl.load(log_min_p + row)
    if going:
        low, high, start, _ = _taken(brackets, row, k, p)
        at = sums + (row * parts + part) * 3
        end, number = tl.load(rungs + row * (RUNGS + 1) + RUNGS), tl.load(used + row)
        whole = number > ROOM
        number = tl.where(whole, size, number)
        nearer = tl.sum(tl.load(at, part < parts, other=0), 0)
        last, upto, every = end, nearer, nearer
        its, inside = (logits, row, size, row_stride, token_stride, top), inside + row * ROOM
        if k < MOST:
            last = _halved(its, inside, by, number, whole, nearer, k.to(tl.float64), low, high, BLOCK, False)
            if p < 1:
                over = tl.where(last < end, _last(_score(tl.where(last < end, last, 0), by), by) + 1, end)
                every = _split(its, inside, by, number, whole, start, over, end, BLOCK, True)[0]
                low, high, nearer, upto = start, over, every - every, every
        else:
            upto = tl.sum(tl.load(at + 1, part < parts, other=0), 0)
            every = tl.sum(tl.load(at + 2, part < parts, other=0), 0)
        if p < 1:
            share = p * every.to(tl.float64)
            right = (nearer.to(tl.float64) < share) & (upto.to(tl.float64) >= share)
            whole, number = whole | (right == 0), tl.where(right, number, size)
            low, high, nearer = tl.where(right, low, 0), tl.where(right, high, end), tl.where(right, nearer, 0)
            nucleus = _halved(its, inside, by, number, whole, nearer, share, low, high, BLOCK, True)
            last = tl.minimum(last, nucleus)
        found = tl.where(last < end, _score(tl.where(last < end, last, 0), by), found)
    tl.store(least + row, found)
