"""`relaxed.relaxed_attention` in Triton, forward and backward (FlashAttention-2's scheme, arXiv 2307.08691).

Far keys and near keys are two passes of one loop over key blocks. Where they are the same tensors (nothing merges) one
pass reads them all. Gradients of the logits that belong to a key (keep, size) fall out of the pass that computes its
gradient: no atomic operation, the same result every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(q, keys, keep, size, rows, columns, start, T, delay, scale,
            HAS_KEEP: tl.constexpr, HAS_SIZE: tl.constexpr, FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr,
            MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Logits (base 2) [rows, columns] of one block; keys [D, columns]; keep, size point at the KV head's numbers."""
    scores = tl.dot(q, keys, input_precision=PRECISION) * (scale * LOG2_E)
    offset = rows[:, None] - columns[None, :]
    if HAS_SIZE and not TO_DELAY:
        added = tl.load(size + columns, mask=columns < T, other=0.0) * LOG2_E
        if MASKED and not FROM_DELAY:
            scores += tl.where(offset >= delay, added[None, :], 0.0)
        else:
            scores += added[None, :]
    if HAS_KEEP and not TO_DELAY:
        added = tl.load(keep + columns, mask=columns < T, other=0.0) * LOG2_E
        if MASKED:
            scores += tl.where(offset > delay, added[None, :], 0.0)
        else:
            scores += added[None, :]
    if MASKED:
        visible = (columns[None, :] >= start[:, None]) & (offset >= (delay if FROM_DELAY else 0))
        if TO_DELAY:
            visible = visible & (offset < delay)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _forward_pass(q, k, v, step, keep, size, low, high, rows, start, T, delay, scale, top, total, acc,
                  D: tl.constexpr, N: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SIZE: tl.constexpr,
                  FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over the key blocks of [low, high)."""
    channels = tl.arange(0, D)
    for n in range(low, high, N):
        columns = n + tl.arange(0, N)
        at = columns[:, None] * step + channels[None, :]
        keys = tl.load(k + at, mask=columns[:, None] < T, other=0.0)
        scores = _scores(q, tl.trans(keys), keep, size, rows, columns, start, T, delay, scale,
                         HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, MASKED, PRECISION)  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(v + at, mask=columns[:, None] < T, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def _forward(q, k, v, far_k, far_v, keep, size, starts, out, lse, T, delay, scale, Q, H,
             D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SIZE: tl.constexpr,
             POOLED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest work first
    row, head = tl.program_id(1) // Q, tl.program_id(1) % Q
    stream = (row * H + head // (Q // H)).to(tl.int64)
    here = (row * Q + head).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    channels = tl.arange(0, D)
    at = (row.to(tl.int64) * T * Q + head) * D + rows[:, None] * (Q * D) + channels[None, :]
    queries = tl.load(q + at, mask=rows[:, None] < T, other=0.0)
    start = tl.load(starts + row * T + rows, mask=rows < T, other=T)
    low = tl.min(start) // N * N
    stop = tl.minimum(block * M + M, T)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    keep += stream * T
    size += stream * T
    base = (row.to(tl.int64) * T * H + head // (Q // H)) * D
    last_start = tl.max(tl.where(rows < T, start, 0))
    # Blocks of keys that every query sees and that are old for all of them need no masks.
    clear_low = tl.minimum((last_start + N - 1) // N * N, stop)
    clear_high = tl.maximum((block * M - delay) // N * N, clear_low)
    if POOLED:
        high = tl.maximum(stop - delay, 0)
        first = tl.minimum(clear_low, high)
    else:
        high = stop
        first = clear_low
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, low, first, rows, start, T, delay,
                                    scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True, PRECISION)  # fmt: skip
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, clear_low, clear_high, rows, start,
                                    T, delay, scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, False,
                                    PRECISION)  # fmt: skip
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, clear_high, high, rows, start, T,
                                    delay, scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True,
                                    PRECISION)  # fmt: skip
    if POOLED:
        near_low = tl.maximum((block * M - delay + 1) // N * N, low)
        if delay > 0:
            top, total, acc = _forward_pass(queries, k + base, v + base, H * D, keep, size, near_low, stop, rows, start, T,
                                            delay, scale, top, total, acc, D, N, False, False, False, True, True,
                                            PRECISION)  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(out + at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < T)
    tl.store(lse + here * T + rows, top + tl.log2(safe), mask=rows < T)


@triton.jit
def _delta(out, grad, delta, T, Q, D: tl.constexpr, M: tl.constexpr):
    """Row sums of out * grad."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row, head = (tl.program_id(1) // Q).to(tl.int64), tl.program_id(1) % Q
    at = (row * T * Q + head) * D + rows[:, None] * (Q * D) + tl.arange(0, D)[None, :]
    o = tl.load(out + at, mask=rows[:, None] < T, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=rows[:, None] < T, other=0.0).to(tl.float32)
    tl.store(delta + tl.program_id(1).to(tl.int64) * T + rows, tl.sum(o * g, axis=1), mask=rows < T)


@triton.jit
def _query_pass(q, g, k, v, step, keep, size, low, high, rows, start, lse, delta, T, delay, scale, acc,
                D: tl.constexpr, N: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SIZE: tl.constexpr,
                FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of a block of queries from the key blocks of [low, high)."""
    channels = tl.arange(0, D)
    for n in range(low, high, N):
        columns = n + tl.arange(0, N)
        at = columns[:, None] * step + channels[None, :]
        keys = tl.load(k + at, mask=columns[:, None] < T, other=0.0)
        values = tl.load(v + at, mask=columns[:, None] < T, other=0.0)
        scores = _scores(q, tl.trans(keys), keep, size, rows, columns, start, T, delay, scale,
                         HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, MASKED, PRECISION)  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        slope = weights * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - delta[:, None])
        acc += tl.dot(slope.to(keys.dtype), keys, input_precision=PRECISION)
    return acc


@triton.jit
def _backward_queries(q, k, v, far_k, far_v, keep, size, starts, grad, lse, delta, grad_q, T, delay, scale, Q, H,
                      D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_KEEP: tl.constexpr,
                      HAS_SIZE: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, head = tl.program_id(1) // Q, tl.program_id(1) % Q
    stream = (row * H + head // (Q // H)).to(tl.int64)
    here = (row * Q + head).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    at = (row.to(tl.int64) * T * Q + head) * D + rows[:, None] * (Q * D) + tl.arange(0, D)[None, :]
    queries = tl.load(q + at, mask=rows[:, None] < T, other=0.0)
    g = tl.load(grad + at, mask=rows[:, None] < T, other=0.0)
    start = tl.load(starts + row * T + rows, mask=rows < T, other=T)
    row_lse = tl.load(lse + here * T + rows, mask=rows < T, other=float("inf"))
    row_delta = tl.load(delta + here * T + rows, mask=rows < T, other=0.0)
    low = tl.min(start) // N * N
    stop = tl.minimum(block * M + M, T)
    last_start = tl.max(tl.where(rows < T, start, 0))
    clear_low = tl.minimum((last_start + N - 1) // N * N, stop)
    clear_high = tl.maximum((block * M - delay) // N * N, clear_low)
    keep += stream * T
    size += stream * T
    base = (row.to(tl.int64) * T * H + head // (Q // H)) * D
    if POOLED:
        high = tl.maximum(stop - delay, 0)
        first = tl.minimum(clear_low, high)
    else:
        high = stop
        first = clear_low
    acc = tl.zeros([M, D], tl.float32)
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, low, first, rows, start, row_lse, row_delta,
                      T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True, PRECISION)  # fmt: skip
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, clear_low, clear_high, rows, start, row_lse,
                      row_delta, T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, False, PRECISION)  # fmt: skip
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, clear_high, high, rows, start, row_lse,
                      row_delta, T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True, PRECISION)  # fmt: skip
    if POOLED:
        near_low = tl.maximum((block * M - delay + 1) // N * N, low)
        if delay > 0:
            acc = _query_pass(queries, g, k + base, v + base, H * D, keep, size, near_low, stop, rows, start, row_lse,
                              row_delta, T, delay, scale, acc, D, N, False, False, False, True, True, PRECISION)  # fmt: skip
    tl.store(grad_q + at, (acc * scale).to(grad_q.dtype.element_ty), mask=rows[:, None] < T)


@triton.jit
def _key_pass(q, grad, step, lse, delta, starts, keys, values, added, low, high, columns, T, delay, scale,
              key_acc, value_acc, keep_acc, size_acc, D: tl.constexpr, M: tl.constexpr, HAS_KEEP: tl.constexpr,
              HAS_SIZE: tl.constexpr, FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr, MASKED: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of a block of keys from the query blocks of [low, high). Scores stand transposed: [columns, rows]."""
    channels = tl.arange(0, D)
    keep_added, size_added = added
    for m in range(low, high, M):
        rows = m + tl.arange(0, M)
        at = rows[:, None] * step + channels[None, :]
        queries = tl.load(q + at, mask=rows[:, None] < T, other=0.0)
        g = tl.load(grad + at, mask=rows[:, None] < T, other=0.0)
        row_lse = tl.load(lse + rows, mask=rows < T, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=rows < T, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
        offset = rows[None, :] - columns[:, None]
        if HAS_SIZE and not TO_DELAY:
            if MASKED and not FROM_DELAY:
                scores += tl.where(offset >= delay, size_added[:, None], 0.0)
            else:
                scores += size_added[:, None]
        if HAS_KEEP and not TO_DELAY:
            if MASKED:
                scores += tl.where(offset > delay, keep_added[:, None], 0.0)
            else:
                scores += keep_added[:, None]
        if MASKED:
            start = tl.load(starts + rows, mask=rows < T, other=T)
            visible = (columns[:, None] >= start[None, :]) & (offset >= (delay if FROM_DELAY else 0))
            if TO_DELAY:
                visible = visible & (offset < delay)
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores - row_lse[None, :])
        value_acc += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        slope = weights * (tl.dot(values, tl.trans(g), input_precision=PRECISION) - row_delta[None, :])
        key_acc += tl.dot(slope.to(queries.dtype), queries, input_precision=PRECISION)
        if HAS_KEEP and not TO_DELAY:
            keep_acc += tl.sum(tl.where(offset > delay, slope, 0.0) if MASKED else slope, axis=1)
        if HAS_SIZE and not TO_DELAY:
            size_acc += tl.sum(tl.where(offset >= delay, slope, 0.0) if MASKED else slope, axis=1)
    return key_acc, value_acc, keep_acc, size_acc


@triton.jit
def _backward_keys(q, k, v, keep, size, starts, ends, grad, lse, delta, grad_k, grad_v, grad_keep, grad_size,
                   T, delay, scale, Q, H, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_KEEP: tl.constexpr,
                   HAS_SIZE: tl.constexpr, FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)  # the first keys are seen by the most queries
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    stream = (row * H + head).to(tl.int64)
    columns = block * N + tl.arange(0, N)
    channels = tl.arange(0, D)
    at = (row.to(tl.int64) * T * H + head) * D + columns[:, None] * (H * D) + channels[None, :]
    keys = tl.load(k + at, mask=columns[:, None] < T, other=0.0)
    values = tl.load(v + at, mask=columns[:, None] < T, other=0.0)
    keep_added = tl.zeros([N], tl.float32)
    size_added = tl.zeros([N], tl.float32)
    if HAS_KEEP and not TO_DELAY:
        keep_added = tl.load(keep + stream * T + columns, mask=columns < T, other=0.0) * LOG2_E
    if HAS_SIZE and not TO_DELAY:
        size_added = tl.load(size + stream * T + columns, mask=columns < T, other=0.0) * LOG2_E
    end = tl.load(ends + row * T + columns, mask=columns < T, other=0)
    last_end = tl.max(end)
    first_end = tl.min(tl.where(columns < T, end, T))
    stop = tl.minimum(block * N + N, T)
    low = (block * N + (delay if FROM_DELAY else 0)) // M * M
    high = tl.minimum(last_end, stop - 1 + delay) if TO_DELAY else last_end
    clear_low = tl.minimum((stop + delay + M - 1) // M * M, T)  # from here on all queries find all these keys old
    clear_high = tl.maximum(first_end // M * M, clear_low)
    key_acc = tl.zeros([N, D], tl.float32)
    value_acc = tl.zeros([N, D], tl.float32)
    keep_acc = tl.zeros([N], tl.float32)
    size_acc = tl.zeros([N], tl.float32)
    for member in range(0, Q // H):
        query_head = head * (Q // H) + member
        here = (row * Q + query_head).to(tl.int64) * T
        first = (row.to(tl.int64) * T * Q + query_head) * D
        if TO_DELAY:
            key_acc, value_acc, keep_acc, size_acc = _key_pass(
                q + first, grad + first, Q * D, lse + here, delta + here, starts + row * T, keys, values,
                (keep_added, size_added), low, high, columns, T, delay, scale, key_acc, value_acc, keep_acc, size_acc,
                D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, True, PRECISION)  # fmt: skip
        else:
            key_acc, value_acc, keep_acc, size_acc = _key_pass(
                q + first, grad + first, Q * D, lse + here, delta + here, starts + row * T, keys, values,
                (keep_added, size_added), low, tl.minimum(clear_low, high), columns, T, delay, scale, key_acc,
                value_acc, keep_acc, size_acc, D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, True, PRECISION)  # fmt: skip
            key_acc, value_acc, keep_acc, size_acc = _key_pass(
                q + first, grad + first, Q * D, lse + here, delta + here, starts + row * T, keys, values,
                (keep_added, size_added), clear_low, clear_high, columns, T, delay, scale, key_acc, value_acc,
                keep_acc, size_acc, D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, False, PRECISION)  # fmt: skip
            key_acc, value_acc, keep_acc, size_acc = _key_pass(
                q + first, grad + first, Q * D, lse + here, delta + here, starts + row * T, keys, values,
                (keep_added, size_added), clear_high, high, columns, T, delay, scale, key_acc, value_acc, keep_acc,
                size_acc, D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, True, PRECISION)  # fmt: skip
    tl.store(grad_k + at, (key_acc * scale).to(grad_k.dtype.element_ty), mask=columns[:, None] < T)
    tl.store(grad_v + at, value_acc.to(grad_v.dtype.element_ty), mask=columns[:, None] < T)
    if HAS_KEEP and not TO_DELAY:
        tl.store(grad_keep + stream * T + columns, keep_acc, mask=columns < T)
    if HAS_SIZE and not TO_DELAY:
        tl.store(grad_size + stream * T + columns, size_acc, mask=columns < T)


def attention(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    size: Tensor | None,
    doc_start: Tensor,
    delay: int,
    scale: float,
) -> Tensor:
    """`relaxed.relaxed_attention`; arguments as there."""
    far_k, far_v = (None, None) if far is None else far
    out, _ = _attention(q, *near, far_k, far_v, keep, size, doc_start, delay, scale)
    return out


@torch.library.custom_op("kvpleat::relaxed_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor | None,
    far_v: Tensor | None,
    keep: Tensor | None,
    size: Tensor | None,
    doc_start: Tensor,
    delay: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, far_k, far_v = _token_major(q, k, v, far_k, far_v)
    keep, size = _contiguous(keep, size)
    (rows, heads, tokens, channels), kv_heads = q.shape, k.shape[1]
    out = _like(q)
    lse = torch.empty(rows, heads, tokens, dtype=torch.float32, device=q.device)
    m, n, options = _blocks(q, "forward")
    _forward[triton.cdiv(tokens, m), rows * heads](
        q, k, v, k if far_k is None else far_k, v if far_v is None else far_v, lse if keep is None else keep,
        lse if size is None else size, doc_start, out, lse, tokens, delay, scale, heads, kv_heads, channels, m, n,
        keep is not None, size is not None, far_k is not None, **options)  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, far_k: Any, far_v: Any, keep: Any, size: Any, doc_start: Tensor, delay: int,
      scale: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvpleat::relaxed_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor | None,
    far_v: Tensor | None,
    keep: Tensor | None,
    size: Tensor | None,
    doc_start: Tensor,
    out: Tensor,
    lse: Tensor,
    delay: int,
    scale: float,
) -> list[Tensor]:
    grad, q, k, v, far_k, far_v = _token_major(grad, q, k, v, far_k, far_v)
    keep, size = _contiguous(keep, size)
    (rows, heads, tokens, channels), kv_heads = q.shape, k.shape[1]
    pooled = far_k is not None
    flags = keep is not None, size is not None
    keep_in, size_in = lse if keep is None else keep, lse if size is None else size
    old_k, old_v = (k, v) if far_k is None or far_v is None else (far_k, far_v)
    delta = torch.empty_like(lse)
    _delta[triton.cdiv(tokens, 64), rows * heads](out, grad, delta, tokens, heads, channels, 64)
    grad_q = _like(q)
    m, n, options = _blocks(q, "queries")
    _backward_queries[triton.cdiv(tokens, m), rows * heads](
        q, k, v, old_k, old_v, keep_in, size_in, doc_start, grad, lse, delta, grad_q, tokens, delay, scale, heads,
        kv_heads, channels, m, n, *flags, pooled, **options)  # fmt: skip
    grads = [_like(old_k), _like(old_v)]
    logit_grads = [torch.empty(rows, kv_heads, tokens, dtype=torch.float32, device=q.device) for _ in range(2)]
    ends = _document_ends(doc_start)
    m, n, options = _blocks(q, "keys")
    grid = triton.cdiv(tokens, n), rows * kv_heads
    arguments = (keep_in, size_in, doc_start, ends, grad, lse, delta)
    sizes = (tokens, delay, scale, heads, kv_heads, channels, m, n, *flags)
    _backward_keys[grid](q, old_k, old_v, *arguments, *grads, *logit_grads, *sizes, pooled, False, **options)
    if not pooled:
        return [grad_q, *grads, *(x.new_empty(0) for x in grads), *logit_grads]
    near_grads = [_like(k).zero_(), _like(v).zero_()]
    if delay:
        _backward_keys[grid](q, k, v, *arguments, *near_grads, *logit_grads, *sizes, False, True, **options)
    return [grad_q, *near_grads, *grads, *logit_grads]


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, far_k: Any, far_v: Any, keep: Any, size: Any, doc_start: Tensor,
      out: Tensor, lse: Tensor, delay: int, scale: float) -> list[Tensor]:  # fmt: skip
    other = [_like(x) if far_k is not None else x.new_empty(0) for x in (k, v)]
    logits = [k.new_empty(k.shape[:3], dtype=torch.float32) for _ in range(2)]
    return [_like(q), _like(k), _like(v), *other, *logits]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.delay, ctx.scale = inputs[8:]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, far_k, far_v, keep, size, doc_start, out, lse = ctx.saved_tensors
    grads = torch.ops.kvpleat.relaxed_attention_backward(
        grad, q, k, v, far_k, far_v, keep, size, doc_start, out, lse, ctx.delay, ctx.scale
    )
    given = (q, k, v, far_k, far_v, keep, size)
    return (*(None if x is None else g for x, g in zip(given, grads, strict=True)), None, None, None)


_attention.register_autograd(_backward, setup_context=_setup)


def _like(x: Tensor) -> Tensor:
    """Room for a tensor [R, heads, T, D] with a token's heads side by side: what projections write and read."""
    rows, heads, tokens, channels = x.shape
    return x.new_empty(rows, tokens, heads, channels).transpose(1, 2)


def _token_major(*tensors: Tensor | None) -> Any:
    """The same [R, heads, T, D], with a token's heads side by side in memory."""
    return [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def _document_ends(doc_start: Tensor) -> Tensor:
    """[R, T] index after the last token of each token's document."""
    rows, tokens = doc_start.shape
    index = torch.arange(1, tokens + 1, dtype=torch.int32, device=doc_start.device).expand(rows, tokens)
    last = torch.zeros(rows, tokens, dtype=torch.int32, device=doc_start.device)
    last.scatter_reduce_(1, doc_start.long(), index, "amax")
    return last.gather(1, doc_start.long())


def _blocks(q: Tensor, kernel: str) -> tuple[int, int, dict[str, Any]]:
    """Block of queries, block of keys, and launch options of a kernel."""
    exact = q.dtype == torch.float32
    options = {"PRECISION": "ieee" if exact else "tf32"}
    if exact or q.shape[-1] > 128:
        return 32, 32, {**options, "num_warps": 4, "num_stages": 1}
    if kernel == "forward":
        return 128, 64, {**options, "num_warps": 4 if q.shape[-1] <= 64 else 8, "num_stages": 3}
    if kernel == "queries":
        return 128, 64, {**options, "num_warps": 8, "num_stages": 2}
    return 64, 128, {**options, "num_warps": 8, "num_stages": 2}
