"""`kernels.grouping` in Triton: a round of merging in three launches, and no wait for the device.

`costs` multiplies free tokens with one another, a tile at a time, and keeps the best partner of each. `choose` takes
the cheapest of a row: one program a row, by bisection over the bits of the costs. `merge` writes one group a program,
members added in the order of the text.

What a program computes depends on its own row alone, in tiles of fixed sizes, and nothing is added atomically: a row
alone and in any batch gives the same bits. Products of 16-bit states are exact and added up in float32; those of
float32 states are no TF32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

JOINERS, OTHERS = 64, 128  # of a tile
DEPTH = 128  # bytes of a tile's channels
TOKENS = 8  # of a program that reads them one by one
LIST, ROW = 128, 512  # tokens of a list and of a row that kernels are compiled for, unless there are more


def squares(states: Tensor, compared: int) -> Tensor:
    """[B, T, C] -> [B, T] float32: squared norms of the first `compared` channels."""
    rows, tokens, _ = states.shape
    out = states.new_empty(rows, tokens, dtype=torch.float32)
    if out.numel():
        _squares[triton.cdiv(tokens, TOKENS), rows](
            states, out, states.stride(0), states.stride(1), tokens, C=compared,
            BLOCK=triton.next_power_of_2(compared), TOKENS=TOKENS, num_warps=8,
        )  # fmt: skip
    return out


def numbered(free: Tensor) -> Tensor:
    """[B, T] bool -> [B, T] int32: the columns of each row's free tokens, in order; behind them anything."""
    rows, tokens = free.shape
    out = torch.empty(rows, tokens, dtype=torch.int32, device=free.device)
    _numbered[(rows,)](free.view(torch.uint8), out, tokens, BLOCK=triton.next_power_of_2(tokens), num_warps=4)
    return out


def costs(
    states: Tensor, norms: Tensor, mass: Tensor, position: Tensor, index: Tensor, counts: Tensor, most: int,
    distance: float, compared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What joining costs every second free token, and the column of the one it would join: [B, A], float32 and int32.

    Args:
        states: [B, T, C], channels side by side. norms: [B, T] as `squares` says.
        mass, position: [B, T] float32 and int64. index: [B, T] as `numbered` says.
        counts: [B] int32 free tokens. most: the largest of them.
        distance: see EncoderMerge. compared: channels that count.
    """
    rows, tokens, _ = states.shape
    joiners = max(1, most // 2)
    cost = states.new_empty(rows, joiners, dtype=torch.float32)
    best = torch.empty_like(cost, dtype=torch.int32)
    _costs[triton.cdiv(joiners, JOINERS), rows](
        states, norms, mass, position, index, counts, cost, best, states.stride(0), states.stride(1), tokens, joiners,
        distance, C=compared, BM=JOINERS, BN=OTHERS, BK=DEPTH // states.element_size(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return cost, best


def choose(
    cost: Tensor, best: Tensor, joins: Tensor, most: int, free: Tensor, sizes: Tensor, position: Tensor, place: Tensor,
    width: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The `joins` [B] cheapest of each row join; of equal ones those that come first.

    Args:
        most: the largest of joins. place: [B, S] int64, the token that each column of the input is so far.
        width: of what stays.

    Returns:
        members, towards: [B, most] int32 columns of the tokens that join, in order, and of those they join;
        leaders: [B, width] int32 columns of those that stay; their free, index, position; and place as it is then.
    """
    (rows, tokens), device = free.shape, free.device
    members, towards = torch.empty(2, rows, most, dtype=torch.int32, device=device)
    leaders, index = torch.empty(2, rows, width, dtype=torch.int32, device=device)
    left = torch.empty(rows, width, dtype=torch.bool, device=device)
    stood, placed = position.new_empty(rows, width), torch.empty_like(place)
    _choose[(rows,)](
        cost, best, joins, free.view(torch.uint8), sizes, position, place, members, towards, leaders, index,
        left.view(torch.uint8), stood, placed, cost.shape[1], most, tokens, width, place.shape[1],
        BLOCK=_power(tokens, ROW), WHOLE=_power(place.shape[1], ROW),
        num_warps=4 if tokens <= 1024 else 16,
    )  # fmt: skip
    return members, towards, leaders, left, index, stood, placed


def merge_round(
    states: Tensor, sizes: Tensor, mass: Tensor, leaders: Tensor, kept: Tensor, joins: Tensor, members: Tensor,
    towards: Tensor, compared: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `choose` chose becomes one: states [B, W, C], sizes, mass, norms [B, W] float32; `kept` [B] are real."""
    (rows, tokens, channels), width = states.shape, leaders.shape[1]
    out = states.new_empty(rows, width, channels)
    sums, total, norms = torch.empty(3, rows, width, dtype=torch.float32, device=states.device)
    _merge[width, rows](
        states, sizes, mass, leaders, kept, joins, members, towards, out, sums, total, norms, states.stride(0),
        states.stride(1), tokens, width, members.shape[1], compared, C=channels,
        BLOCK=triton.next_power_of_2(channels), LIST=_power(members.shape[1], LIST), ROUND=True, num_warps=4,
    )  # fmt: skip
    return out, sums, total, norms


def merge(place: Tensor, width: int, states: Tensor, sizes: Tensor) -> Tensor:
    """`grouping.merge` of tokens whose groups are `place` [B, T] int64."""
    rows, tokens, channels = states.shape
    out = states.new_empty(rows, width, channels)
    _merge[width, rows](
        states, sizes, sizes, place, place, place, place, place, out, sizes, sizes, sizes, states.stride(0),
        states.stride(1), tokens, width, tokens, channels, C=channels, BLOCK=triton.next_power_of_2(channels),
        LIST=_power(tokens, LIST), ROUND=False, num_warps=4,
    )  # fmt: skip
    return out


def unmerge(place: Tensor, real: Tensor, states: Tensor) -> Tensor:
    """`grouping.unmerge`; arguments as there."""
    (rows, tokens), channels = place.shape, states.shape[2]
    out = states.new_empty(rows, tokens, channels)
    if out.numel():
        _unmerge[triton.cdiv(tokens, TOKENS), rows](
            states, place, real.view(torch.uint8), out, *states.stride(), *place.stride(), *real.stride(), tokens,
            C=channels, BLOCK=triton.next_power_of_2(channels), TOKENS=TOKENS, num_warps=8,
        )  # fmt: skip
    return out


def _power(number: int, least: int) -> int:
    return max(least, int(triton.next_power_of_2(number)))


@triton.jit(do_not_specialize=["tokens"])
def _squares(states, out, row_stride, stride, tokens, C: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    row, t, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    at = states + row * row_stride + t[:, None] * stride + c
    x = tl.load(at, mask=(t[:, None] < tokens) & (c < C), other=0.0).to(tl.float32)
    tl.store(out + row * tokens + t, tl.sum(x * x, 1), mask=t < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _numbered(free, out, tokens, BLOCK: tl.constexpr):
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    chosen = tl.load(free + row * tokens + t, mask=t < tokens, other=0).to(tl.int32)
    tl.store(out + row * tokens + tl.cumsum(chosen, 0) - 1, t, mask=chosen != 0)


@triton.jit(do_not_specialize=["tokens", "width", "distance"])
def _costs(states, norms, mass, position, index, counts, cost, best, row_stride, stride, tokens, width, distance,
           C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A program: BM joiners of a row, and all others of it, BN at a time."""
    row, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM
    count = tl.load(counts + row)
    joiners, others = count // 2, (count + 1) // 2
    if begin >= joiners:
        return
    states += row * row_stride
    norms, mass = norms + row * tokens, mass + row * tokens
    position, index = position + row * tokens, index + row * tokens
    j, k = begin + tl.arange(0, BM), tl.arange(0, BK)
    here = j < joiners
    left = tl.load(index + 2 * j + 1, mask=here, other=0)
    left_norm = 1.0 / tl.maximum(tl.sqrt(tl.load(norms + left)), 1e-12)
    left_position = tl.load(position + left)
    least, which = tl.full([BM], float("inf"), tl.float32), tl.zeros([BM], tl.int32)
    for start in range(0, others, BN):
        o = start + tl.arange(0, BN)
        right = tl.load(index + 2 * o, mask=o < others, other=0)
        dots = tl.zeros([BM, BN], tl.float32)
        for c in range(0, C, BK):
            a = tl.load(states + left[:, None] * stride + (c + k), mask=here[:, None] & (c + k < C), other=0.0)
            b = tl.load(states + right[:, None] * stride + (c + k), mask=(o < others)[:, None] & (c + k < C), other=0.0)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
        right_norm = 1.0 / tl.maximum(tl.sqrt(tl.load(norms + right)), 1e-12)
        away = (tl.load(position + right)[None, :] - left_position[:, None]).to(tl.float32)
        away = tl.abs(away - 0.25) / (count + 1).to(tl.float32)  # to the right it is a little further: no tie
        price = distance * away - dots * (left_norm[:, None] * right_norm[None, :])
        price = tl.where((o < others)[None, :], price, float("inf"))
        lowest, at = tl.min(price, 1, return_indices=True)
        which = tl.where(lowest < least, start + at, which)
        least = tl.minimum(least, lowest)
    paid = tl.maximum(least + 1.0, 0.0) * tl.load(mass + left)
    tl.store(cost + row * width + j, paid, mask=here)
    tl.store(best + row * width + j, tl.load(index + 2 * which, mask=here, other=0), mask=here)


@triton.jit(do_not_specialize=["offers", "most", "tokens", "width", "columns"])
def _choose(cost, best, joins, free, sizes, position, place, members, towards, leaders, index, left, stood, placed,
            offers, most, tokens, width, columns, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """A program: a row."""
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    on = t < tokens
    is_free = tl.load(free + row * tokens + t, mask=on, other=0).to(tl.int32)
    number = tl.cumsum(is_free, 0) - 1
    joiner = (is_free != 0) & (number % 2 == 1)
    price = tl.load(cost + row * offers + number // 2, mask=joiner, other=float("inf"))
    # Costs are not negative, so their bits are ordered as they are. The largest bound that fewer than `wanted` are
    # below is the cost of the last one that joins.
    key = tl.where(joiner, price.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FFFFFFF)
    wanted = tl.load(joins + row)
    bound = wanted * 0
    for bit in range(31):
        trial = bound | (1 << (30 - bit))
        bound = tl.where(tl.sum((key < trial).to(tl.int32), 0) < wanted, trial, bound)
    below = (key < bound) & joiner
    equal = (key == bound) & joiner
    room = wanted - tl.sum(below.to(tl.int32), 0)
    chosen = below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))

    target = tl.load(best + row * offers + number // 2, mask=chosen, other=0)
    real = tl.load(sizes + row * tokens + t, mask=on, other=0.0) > 0
    stays = real & (chosen == 0)
    order = tl.cumsum(stays.to(tl.int32), 0) - 1
    count = tl.sum(stays.to(tl.int32), 0)
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(members + row * most + slot, t, mask=chosen)
    tl.store(towards + row * most + slot, target, mask=chosen)
    group = tl.where(real, tl.gather(order, tl.where(chosen, target, t), 0), 0)
    s = tl.arange(0, WHOLE)
    before = tl.load(place + row * columns + s, mask=s < columns, other=0).to(tl.int32)
    tl.store(placed + row * columns + s, tl.gather(group, before, 0).to(tl.int64), mask=s < columns)

    out = row * width + order
    tl.store(leaders + out, t, mask=stays)
    tl.store(left + out, is_free.to(tl.uint8), mask=stays)
    tl.store(stood + out, tl.load(position + row * tokens + t, mask=on, other=0), mask=stays)
    still = stays & (is_free != 0)
    tl.store(index + row * width + tl.cumsum(still.to(tl.int32), 0) - 1, t * 0 + order, mask=still)
    beyond = (t >= count) & (t < width)  # of groups that the row does not have
    tl.store(left + row * width + t, tl.zeros([BLOCK], tl.uint8), mask=beyond)
    tl.store(stood + row * width + t, tl.zeros([BLOCK], tl.int64), mask=beyond)


@triton.jit(do_not_specialize=["tokens", "width", "entries", "compared"])
def _merge(states, sizes, mass, leaders, kept, joins, members, towards, out, sizes_out, mass_out, norms_out, row_stride,
           stride, tokens, width, entries, compared, C: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
           ROUND: tl.constexpr):  # fmt: skip
    """A program: a group. ROUND: a token that stays and those that join it; else the tokens whose place it is."""
    w, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    states, sizes, mass = states + row * row_stride, sizes + row * tokens, mass + row * tokens
    i, c = tl.arange(0, LIST), tl.arange(0, BLOCK)
    if ROUND:
        here = w < tl.load(kept + row)
        leader = tl.load(leaders + row * width + w, mask=here, other=0)
        column = tl.load(members + row * entries + i, mask=i < entries, other=0)
        to = tl.load(towards + row * entries + i, mask=i < entries, other=0)
        inside = (to == leader) & (i < tl.where(here, tl.load(joins + row), 0))
        joined = tl.sum(inside.to(tl.int32), 0)
        total = tl.load(sizes + leader, mask=here, other=0.0)
        importance = tl.load(mass + leader, mask=here, other=0.0)
        state = tl.load(states + leader * stride + c, mask=c < tl.where(here, C, 0), other=0.0).to(tl.float32)
        state *= tl.where(joined > 0, total, 1.0)  # what nobody joins stays as it is, bit by bit
    else:
        column = i
        inside = (tl.load(leaders + row * entries + i, mask=i < entries, other=-1) == w) & (i < entries)
        inside = inside & (tl.load(sizes + i, mask=i < entries, other=0.0) > 0)
        joined = tl.sum(inside.to(tl.int32), 0)
        total = joined.to(tl.float32) * 0.0
        importance = total
        state = tl.zeros([BLOCK], tl.float32)
    for _ in range(joined):
        one = tl.min(tl.where(inside, column, 0x7FFFFFFF), 0)
        inside = inside & (column != one)
        size = tl.load(sizes + one)
        total += size
        importance += tl.load(mass + one)
        state += size * tl.load(states + one * stride + c, mask=c < C, other=0.0).to(tl.float32)
    state /= tl.where(joined > 0, total, 1.0)
    rounded = state.to(out.dtype.element_ty)
    tl.store(out + (row * width + w) * C + c, rounded, mask=c < C)
    if ROUND:
        again = tl.where(c < compared, rounded.to(tl.float32), 0.0)
        tl.store(sizes_out + row * width + w, total)
        tl.store(mass_out + row * width + w, importance)
        tl.store(norms_out + row * width + w, tl.sum(again * again, 0))


@triton.jit(do_not_specialize=["tokens"])
def _unmerge(states, place, real, out, row_stride, stride, channel, place_row, place_stride, real_row, real_stride,
             tokens, C: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    row, t, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    here = t < tokens
    group = tl.load(place + row * place_row + t * place_stride, mask=here, other=0)
    here = here & (tl.load(real + row * real_row + t * real_stride, mask=here, other=0) != 0)
    at = states + row * row_stride + group[:, None] * stride + c * channel
    state = tl.load(at, mask=here[:, None] & (c < C), other=0.0)
    tl.store(out + (row * tokens + t)[:, None] * C + c, state, mask=(t < tokens)[:, None] & (c < C))
