"""The groups that a chunk's keys form, for `extend_kernels_triton`: what one program computes.

A group is a running weighted sum, as in `kernels.pooling`. Within a block of keys it is a product with a matrix of
shares; what a block takes over from before it is summed up going back from it, as far as its first group reaches. So
all blocks are computed at once, and a block whose first key begins a group reads nothing before it.

Names: i and j count the keys of a chunk, the young ones of the past first; those below 0 are what the chunk began with.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

GONE = tl.constexpr(-110.0)  # a share whose log is below it is 0 in float32


@triton.jit
def raw(new, raw, young, i, channel, on, step, D: tl.constexpr):
    """Keys, or values, i of a chunk: of the raw ones where they are young, and else of the new ones."""
    old = on & (i < young)
    x = tl.load(new + i.to(tl.int64) * step + channel, mask=on & (i >= young), other=0.0)
    return tl.where(old, tl.load(raw + i * D + channel, mask=old, other=0.0), x)


@triton.jit
def form(keys, values, raw_keys, raw_values, cos, sin, carries, shares, before, before_carry, members, member_carry,
         k, v, young, block, formed, going, key_token, value_token, D: tl.constexpr, CHANNELS: tl.constexpr,
         HALF: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SUMS: tl.constexpr, WEIGHS: tl.constexpr,
         B: tl.constexpr):  # fmt: skip
    """The groups of a block of keys: keys k and values v [B, CHANNELS], and sizes [B]; both as they are where nothing
    joined, bit for bit."""
    i, channel = block * B + tl.arange(0, B), tl.arange(0, CHANNELS)[None, :]
    on = i < formed
    joined = tl.load(carries + i, mask=on, other=float("-inf")) > float("-inf")
    x, u, z = _weighed(k, v, cos, sin, shares, i, on, HALF, WEIGHS)
    if SUMS:
        x, u, z = _summed(keys, values, raw_keys, raw_values, cos, sin, carries, shares, before, x, u, z, young, block,
                          formed, key_token, value_token, D, CHANNELS, HALF, WIDTH, KNOWN, WEIGHS, B)  # fmt: skip
        newest = (i == tl.where(going, formed, 0) - 1)[:, None]
        tl.store(members + channel + 0 * i[:, None], x, mask=newest & (channel < D))
        tl.store(members + D + channel + 0 * i[:, None], u, mask=newest & (channel < D))
        tl.store(members + 2 * D + 0 * i, z, mask=i == tl.where(going, formed, 0) - 1)
    else:
        share = tl.full([B], 1.0, tl.float32)
        for back in range(1, KNOWN + 1):
            share *= tl.exp(_carry(carries, before_carry, i - back + 1, on, KNOWN))
            some = share > 0
            a, c, d = _added(keys, values, raw_keys, raw_values, cos, sin, shares, before, young, i - back, on & some,
                             key_token, value_token, D, CHANNELS, HALF, WIDTH, KNOWN, WEIGHS)  # fmt: skip
            some_share = tl.where(some, share, 0.0)
            x, u = x + some_share[:, None] * a, u + some_share[:, None] * c
            z += some_share * d
        if (formed > block * B) & (formed <= block * B + B):
            for n in range(0, KNOWN, B):
                j = n + tl.arange(0, B)
                there = j < tl.where(going, KNOWN, 0)
                a, c, d = _added(keys, values, raw_keys, raw_values, cos, sin, shares, before, young,
                                 formed - KNOWN + j, there, key_token, value_token, D, CHANNELS, HALF, WIDTH, KNOWN,
                                 WEIGHS)  # fmt: skip
                line = members + j[:, None] * WIDTH
                tl.store(line + channel, a, mask=there[:, None] & (channel < D))
                tl.store(line + D + channel, c, mask=there[:, None] & (channel < D))
                tl.store(members + j * WIDTH + 2 * D, d, mask=there)
                tl.store(member_carry + j, _carry(carries, before_carry, formed - KNOWN + j, there, KNOWN), mask=there)
    z = tl.where(on, z, 1.0)
    mean = _turned(x / z[:, None], cos, sin, i, on, -1.0, HALF)
    k = tl.where(joined[:, None], mean.to(k.dtype), k)
    v = tl.where(joined[:, None], (u / z[:, None]).to(v.dtype), v)
    return k, v, z


@triton.jit
def _turned(x, cos, sin, i, on, way, HALF: tl.constexpr):
    """Keys i [B, CHANNELS] turned back from their positions, or to them (way -1)."""
    if HALF > 0:
        channel, line = tl.arange(0, x.shape[1])[None, :], i[:, None]
        turns, at = on[:, None] & (channel < 2 * HALF), line.to(tl.int64) * HALF + channel % HALF
        c, s = tl.load(cos + at, mask=turns, other=1.0), tl.load(sin + at, mask=turns, other=0.0)
        partner = tl.where(channel < HALF, channel + HALF, tl.where(channel < 2 * HALF, channel - HALF, channel))
        x = x * c + tl.gather(x, partner + 0 * line, 1) * tl.where(channel < HALF, s, -s) * way
    return x


@triton.jit
def _carry(carries, before_carry, i, on, KNOWN: tl.constexpr):
    """The log share of the group before that joins keys i, of which those below 0 are before the chunk's."""
    old = tl.load(before_carry + KNOWN + i, mask=on & (i < 0), other=0.0)
    return tl.where(i < 0, old, tl.load(carries + i, mask=on & (i >= 0), other=0.0))


@triton.jit
def _weighed(k, v, cos, sin, shares, i, on, HALF: tl.constexpr, WEIGHS: tl.constexpr):
    """What keys k and values v of keys i add to their groups: key before rotation, value, weight; 0 where not `on`."""
    x, u, z = k.to(tl.float32), v.to(tl.float32), on.to(tl.float32)
    x = tl.where(on[:, None], _turned(x, cos, sin, i, on, 1.0, HALF), 0.0)
    u = tl.where(on[:, None], u, 0.0)
    if WEIGHS:
        z = tl.load(shares + i, mask=on, other=0.0)
        x, u = x * z[:, None], u * z[:, None]
    return x, u, z


@triton.jit
def _added(keys, values, raw_keys, raw_values, cos, sin, shares, before, young, i, on, key_token, value_token,
           D: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr,
           WEIGHS: tl.constexpr):  # fmt: skip
    """`_weighed` of any keys i, also of those below 0."""
    channel, line, own = tl.arange(0, CHANNELS)[None, :], i[:, None], on & (i >= 0)
    wide, old = own[:, None] & (channel < D), (on & (i < 0))[:, None]
    k = raw(keys, raw_keys, young, line, channel, wide, key_token, D)
    v = raw(values, raw_values, young, line, channel, wide, value_token, D)
    x, u, z = _weighed(k, v, cos, sin, shares, i, own, HALF, WEIGHS)
    at = before + (KNOWN + line) * WIDTH
    x += tl.load(at + channel, mask=old & (channel < D), other=0.0)
    u += tl.load(at + D + channel, mask=old & (channel < D), other=0.0)
    z += tl.load(before + (KNOWN + i) * WIDTH + 2 * D, mask=on & (i < 0), other=0.0)
    return x, u, z


@triton.jit
def _summed(keys, values, raw_keys, raw_values, cos, sin, carries, shares, before, x, u, z, young, block, formed,
            key_token, value_token, D: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
            KNOWN: tl.constexpr, WEIGHS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """The sums of the groups after each key of a block: of what they add (x, u, z), of the block's own, and of what
    lies before it as far as the group at its begin reaches."""
    lane = tl.arange(0, B)
    total, number = _logs(carries, block * B + lane, block * B + lane < formed)
    reaches = (number[:, None] == number[None, :]) & (lane[:, None] >= lane[None, :])
    share = tl.exp(tl.where(reaches, total[:, None] - total[None, :], float("-inf")).to(tl.float32))
    from_before = tl.exp(tl.where(number == 0, total, float("-inf")).to(tl.float32))
    x = tl.dot(share, x, input_precision="tf32x3")
    u = tl.dot(share, u, input_precision="tf32x3")
    z = tl.sum(share * z[None, :], 1)
    run = tl.full([], 0.0, tl.float64)  # log of what is left of the block before
    p, alive = block - 1, tl.sum((from_before > 0).to(tl.int32)) > 0
    while alive & (p >= -1):
        j = p * B + lane  # at last those below 0, of which only the sum that the chunk began with counts
        total, number = _logs(carries, tl.maximum(j, 0), j >= 0)
        left, ends = tl.sum(tl.where(lane == B - 1, total, 0.0)), tl.sum(tl.where(lane == B - 1, number, 0))
        part = tl.exp(tl.where(number == ends, run + left - total, float("-inf")).to(tl.float32))
        part = tl.where(j >= -1, part, 0.0)
        a, c, d = _added(keys, values, raw_keys, raw_values, cos, sin, shares, before, young, j, part > 0, key_token,
                         value_token, D, CHANNELS, HALF, WIDTH, KNOWN, WEIGHS)  # fmt: skip
        x += from_before[:, None] * tl.sum(part[:, None] * a, 0)[None, :]
        u += from_before[:, None] * tl.sum(part[:, None] * c, 0)[None, :]
        z += from_before * tl.sum(part * d)
        run += left
        alive = (ends == 0) & (run > GONE)
        p -= 1
    return x, u, z


@triton.jit
def _logs(carries, i, on):
    """Of keys i, up to each: the log of the share that is left of what was before them, and how many groups begin,
    which do not count in it. float64: small differences of large sums are taken."""
    carry = tl.load(carries + i, mask=on, other=0.0)
    starts = carry == float("-inf")
    return tl.cumsum(tl.where(starts, 0.0, carry).to(tl.float64), 0), tl.cumsum(starts.to(tl.int32), 0)
