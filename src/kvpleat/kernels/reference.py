"""The specification of every kernel, in plain torch: readable first, any device, float32 inside.

The fast paths beside this file compute the same functions and are compared with it. Shapes: see kvpleat.types.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.types import SCALE_DTYPE, Rotary


class Quantised(NamedTuple):
    """Vectors in few bits: the number is code * scale + zero, of the vector after `spread`.

    codes: [..., D * bits / 8] uint8. With 4 bits byte c holds channel c (low half) and channel c + D / 2 (high half).
    steps: [..., 2] scale and zero of each vector, SCALE_DTYPE.
    """

    codes: Tensor
    steps: Tensor


class Turn(NamedTuple):
    """A rotation of keys: cosines and sines [..., r / 2] of the angle of each pair of channels, see `types.Rotary`."""

    cos: Tensor
    sin: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of grouped queries over the entries of their KV head.

    Args:
        q: [H, G, T, D] queries, rotated.
        k, v: [H, N, D] entries; may be undefined where never visible.
        bias: [H, N] float32 added to the logits after the soft cap (log-weights), -inf for holes; or None.
        visible: [T, N] or [H, T, N] bool; None: every entry is visible to every query.
        scale: factor on q.k.
        softcap: c of c * tanh(logit / c), or None.

    Returns:
        [H, G, T, D] in q's dtype. A query that sees nothing returns zeros.
    """
    weights = attention_received(q, k, bias, visible, scale, softcap)
    unread = (weights == 0).flatten(1, 2).all(dim=1)
    values = v.float().masked_fill(unread[..., None], 0.0)  # 0 * NaN is NaN: holes may hold anything
    return torch.einsum("hgtn,hnd->hgtd", weights, values).to(q.dtype)


def attention_received(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention probability each entry receives from each query: [H, G, T, N] float32. Arguments as in `attend`."""
    logits = torch.einsum("hgtd,hnd->hgtn", q.float(), k.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.zeros(k.shape[0], 1, q.shape[2], k.shape[1], dtype=torch.bool, device=q.device)
    if visible is not None:
        hidden = hidden | ~(visible[None] if visible.dim() == 2 else visible)[:, None]
    if bias is not None:
        hidden = hidden | (bias == -math.inf)[:, None, None]
        logits = logits + bias[:, None, None]
    # The second fill makes 0, and not NaN, of a query that sees nothing; NaN among what is seen stays NaN.
    return torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1).masked_fill(hidden, 0.0)


def rotate(keys: Tensor, distance: Tensor, rotary: Rotary | None) -> Tensor:
    """Move rotated keys by `distance` positions: R(p + distance) k = R(distance) R(p) k.

    Args:
        keys: [..., D] keys after rotary embedding.
        distance: [...] positions to move by, any sign.
        rotary: None for models without rotary embedding; their keys are returned as they are.

    Returns:
        [..., D] float32 (float64 stays float64). Angles are computed in float64: a float32 angle of 1e5 radians is off
        by 1e-2.
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return keys if rotary is None else rotate_by(keys, turn(distance, rotary, keys.dtype))


def turn(distance: Tensor, rotary: Rotary, dtype: torch.dtype) -> Turn:
    """The rotation by `distance` [...] positions."""
    angle = distance[..., None].double() * rotary.inv_freq.double()
    return Turn(angle.cos().to(dtype), angle.sin().to(dtype))


def rotate_by(keys: Tensor, by: Turn) -> Tensor:
    """Keys [..., D], rotated: as `rotate`, where many keys move by the same distances."""
    half = by.cos.shape[-1]
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin, rest], dim=-1)


def merge_into(
    keys: Tensor, values: Tensor, positions: Tensor, target: Tensor, share: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    """Weighted means of the members of each group, keys moved to the position of the entry they merge into.

    Args:
        keys, values: [H, N, D].
        positions: [H, N].
        target: [H, N] int64 entry that each entry merges into; its own index for a survivor; -1 for an evicted one.
        share: [H, N] float32 weight of each member in the mean, positive for a survivor.
        rotary: as in `rotate`.

    Returns:
        keys and values [H, N, D] in their dtypes; only the rows of survivors mean anything, and a survivor without
        other members is returned bit for bit.
    """
    num_heads, num_entries, head_dim = keys.shape
    member = target >= 0
    safe = target.clamp(min=0)
    distance = torch.where(member, positions.gather(1, safe) - positions, 0)
    weight = torch.where(member, share, 0.0)
    total = torch.zeros(num_heads, num_entries, device=keys.device).scatter_add_(1, safe, weight)
    count = torch.zeros_like(total).scatter_add_(1, safe, member.float())
    fraction = weight / total.gather(1, safe).clamp(min=torch.finfo(torch.float32).tiny)

    def mean(x: Tensor, moved: Tensor) -> Tensor:
        terms = torch.where(member[..., None], moved * fraction[..., None], 0.0)
        out = torch.zeros(num_heads, num_entries, head_dim, dtype=terms.dtype, device=x.device)
        out.scatter_add_(1, safe[..., None].expand_as(terms), terms)
        return torch.where((count > 1)[..., None], out.to(x.dtype), x)

    return mean(keys, rotate(keys, distance, rotary)), mean(values, values.float())


def spread(x: Tensor) -> Tensor:
    """Mix the channels of [..., D] by a fixed matrix that is orthogonal and its own inverse: [..., D] float32 (float64
    stays float64).

    Products of two vectors do not change when both are mixed, and mixing twice changes nothing. A channel that is
    large in every key, as models have them, is shared out, so that it does not widen the steps of all others (QuaRot,
    arXiv 2404.00456).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x @ _hadamard(x.shape[-1], x.dtype, x.device)


@functools.cache
@torch.inference_mode(False)  # tensors made in that mode could not be used everywhere outside it
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: Sylvester's Hadamard matrix of the largest power of two that divides `size`, in blocks along the
    diagonal: where `size` is no power of two, channels are mixed with their neighbours only."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * block.shape[0]) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / math.sqrt(2)
    matrix: Tensor = torch.block_diag(*[block] * (size // block.shape[0]))
    return matrix.to(device, dtype)


def quantize(x: Tensor, bits: int) -> Quantised:
    """Vectors [..., D] as codes of 8 or 4 bits, each vector with steps of its own from its smallest number to its
    largest.

    A number is off by at most half a step after `spread`. Zero is rounded down and the scale up, so that nothing is cut
    off. NaN or infinity anywhere makes the whole vector NaN.
    """
    mixed = spread(x)
    low, high = torch.aminmax(mixed, dim=-1)
    wider = torch.finfo(SCALE_DTYPE).eps  # more than rounding to nearest can take away
    zero = (low - low.abs() * wider).to(SCALE_DTYPE)
    scale = ((high - zero) * ((1 + wider) / (2**bits - 1))).to(SCALE_DTYPE)
    finest = torch.finfo(torch.float32).tiny  # a vector of zeros has no steps
    codes = (mixed - zero[..., None]) / scale[..., None].clamp(min=finest)
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return Quantised(codes, torch.stack([scale, zero], dim=-1))


def dequantize(x: Quantised, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The vectors that codes stand for: [..., D] in `dtype`, computed in float32 or wider."""
    codes = x.codes if x.codes.shape[-1] == head_dim else torch.cat([x.codes & 15, x.codes >> 4], dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    scale, zero = x.steps.to(wide).split(1, dim=-1)
    return spread(codes.to(wide) * scale + zero).to(dtype)
