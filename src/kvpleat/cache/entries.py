"""The entries of a layer as they are read, and what a page stores of them: numbers of the model's dtype, or codes.

An entry is quantised when it is appended, or when a merge changed it; whatever moves entries moves codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpleat.kernels import reference
from kvpleat.kernels.reference import Quantised
from kvpleat.types import ENTRY_BITS, Decision, KVShape, Rotary

Content = dict[str, Tensor]  # by name of `KVShape.arrays`, any leading dimensions


@dataclass(frozen=True)
class Entries:
    """The entries of one layer of one row, padded to the longest stream. Holes hold zeros.

    Args:
        live: [H, N]; keys, values: [H, N, D]; fields: side arrays, [H, N] each.
    """

    live: Tensor
    keys: Tensor
    values: Tensor
    fields: dict[str, Tensor]


def encode(keys: Tensor, values: Tensor, shape: KVShape) -> Content:
    """What a page stores of keys and values [..., D]."""
    if shape.bits is None:
        return {"key": keys, "value": values}
    key_bits, value_bits = ENTRY_BITS[shape.bits]
    if key_bits == value_bits:  # in one go: while decoding, the number of operations is what it costs
        both = reference.quantize(torch.stack([keys, values]), key_bits)
        key, value = (Quantised(both.codes[i], both.steps[i]) for i in range(2))
    else:
        key, value = reference.quantize(keys, key_bits), reference.quantize(values, value_bits)
    return {"key": key.codes, "key_steps": key.steps, "value": value.codes, "value_steps": value.steps}


def decode(content: Content, shape: KVShape) -> tuple[Tensor, Tensor]:
    """Keys and values [..., D] in the model's dtype, of what a page stores."""
    if shape.bits is None:
        return content["key"], content["value"]
    keys, values = (
        reference.dequantize(coded(content, name), shape.head_dim, shape.dtype) for name in ("key", "value")
    )
    return keys, values


def coded(content: Content, name: str) -> Quantised:
    """The codes of "key" or "value" with their steps."""
    return Quantised(content[name], content[f"{name}_steps"])


def masked(content: Content, keep: Tensor) -> Content:
    """`content` with zeros where `keep` (its leading dimensions) is False; in place."""
    return {name: tensor.masked_fill_(~fit(keep, tensor), 0) for name, tensor in content.items()}


def replaced(content: Content, where: Tensor, new: Content) -> Content:
    """`content` with the arrays of `new` where `where` (their leading dimensions) is True."""
    return content | {name: torch.where(fit(where, x), x, content[name]) for name, x in new.items()}


def merged(content: Content, live: Tensor, decision: Decision, shape: KVShape, rotary: Rotary | None) -> Content:
    """`content` [H, N, ...] with the groups that a decision forms in place of their survivors; `live` is [H, N]."""
    assert decision.merge_into is not None
    assert decision.share is not None
    assert decision.log_weights is not None
    target = torch.where(live, decision.merge_into, -1)
    keys, values = decode(content, shape)
    means = reference.merge_into(keys, values, content["position"], target, decision.share, rotary)
    members = torch.zeros_like(target).scatter_add_(1, target.clamp(min=0), (target >= 0).long())
    return replaced(content, members > 1, encode(*means, shape)) | {"log_weight": decision.log_weights}


def packed(content: Content, keep: Tensor) -> tuple[Content, Tensor]:
    """The kept entries of `content` [H, N, ...] in order, closed up, and [H, n] which of them are live: `keep` is
    [H, N]."""
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, : int(keep.sum(dim=1).max())]
    closed = {}
    for name, tensor in content.items():
        closed[name] = tensor.gather(1, fit(order, tensor).expand(-1, -1, *tensor.shape[2:]))
    return closed, keep.gather(1, order)


def fit(mask: Tensor, tensor: Tensor) -> Tensor:
    """`mask` with as many dimensions as `tensor`."""
    return mask.view(*mask.shape, *[1] * (tensor.dim() - mask.dim()))
