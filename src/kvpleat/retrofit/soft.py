"""Attention of student and teacher, behind transformers' own AttentionInterface: soft decisions where there are any."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvpleat.errors import AttachError
from kvpleat.hf.families import ModelFacts
from kvpleat.kernels import reference
from kvpleat.kernels.pooling import LEAST_WEIGHT, scan
from kvpleat.kernels.relaxed import relaxed_attention
from kvpleat.policies.learned import SoftMarks
from kvpleat.types import Delay, Rotary

IMPLEMENTATION = "kvpleat-retrofit"
GONE = -1e9  # logit of what a sliding-window layer does not see
LEAST_CARRY = -30.0  # log of a share that counts as nothing; sums of logs keep their digits


class SoftCall:
    """One forward of student or teacher, as all layers see it. No dataclass: FSDP would hand each layer a copy.

    Args:
        doc_start: [R, T] int32, as in retrofit.data.Batch.
        noise: [L, R, H, T] logistic noise of the student's gates, zeros for hard decisions; None: no compression.
        facts: of the model.
        rule: what becomes of marked entries.
        compiled: whether torch.compile fuses merging, as it fuses the layers around attention.

    Attributes:
        positions: [R, T] of each token within its document.
        marks: the student's decisions by compressed layer, filled on the way.
    """

    def __init__(
        self, doc_start: Tensor, noise: Tensor | None, facts: ModelFacts, rule: Delay, compiled: bool = False
    ) -> None:
        self.doc_start, self.noise, self.facts, self.rule, self.compiled = doc_start, noise, facts, rule, compiled
        self.positions = torch.arange(doc_start.shape[1], device=doc_start.device) - doc_start
        self.marks: dict[int, SoftMarks] = {}

    def marks_of(self, index: int) -> SoftMarks:
        """The decisions of a layer, by its index in the model."""
        marks = self.marks.get(self.facts.layers.index(index))
        if marks is None:
            raise AttachError(
                f"Layer {index} ran without its gates, so it would not learn. Leave attention modules as they are "
                "inside attached()."
            )
        return marks


def register() -> None:
    """Make the attention known to transformers, under a name that nobody asks for by accident."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what differs between layers stays out of what they share
def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    kvpleat_soft: SoftCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Behind transformers' AttentionInterface: query [R, Q, T, D], key and value [R, H, T, D] -> [R, T, Q, D]."""
    assert kvpleat_soft is not None
    call, rule = kvpleat_soft, kvpleat_soft.rule
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = call.facts.sliding.get(module.layer_idx)
    query, key = query.to(value.dtype), key.to(value.dtype)
    far, keep, size, delay = None, None, None, 0
    if window is not None:
        keep, delay = torch.full(key.shape[:3], GONE, device=key.device), window - 1
    elif call.noise is not None:
        marks, delay = call.marks_of(module.layer_idx), rule.tokens
        keep = torch.where(call.positions[:, None] > rule.sinks, marks.keep_bias, 0.0)
        keep = nn.functional.pad(keep[..., 1:], (0, 1))  # token t + 1 decides about t
        if rule.merges:
            merge = _fused_merge() if call.compiled else merged
            far, log_size = merge(key, value, marks, call.positions, call.facts.rotary, rule.sinks)
            size = log_size if rule.log_size else None
    out = relaxed_attention(query, (key, value), far, keep, size, call.doc_start, delay, scale, softcap)
    return out.transpose(1, 2).contiguous(), None


def merged(
    key: Tensor, value: Tensor, marks: SoftMarks, positions: Tensor, rotary: Rotary | None, sinks: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys and values [R, H, T, D] of the group that each token ends, and the log [R, H, T] of its size."""
    assert marks.log_carry is not None
    positions = positions[:, None]
    plain = reference.rotate(key, -positions, rotary)
    weight = torch.ones_like(marks.log_carry) if marks.weight is None else marks.weight.clamp(min=LEAST_WEIGHT)
    ones = weight[..., None]
    parts = torch.cat([plain * ones, value.to(plain.dtype) * ones, ones], dim=-1)
    log_carry = torch.where(positions <= sinks, -torch.inf, marks.log_carry.clamp(min=LEAST_CARRY))
    with torch.autocast(key.device.type, enabled=False):
        sums = scan(parts, log_carry)
    means = sums[..., :-1] / sums[..., -1:]
    far_key = reference.rotate(means[..., : key.shape[-1]], positions, rotary).to(key.dtype)
    return (far_key, means[..., key.shape[-1] :].to(value.dtype)), sums[..., -1].log()


@functools.cache
def _fused_merge() -> Callable[..., tuple[tuple[Tensor, Tensor], Tensor]]:
    return torch.compile(merged, dynamic=False)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Behind transformers' AttentionMaskInterface: documents and windows are the attention function's matter."""
