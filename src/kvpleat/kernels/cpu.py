"""Decode attention on a CPU: one query per head over the pages of each stream, bound by memory bandwidth.

A stream whose pages follow each other in the pool is read in place, through a view; only what lies elsewhere is
gathered. On 2 cores a view reads 18 GB/s where a gather of every page reads 9 and a batched product over pages 4, which
is why the allocator looks for runs.
"""

import torch
from torch import Tensor


def attend_stream(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor] | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One token's queries over one stream.

    Args:
        q: [G, D] queries of the KV head's group.
        keys, values: [n_i, D] pieces of the stream, in any order.
        bias: [n_i] float32 log-weights of each piece, or None.
        scale, softcap: as in `reference.attend`.

    Returns:
        [G, D] in q's dtype.
    """
    logits = torch.mm(q, keys[0].t()) if len(keys) == 1 else torch.cat([torch.mm(q, k.t()) for k in keys], dim=1)
    logits = logits.float().mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits += bias[0] if len(bias) == 1 else torch.cat(bias)
    weights = torch.softmax(logits, dim=-1).to(q.dtype)
    if len(values) == 1:
        return torch.mm(weights, values[0])
    out = torch.zeros_like(q)
    start = 0
    for piece in values:
        out.addmm_(weights[:, start : start + piece.shape[0]], piece)
        start += piece.shape[0]
    return out
