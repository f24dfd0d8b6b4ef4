"""How far a student is from its teacher: on a batch that it learns from, and on held-out text with hard decisions."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpleat.errors import OptionError
from kvpleat.policies.gates import GateConfig
from kvpleat.policies.learned import SoftMarks
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.objective import Distance, distill, marked_share
from kvpleat.retrofit.student import Student

HARD = 1e-9  # temperature at which decisions are hard: a float32 logit that is not 0 is far above it


class Outcome(NamedTuple):
    """Of a batch: the distance to the teacher, the share of marked entries [R] of each row, the decisions by layer."""

    distance: Distance
    share: Tensor
    marks: dict[int, SoftMarks]


class Lesson(nn.Module):
    """Student and teacher on the same batch, heads and loss included: everything that reads weights happens in one
    forward, so that weights may be sharded over processes.

    Args:
        student: attached while this runs. Its teacher belongs to this module.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student, self.teacher = student, student.teacher

    def forward(self, batch: Batch, noise: Tensor, lm_weight: float = 0.0, total: Tensor | None = None) -> Outcome:
        """Measure a batch on the model's device: noise [L, R, H, T]; lm_weight and total as in `distill`."""
        student = self.student
        wanted = student.teach(batch.tokens, batch.doc_start)
        hidden, marks = student(batch.tokens, batch.doc_start, noise)
        distance = measure(student, hidden, wanted, batch, lm_weight, total)
        sinks = student.gates.config.sinks
        return Outcome(distance, marked_share([marks[i].marked for i in sorted(marks)], batch.doc_start, sinks), marks)


def measure(
    student: Student,
    hidden: Tensor,
    wanted: Tensor,
    batch: Batch,
    lm_weight: float = 0.0,
    total: Tensor | None = None,
) -> Distance:
    """Distance of student and teacher hidden states [R, T, hidden] on a batch."""
    same_document = batch.doc_start[:, 1:] == batch.doc_start[:, :-1]
    targets = nn.functional.pad(torch.where(same_document, batch.tokens[:, 1:], -1), (0, 1), value=-1)
    softcap = getattr(student.model.config, "final_logit_softcapping", None)
    return distill(
        hidden.flatten(0, 1), wanted.flatten(0, 1), student.head, student.teacher_head, targets.flatten(),
        predicted_weight(batch).flatten(), lm_weight=lm_weight, softcap=softcap, compile=student.compiled, total=total,
    )  # fmt: skip


def predicted_weight(batch: Batch) -> Tensor:
    """[R, T] what each hidden state counts: the weight of the token that it predicts."""
    return nn.functional.pad(batch.loss_weight[:, 1:], (0, 1))


@torch.no_grad()
def judge(lesson: Lesson, batches: Iterable[Batch]) -> dict[str, float]:
    """Hard decisions on held-out batches: KL (nats a token), perplexities, agreement, and the compression ratio with
    all entries that wait counted, after the last token of each row."""
    student = lesson.student
    before = student.temperature, student.compiled
    student.temperature, student.compiled = HARD, False
    sums = torch.zeros(4, dtype=torch.float64)
    kept = seen = rows = 0
    try:
        for batch in batches:
            batch = moved(batch, student.facts.device)
            with precision(student.facts.device):
                distance, _, marks = lesson(batch, student.no_noise(*batch.tokens.shape))
            figures = (distance.kl, distance.agreement, distance.student_nll, distance.teacher_nll)
            sums += torch.stack([figure.double() for figure in figures]).cpu() * len(batch.tokens)
            rows += len(batch.tokens)
            for layer in marks.values():
                left = entries_left(layer.marked, batch.doc_start, student.gates.config)
                kept, seen = kept + layer.marked.numel() - left, seen + layer.marked.numel()
    finally:
        student.temperature, student.compiled = before
    if not rows:
        raise OptionError("There is no batch to judge with. Pass held-out text.")
    kl, agreement, nll, full_nll = (sums / rows).tolist()
    perplexity, full = torch.tensor([nll, full_nll], dtype=torch.float64).exp().tolist()
    return {
        "kl": kl,
        "agreement": agreement,
        "perplexity": perplexity,
        "full_perplexity": full,
        "perplexity_change": perplexity / full - 1,
        "ratio": seen / kept,
    }


def entries_left(marked: Tensor, doc_start: Tensor, config: GateConfig) -> int:
    """How many entries have left after the last token: marked [R, H, T] by the token after each, which has seen more
    than `delay` tokens since."""
    tokens = marked.shape[-1]
    gone = marked.round() * (torch.arange(tokens, device=marked.device) > doc_start + config.sinks)[:, None]
    return int(gone[..., : tokens - config.delay].sum())


def precision(device: torch.device) -> Any:
    """bfloat16 products on a GPU; on a CPU everything in the weights' dtype.

    Without autocast's cache: a weight is read once, and its copy would outlive the shards it was put together from.
    """
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on the model's device."""
    return Batch(*(x.to(device, non_blocking=True) for x in (batch.tokens, batch.doc_start, batch.loss_weight)))
