"""`relaxed.relaxed_attention` in Triton, forward and backward (FlashAttention-2's scheme, arXiv 2307.08691): what is
launched, and how autograd finds it. The kernels are in relaxed_kernels_triton.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kvpleat.kernels import relaxed_kernels_triton as kernels


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
    out: Tensor = _attention(q, *near, far_k, far_v, keep, size, doc_start, delay, scale)[0]
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
    kernels.forward[triton.cdiv(tokens, m), rows * heads](
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
    kernels.row_sums[triton.cdiv(tokens, 64), rows * heads](out, grad, delta, tokens, heads, channels, 64)
    grad_q = _like(q)
    m, n, options = _blocks(q, "queries")
    kernels.backward_queries[triton.cdiv(tokens, m), rows * heads](
        q, k, v, old_k, old_v, keep_in, size_in, doc_start, grad, lse, delta, grad_q, tokens, delay, scale, heads,
        kv_heads, channels, m, n, *flags, pooled, **options)  # fmt: skip
    grads = [_like(old_k), _like(old_v)]
    logit_grads = [torch.empty(rows, kv_heads, tokens, dtype=torch.float32, device=q.device) for _ in range(2)]
    ends = _document_ends(doc_start)
    m, n, options = _blocks(q, "keys")
    grid = triton.cdiv(tokens, n), rows * kv_heads
    arguments = (keep_in, size_in, doc_start, ends, grad, lse, delta)
    sizes = (tokens, delay, scale, heads, kv_heads, channels, m, n, *flags)
    kernels.backward_keys[grid](q, old_k, old_v, *arguments, *grads, *logit_grads, *sizes, pooled, False, **options)
    if not pooled:
        return [grad_q, *grads, *(x.new_empty(0) for x in grads), *logit_grads]
    near_grads = [_like(k).zero_(), _like(v).zero_()]
    if delay:
        kernels.backward_keys[grid](q, k, v, *arguments, *near_grads, *logit_grads, *sizes, False, True, **options)
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
    if q.shape[-1] > 64:
        return 64, 64, {**options, "num_warps": 8, "num_stages": 2}
    # The fastest of 16 to 24 choices each on an H100 with 64 channels (docs/log.md).
    m, n, stages = {"forward": (64, 128, 3), "queries": (64, 64, 3), "keys": (128, 64, 2)}[kernel]
    return m, n, {**options, "num_warps": 4, "num_stages": stages}
