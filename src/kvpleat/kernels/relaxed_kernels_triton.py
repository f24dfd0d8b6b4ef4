"""The Triton kernels of `relaxed_triton`: what one program computes.

Far keys and near keys are two passes of one loop over key blocks. Where they are the same tensors (nothing merges) one
pass reads them all. Gradients of the logits that belong to a key (keep, size) fall out of the pass that computes its
gradient: no atomic operation, the same result every time.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

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
                  FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr, MASKED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
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
def forward(q, k, v, far_k, far_v, keep, size, starts, out, lse, T, delay, scale, Q, H,
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
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, low, first, rows, start,
                                    T, delay, scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True,
                                    PRECISION)  # fmt: skip
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, clear_low, clear_high,
                                    rows, start, T, delay, scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED,
                                    False, False, PRECISION)  # fmt: skip
    top, total, acc = _forward_pass(queries, far_k + base, far_v + base, H * D, keep, size, clear_high, high, rows,
                                    start, T, delay, scale, top, total, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED,
                                    False, True, PRECISION)  # fmt: skip
    if POOLED:
        near_low = tl.maximum((block * M - delay + 1) // N * N, low)
        if delay > 0:
            top, total, acc = _forward_pass(queries, k + base, v + base, H * D, keep, size, near_low, stop, rows,
                                            start, T, delay, scale, top, total, acc, D, N, False, False, False,
                                            True, True, PRECISION)  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(out + at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < T)
    tl.store(lse + here * T + rows, top + tl.log2(safe), mask=rows < T)


@triton.jit
def row_sums(out, grad, delta, T, Q, D: tl.constexpr, M: tl.constexpr):
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
                FROM_DELAY: tl.constexpr, TO_DELAY: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
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
def backward_queries(q, k, v, far_k, far_v, keep, size, starts, grad, lse, delta, grad_q, T, delay, scale, Q, H,
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
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, low, first, rows, start, row_lse,
                      row_delta, T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True,
                      PRECISION)  # fmt: skip
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, clear_low, clear_high, rows, start,
                      row_lse, row_delta, T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, False,
                      PRECISION)  # fmt: skip
    acc = _query_pass(queries, g, far_k + base, far_v + base, H * D, keep, size, clear_high, high, rows, start,
                      row_lse, row_delta, T, delay, scale, acc, D, N, HAS_KEEP, HAS_SIZE, POOLED, False, True,
                      PRECISION)  # fmt: skip
    if POOLED:
        near_low = tl.maximum((block * M - delay + 1) // N * N, low)
        if delay > 0:
            acc = _query_pass(queries, g, k + base, v + base, H * D, keep, size, near_low, stop, rows, start,
                              row_lse, row_delta, T, delay, scale, acc, D, N, False, False, False, True, True,
                              PRECISION)  # fmt: skip
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
def backward_keys(q, k, v, keep, size, starts, ends, grad, lse, delta, grad_k, grad_v, grad_keep, grad_size,
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
                (keep_added, size_added), low, high, columns, T, delay, scale, key_acc, value_acc, keep_acc,
                size_acc, D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, True, PRECISION)  # fmt: skip
        else:
            key_acc, value_acc, keep_acc, size_acc = _key_pass(
                q + first, grad + first, Q * D, lse + here, delta + here, starts + row * T, keys, values,
                (keep_added, size_added), low, tl.minimum(clear_low, high), columns, T, delay, scale, key_acc,
                value_acc, keep_acc, size_acc, D, M, HAS_KEEP, HAS_SIZE, FROM_DELAY, TO_DELAY, True,
                PRECISION)  # fmt: skip
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
