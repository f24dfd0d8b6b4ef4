"""Attention while a policy is learned: every query sees young keys as they are and old keys under soft decisions.

    offset i - j <  delay: q . k_j                         (the entry's own key)
    offset i - j == delay: q . far_k_j + size_j            (its group so far)
    offset i - j >  delay: q . far_k_j + size_j + keep_j   (keep = log(1 - p): how far the entry is still there)

Causal, and only within the query's own document. With hard decisions (keep 0 or -inf) this is what the compressed cache
computes. On a GPU a Triton kernel, elsewhere torch in blocks of queries: memory grows with T, never with its square.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERY_BLOCK = 256


def relaxed_attention(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    size: Tensor | None,
    doc_start: Tensor,
    delay: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Differentiable attention of a batch of packed rows.

    Args:
        q: [R, Q, T, D] rotated queries.
        near: keys and values [R, H, T, D] of each token itself.
        far: keys and values [R, H, T, D] of the group that each token ends; None: the same as `near`.
        keep: [R, H, T] float32 logit added at offsets above `delay`; None: nothing is ever compressed.
        size: [R, H, T] float32 logit added at offsets from `delay` on; None: nothing.
        doc_start: [R, T] int32 index of the first token of each token's document.
        delay: tokens.
        scale, softcap: as in `reference.attend`.

    Returns:
        [R, Q, T, D] in q's dtype.
    """
    if q.device.type == "cuda" and softcap is None:
        from kvpleat.kernels import relaxed_triton

        return relaxed_triton.attention(q, near, far, keep, size, doc_start, delay, scale)
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        arguments = (q[:, :, rows], near, far, keep, size, doc_start[:, rows], start, delay, scale, softcap)
        blocks.append(checkpoint(_attend_block, *arguments, use_reentrant=False))
    return torch.cat(blocks, dim=2)


def _attend_block(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    size: Tensor | None,
    doc_start: Tensor,
    first: int,
    delay: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The queries from index `first` on: q [R, Q, B, D], doc_start [R, B] -> [R, Q, B, D]."""
    stop = first + q.shape[2]
    heads = near[0].shape[1]
    rows = torch.arange(first, stop, device=q.device)[:, None]
    columns = torch.arange(stop, device=q.device)
    visible = (columns <= rows) & (columns >= doc_start[:, :, None])  # [R, B, N]
    grouped = q.unflatten(1, (heads, -1))

    def logits(keys: Tensor) -> Tensor:
        products = torch.einsum("rhgtd,rhnd->rhgtn", grouped, keys[:, :, :stop]) * scale
        return products if softcap is None else softcap * torch.tanh(products / softcap)

    scores = logits(near[0])
    old = (rows - columns) >= delay
    if far is not None:
        scores = torch.where(old, logits(far[0]), scores)
    if size is not None:
        scores = scores + torch.where(old, size[:, :, None, None, :stop], 0.0)
    if keep is not None:
        scores = scores + torch.where((rows - columns) > delay, keep[:, :, None, None, :stop], 0.0)
    weights = torch.softmax(scores.masked_fill(~visible[:, None, None], -torch.inf).float(), dim=-1).to(q.dtype)
    if far is None:
        out = torch.einsum("rhgtn,rhnd->rhgtd", weights, near[1][:, :, :stop])
    else:
        young = torch.where(old, 0.0, weights)
        out = torch.einsum("rhgtn,rhnd->rhgtd", young, near[1][:, :, :stop])
        out = out + torch.einsum("rhgtn,rhnd->rhgtd", weights - young, far[1][:, :, :stop])
    return out.flatten(1, 2)
