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

CODE_BLOCK = 2048  # entries whose codes are numbers at the same time: half a megabyte of 64 channels


def attend_stream(
    q: Tensor,
    keys: Sequence[Tensor | Quantised],
    values: Sequence[Tensor | Quantised],
    bias: list[Tensor] | None,
    scale: float,
    softcap: float | None,
    scratch: Tensor | None = None,
) -> Tensor:
    """One token's queries over one stream.

    Args:
        q: [G, D] queries of the KV head's group; where keys and values are codes, mixed by `reference.spread` as these
            are, and float32 or wider.
        keys, values: [n_i, D] pieces of the stream, in any order: numbers or codes.
        bias: [n_i] float32 log-weights of each piece, or None.
        scale, softcap: as in `reference.attend`.
        scratch: of `scratch_for`, where keys and values are codes; its content means nothing.

    Returns:
        [G, D] in q's dtype; where values are codes, mixed like them.
    """
    logits = (
        _logits(q, keys[0], scratch) if len(keys) == 1 else torch.cat([_logits(q, k, scratch) for k in keys], dim=1)
    )
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
        length = piece.shape[0] if isinstance(piece, Tensor) else piece.codes.shape[0]
        _add_values(out, weights[:, start : start + length], piece, scratch)
        start += length
    return out


def scratch_for(q: Tensor) -> Tensor:
    """Room for the numbers of one block of codes, for queries [..., D]: [CODE_BLOCK * D] of their dtype.

    Memory that is new to the process costs more than all that is computed in it, so that streams share it.
    """
    return q.new_empty(CODE_BLOCK * q.shape[-1])


def _logits(q: Tensor, keys: Tensor | Quantised, scratch: Tensor | None) -> Tensor:
    """q.k: [G, D] and [n, D] -> [G, n]."""
    if isinstance(keys, Tensor):
        return torch.mm(q, keys.t())
    products = q.new_empty(q.shape[0], keys.codes.shape[0])
    for entries, parts in _numbers(keys.codes, q.shape[1], scratch):
        (first, part), *others = parts
        torch.mm(q[:, first], part.t(), out=products[:, entries])
        for channels, part in others:
            products[:, entries].addmm_(q[:, channels], part.t())
    step, zero = keys.steps.to(q.dtype).unbind(1)
    return products.mul_(step).addr_(q.sum(dim=1), zero)


def _add_values(out: Tensor, weights: Tensor, values: Tensor | Quantised, scratch: Tensor | None) -> None:
    """Add the weighted values to out [G, D]: weights [G, n], values [n, D]."""
    if isinstance(values, Tensor):
        out.addmm_(weights, values)
        return
    step, zero = values.steps.to(out.dtype).unbind(1)
    scaled = weights * step
    for entries, parts in _numbers(values.codes, out.shape[1], scratch):
        for channels, part in parts:
            out[:, channels].addmm_(scaled[:, entries], part)
    out += torch.mv(weights, zero)[:, None]


def _numbers(
    codes: Tensor, head_dim: int, scratch: Tensor | None
) -> Iterator[tuple[slice, list[tuple[slice, Tensor]]]]:
    """Codes [n, D * bits / 8] as numbers in `scratch`, a block of entries at a time: which entries, and for each part
    of the channels which they are and its numbers [b, channels]."""
    assert scratch is not None, "codes need scratch_for(q)"
    width = codes.shape[1]
    for start in range(0, codes.shape[0], CODE_BLOCK):
        block = codes[start : start + CODE_BLOCK]
        parts = [block] if width == head_dim else [block & 15, block >> 4]
        numbers = scratch[: len(parts) * block.numel()].view(len(parts), *block.shape)
        for room, part in zip(numbers, parts, strict=True):
            room.copy_(part)
        channels = [slice(i * width, (i + 1) * width) for i in range(len(parts))]
        yield slice(start, start + block.shape[0]), list(zip(channels, numbers, strict=True))
