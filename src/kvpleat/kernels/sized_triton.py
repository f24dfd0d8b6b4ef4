"""`kernels.sized` in Triton: one online softmax (FlashAttention-2's scheme, arXiv 2307.08691), biases by key."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)  # of a bias: finite, so that a row of nothing but padding is no NaN
# Queries of a program, keys of a step, warps, stages: where there is a window, in short rows (256 rows of 135 tokens,
# 12 heads: 143 us on an H100; with 64 keys a step 200), and in others.
NEAR, FEW, MANY = (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)
SHORT = 512  # queries of a row up to which it is short


@torch.library.custom_op("kvpleat::sized_attention", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, counts: Tensor, queries_at: Tensor, keys_at: Tensor,
    window: int, scale: float, columns: int,
) -> Tensor:  # fmt: skip
    """`sized.attend`; window: 0 for none."""
    (rows, heads, queries, channels), keys = query.shape, key.shape[2]
    out = _empty(query, columns)
    block, step, warps, stages = NEAR if window else FEW if queries <= SHORT else MANY
    if out.numel():
        _attend[triton.cdiv(queries, block), heads, rows](
            query, key, value, bias, counts, queries_at, keys_at, out, scale * LOG2_E.value, window, queries, keys,
            columns, heads, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], D=channels,
            DP=max(16, triton.next_power_of_2(channels)), BM=block, BN=step,
            ALL=triton.next_power_of_2(keys) if window else 1, WINDOW=window > 0,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Any, counts: Any, queries_at: Any, keys_at: Any, window: int,
      scale: float, columns: int) -> Tensor:  # fmt: skip
    return _empty(query, columns)


@register_flop_formula(torch.ops.kvpleat.sized_attention)
def _flops(query: Any, key: Any, value: Any, bias: Any, counts: Any, queries_at: Any, keys_at: Any, window: int,
           *rest: Any, **kwargs: Any) -> int:  # fmt: skip
    """Of what queries see at most: no two tokens stand in one place."""
    rows, heads, queries, channels = query
    keys: int = min(key[2], 2 * window - 1) if window else key[2]
    flops: int = 4 * rows * heads * queries * keys * channels
    return flops


def _empty(query: Tensor, columns: int) -> Tensor:
    rows, heads, _, channels = query.shape
    return query.new_empty(rows, columns, heads, channels)


@triton.jit(do_not_specialize=["factor", "window", "queries", "keys", "columns", "heads"])
def _attend(q, k, v, bias, counts, queries_at, keys_at, out, factor, window, queries, keys, columns, heads,
            q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, D: tl.constexpr, DP: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, ALL: tl.constexpr, WINDOW: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """A program: BM queries of a head of a row."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    there = (m < queries)[:, None] & (c < D)[None, :]
    x = tl.load(q + row * q_row + head * q_head + m[:, None] * q_token + c[None, :], mask=there, other=0.0)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    count = tl.load(counts + row)
    low, high = count * 0, count
    at = m
    if WINDOW:
        at = tl.load(queries_at + row * queries + m, mask=m < queries, other=0).to(tl.int32)
        first = tl.min(tl.where(m < queries, at, 0x3FFFFFFF), 0) - window
        last = tl.max(tl.where(m < queries, at, 0), 0) + window
        j = tl.arange(0, ALL)
        stood = tl.load(keys_at + row * keys + j, mask=j < count, other=0x3FFFFFFF).to(tl.int32)
        low = tl.sum((stood <= first).to(tl.int32), 0) // BN * BN
        high = tl.sum((stood < last).to(tl.int32), 0)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for start in range(low, high, BN):
        n = start + tl.arange(0, BN)
        inside = (n < high)[:, None] & (c < D)[None, :]
        own = tl.load(k + n[:, None] * k_token + c[None, :], mask=inside, other=0.0)
        more = tl.maximum(tl.load(bias + row * keys + n, mask=n < high, other=0.0), LEAST) * LOG2_E
        more = tl.where(n < high, more, float("-inf"))
        logits = tl.dot(x, tl.trans(own), input_precision=PRECISION) * factor + more[None, :]
        if WINDOW:
            stands = tl.load(keys_at + row * keys + n, mask=n < high, other=0).to(tl.int32)
            logits = tl.where(tl.abs(at[:, None] - stands[None, :]) < window, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        got = tl.load(v + n[:, None] * v_token + c[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(got.dtype), got, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + ((row * columns + m[:, None]) * heads + head) * D + c[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=there)
