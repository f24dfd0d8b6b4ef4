"""Decode attention on a CPU: one query per head over the pages of each stream, bound by memory bandwidth.

A stream whose pages follow each other in the pool is read in place, through a view; only what lies elsewhere is
gathered. On 2 cores a view reads 18 GB/s where a gather of every page reads 9 and a batched product over pages 4, which
is why the allocator looks for runs.

Codes are turned into numbers a block at a time, which stays in the core's own cache. Scales and zeros are applied to
the products: q.k = scale * (q.codes) + zero * sum(q), one multiplication an entry instead of one a channel.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpleat.kernels.reference import Quantised

CODE_BLOCK = 2048  # entries whose codes are numbers at the same time


def attend_stream(
    q: Tensor,
    keys: Sequence[Tensor | Quantised],
    values: Sequence[Tensor | Quantised],
    bias: list[Tensor] | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One token's queries over one stream.

    Args:
        q: [G, D] queries of the KV head's group; where keys and values are codes, mixed by `reference.spread` as these
            are, and float32 or wider.
        keys, values: [n_i, D] pieces of the stream, in any order: numbers or codes.
        bias: [n_i] float32 log-weights of each piece, or None.
        scale, softcap: as in `reference.attend`.

    Returns:
        [G, D] in q's dtype; where values are codes, mixed like them.
    """
    logits = _logits(q, keys[0]) if len(keys) == 1 else torch.cat([_logits(q, k) for k in keys], dim=1)
    logits = logits.float().mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits += bias[0] if len(bias) == 1 else torch.cat(bias)
    weights = torch.softmax(logits, dim=-1).to(q.dtype)
    if len(values) == 1 and isinstance(values[0], Tensor):
        return torch.mm(weights, values[0])
    out = torch.zeros_like(q)
    start = 0
    for piece in values:
        length = piece.shape[0] if isinstance(piece, Tensor) else piece.scale.shape[0]
        _add_values(out, weights[:, start : start + length], piece)
        start += length
    return out


def _logits(q: Tensor, keys: Tensor | Quantised) -> Tensor:
    """q.k: [G, D] and [n, D] -> [G, n]."""
    if isinstance(keys, Tensor):
        return torch.mm(q, keys.t())
    products = q.new_empty(q.shape[0], keys.scale.shape[0])
    for block, parts in _numbers(keys.codes, q):
        width = q.shape[1] // len(parts)
        torch.mm(q[:, :width], parts[0].t(), out=products[:, block])
        for i, part in enumerate(parts[1:], start=1):
            products[:, block].addmm_(q[:, i * width : (i + 1) * width], part.t())
    return products.mul_(keys.scale.to(q.dtype)).addr_(q.sum(dim=1), keys.zero.to(q.dtype))


def _add_values(out: Tensor, weights: Tensor, values: Tensor | Quantised) -> None:
    """Add the weighted values to out [G, D]: weights [G, n], values [n, D]."""
    if isinstance(values, Tensor):
        out.addmm_(weights, values)
        return
    scaled = weights * values.scale.to(out.dtype)
    for block, parts in _numbers(values.codes, out):
        width = out.shape[1] // len(parts)
        for i, part in enumerate(parts):
            out[:, i * width : (i + 1) * width].addmm_(scaled[:, block], part)
    out += torch.mv(weights, values.zero.to(out.dtype))[:, None]


def _numbers(codes: Tensor, like: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Codes [n, D * bits / 8] as numbers of the dtype of `like` [G, D], in blocks of entries: [b, D], or two halves of
    the channels [b, D / 2]."""
    for start in range(0, codes.shape[0], CODE_BLOCK):
        block = slice(start, min(start + CODE_BLOCK, codes.shape[0]))
        part = codes[block]
        halves = [part] if part.shape[1] == like.shape[1] else [part & 15, part >> 4]
        yield block, [half.to(like.dtype) for half in halves]
