"""What retrofit minimises: the distance to the uncompressed model, and a penalty for compressing too little."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpleat.errors import OptionError

CHUNK = 4096  # tokens whose logits exist at the same time


class Distance(NamedTuple):
    """Of student and teacher over a batch. kl: nats a token, weighted mean, differentiable. loss: with the language
    model loss in it, if there is one. agreement: share of tokens with the same argmax. student_nll, teacher_nll: nats a
    token of the next token within its document, plain means."""

    loss: Tensor
    kl: Tensor
    agreement: Tensor
    student_nll: Tensor
    teacher_nll: Tensor


def distill(
    student: Tensor,
    teacher: Tensor,
    head: nn.Module,
    teacher_head: nn.Module,
    targets: Tensor,
    weight: Tensor,
    *,
    lm_weight: float = 0.0,
    softcap: float | None = None,
    compile: bool = False,
    total: Tensor | None = None,
) -> Distance:
    """KL(teacher || student) per token, in chunks, so that the vocabulary never makes a large tensor.

    Gradients are computed on the way forward, analytically: d KL / d logits = p_student - p_teacher.

    Args:
        student, teacher: hidden states [N, hidden].
        head, teacher_head: linear layers onto the vocabulary.
        targets: [N] next token, -1 where there is none.
        weight: [N] float32 of each token in the loss.
        lm_weight: of the cross entropy with the targets beside the KL.
        softcap: of the model's final logits.
        compile: whether torch.compile fuses what is done to a chunk.
        total: what to divide loss and kl by; None: the sum of `weight`.
    """
    for layer in (head, teacher_head):
        if not isinstance(layer, nn.Linear):
            raise OptionError(
                f"The model's head is a {type(layer).__name__}; only plain linear heads can be distilled."
            )
    sums = _Distill.apply(
        student, head.weight, head.bias, teacher, teacher_head.weight, teacher_head.bias, targets, weight,
        (lm_weight, softcap, compile),
    )  # fmt: skip
    loss, kl, same, nll, teacher_nll = sums.unbind()
    total = (weight.sum() if total is None else total).clamp(min=1e-9)
    known = (targets >= 0).sum().clamp(min=1)
    return Distance(
        loss / total, (kl / total).detach(), (same / len(targets)).detach(), (nll / known).detach(),
        (teacher_nll / known).detach(),
    )  # fmt: skip


class _Head(NamedTuple):
    """A linear layer onto the vocabulary, in the dtype that logits are computed in."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> "_Head":
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype)) if dtype else cls(weight, bias)

    def logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed up in: float32, or float64 where that is what a model computes in."""
    return torch.promote_types(dtype, torch.float32)


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        targets: Tensor,
        weight: Tensor,
        options: tuple[float, float | None, bool],
    ) -> Tensor:
        lm_weight, softcap, compile = options
        measure = _compiled() if compile else _measure
        device = student.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        mine = _Head.of(head, bias, dtype)
        theirs = _Head.of(teacher_head, teacher_bias, dtype)
        wide = _wide(head.dtype)
        sums = torch.zeros(5, dtype=wide, device=student.device)
        grad = torch.empty_like(student)
        head_grad = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        for first in range(0, len(student), CHUNK):
            part = slice(first, first + CHUNK)
            hidden = student[part].to(mine.weight.dtype)
            figures, slope = measure(
                mine.logits(hidden), theirs.logits(teacher[part]), targets[part], weight[part], lm_weight, softcap
            )
            sums += figures
            grad[part] = slope @ mine.weight
            if head_grad is not None:
                head_grad += slope.T @ hidden
        ctx.save_for_backward(grad, head_grad)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grad, head_grad = ctx.saved_tensors
        scale = grad_sums[0]
        of_head = None if head_grad is None else head_grad * scale
        return (grad * scale.to(grad.dtype), of_head, None, None, None, None, None, None, None)


def _measure(
    logits: Tensor, wanted: Tensor, targets: Tensor, weight: Tensor, lm_weight: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Sums [5] (loss, KL, agreements, NLL, the teacher's) of a chunk, and the gradient of the loss [n, vocabulary]."""
    s, t = logits.to(_wide(logits.dtype)), wanted.to(_wide(wanted.dtype))
    if softcap is not None:
        s, t = softcap * torch.tanh(s / softcap), softcap * torch.tanh(t / softcap)
    s_log, t_log = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p_student, p_teacher = s_log.exp(), t_log.exp()
    kl = (p_teacher * (t_log - s_log)).sum(-1)
    known = targets >= 0
    index = targets.clamp(min=0)[:, None]
    nll = torch.where(known, -s_log.gather(1, index)[:, 0], 0.0)
    teacher_nll = torch.where(known, -t_log.gather(1, index)[:, 0], 0.0)
    same = (s.argmax(-1) == t.argmax(-1)).float()
    slope = p_student - p_teacher
    loss = kl
    if lm_weight:
        one_hot = torch.zeros_like(s).scatter_(1, index, 1.0)
        slope = slope + lm_weight * known[:, None] * (p_student - one_hot)
        loss = kl + lm_weight * nll
    slope = slope * weight[:, None]
    if softcap is not None:
        slope = slope * (1 - (s / softcap) ** 2)
    figures = torch.stack([(loss * weight).sum(), (kl * weight).sum(), same.sum(), nll.sum(), teacher_nll.sum()])
    return figures, slope.to(logits.dtype)


_cache: list[Callable[..., tuple[Tensor, Tensor]]] = []


def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    if not _cache:
        _cache.append(torch.compile(_measure, dynamic=False))
    return _cache[0]


def marked_share(marks: list[Tensor], doc_start: Tensor, sinks: int) -> Tensor:
    """Share of marked entries of each row, over all layers, heads and tokens that can mark one: marks [R, H, T] by
    layer, doc_start [R, T] -> [R]."""
    can = torch.arange(doc_start.shape[1], device=doc_start.device) > doc_start + sinks
    marked = torch.stack([(layer * can[:, None]).sum(dim=(1, 2)) for layer in marks]).sum(0)
    return marked / (can.sum(1) * marks[0].shape[1] * len(marks)).clamp(min=1)


def target_share(ratio: float, delay: int, length: int) -> float:
    """Share of entries to mark so that at `length` tokens a cache holds 1 / ratio of all entries, those still waiting
    for their delay included.

    Raises:
        OptionError: the waiting entries alone are more than that.
    """
    waiting = (delay + 1) / length if delay else 0.0
    if 1 - 1 / ratio >= 1 - waiting:
        raise OptionError(
            f"ratio={ratio:g} with delay={delay} at length={length}: the {delay + 1} entries that wait are more than "
            f"1/{ratio:g} of the text. Train on longer rows, or lower the delay."
        )
    return (1 - 1 / ratio) / (1 - waiting)


def too_little(share: Tensor, target: float) -> Tensor:
    """The one-sided penalty: how far each row is below the target, mean over rows (algorithms: DMS, DMC)."""
    return (target - share).clamp(min=0).mean()
