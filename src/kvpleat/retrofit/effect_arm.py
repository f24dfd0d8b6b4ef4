"""One training of the comparison in retrofit.effect: a model with or without compression, on its own loss."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.hf.families import base_of, describe
from kvpleat.policies.gates import Gates
from kvpleat.policies.learned import Learned, SoftMarks, new_gates
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.cross_entropy import cross_entropy, next_tokens
from kvpleat.retrofit.data import Batch, Mixture
from kvpleat.retrofit.measure import HARD, entries_left
from kvpleat.retrofit.objective import marked_share, too_little
from kvpleat.retrofit.student import Student

OFF = "off"
METHODS = ("dms", "fold")
WARM_UP = 0.05  # share of the steps in which the learning rates grow
REHEARSALS = 3  # steps that are timed, and as many before them that are not

Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Texts:
    """What all arms see. batches: makes the same endless batches each time. trained: the first rows of these.
    held_out: others."""

    batches: Callable[[], Mixture]
    trained: list[Batch]
    held_out: list[Batch]


class Arm:
    """One training of the comparison.

    Args:
        model: all its weights are trained, in place. In eval mode: dropout would be another difference.
        recipe: method, ratio, rates. `rate` is the gates', `model_rate` the weights'.
        gates: trained along. None: compression is off.
    """

    def __init__(self, model: Any, recipe: Recipe, gates: Gates | None) -> None:
        self.recipe, self.compressed = recipe, gates is not None
        self.name = recipe.method if self.compressed else OFF
        gates = fresh_gates(model, recipe) if gates is None else gates.requires_grad_(True)
        self.student = Student(
            model.requires_grad_(True),
            gates.to(describe(model).device),
            policy_of(recipe.method),
            temperature=recipe.temperature,
            compile=recipe.compile,
        )
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """An optimiser that has seen nothing."""
        recipe = self.recipe
        groups = [{"params": list(self.student.model.parameters()), "lr": recipe.weights_rate}]
        if self.compressed:
            groups.append({"params": list(self.student.gates.parameters()), "lr": recipe.rate})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def advance(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step: (loss, with relaxed decisions; share of marked entries), both left on the device."""
        recipe, student = self.recipe, self.student
        pace = recipe.at(step)[1] * min(1.0, (step + 1) / max(1.0, WARM_UP * recipe.steps))
        batch = moved(batch, student.facts.device)
        noise = None
        if self.compressed:
            rows, tokens = batch.tokens.shape
            generator = torch.Generator(student.facts.device).manual_seed(recipe.seed * 1_000_003 + step)
            noise = student.noise(rows, tokens, generator)
        total, count, marks = losses(student, batch, noise)
        loss = total / count.clamp(min=1)
        share = torch.zeros((), device=loss.device)
        wanted = loss
        if marks:
            ordered = [marks[i].marked for i in sorted(marks)]
            shares = marked_share(ordered, batch.doc_start, student.gates.config.sinks)
            wanted = loss + recipe.ratio_weight * too_little(shares, recipe.target(step))
            share = shares.detach().mean()
        wanted.backward()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * pace
            nn.utils.clip_grad_norm_(group["params"], 1.0)  # apart, so that gates do not slow the weights down
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), share

    def evaluate(self, texts: Texts) -> dict[str, float]:
        """Losses on both sets of rows, the ratio on held-out rows, and the losses of the same weights uncompressed."""
        found: dict[str, float] = {}
        found["held_out"], found["ratio"] = judge(self.student, texts.held_out, self.compressed)
        found["trained"], _ = judge(self.student, texts.trained, self.compressed)
        if self.compressed:
            found["held_out_off"], _ = judge(self.student, texts.held_out, False)
            found["trained_off"], _ = judge(self.student, texts.trained, False)
        return found


def policy_of(method: str) -> type[Learned]:
    """The policy of a method. Raises OptionError where it is none that is learned here."""
    policy = policies.registry().get(method)
    if method not in METHODS or policy is None or not issubclass(policy, Learned):
        raise OptionError(f"method={method!r}: the effect of one of {', '.join(METHODS)} is measured.")
    return policy


def fresh_gates(model: Any, recipe: Recipe) -> Gates:
    """Gates for a model that mark next to nothing."""
    facts = describe(model)
    base = base_of(model, facts)
    size = {name: base[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    return new_gates(
        policy_of(recipe.method), delay=recipe.delay, sinks=recipe.sinks, scale=recipe.scale, base=base, **size
    )


def losses(student: Student, batch: Batch, noise: Tensor | None) -> tuple[Tensor, Tensor, dict[int, SoftMarks]]:
    """(sum of the next-token losses in nats, how many there are, decisions by layer); noise None: no compression."""
    device = student.facts.device
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    targets = next_tokens(batch).flatten()
    softcap = getattr(student.model.config, "final_logit_softcapping", None)
    with precision:
        hidden, marks = student(batch.tokens, batch.doc_start, noise)
        flat = hidden.flatten(0, 1)
        total = cross_entropy(flat, student.head, targets, softcap=softcap, compile=student.compiled)
    return total, (targets >= 0).sum(), marks


@torch.no_grad()
def judge(student: Student, batches: list[Batch], compressed: bool) -> tuple[float, float]:
    """(loss in nats a token, compression ratio after the last token of each row, what waits for its delay counted),
    with hard decisions."""
    before = student.temperature, student.compiled
    student.temperature, student.compiled = HARD, False
    total, count, kept, seen = 0.0, 0, 0, 0
    try:
        for batch in batches:
            batch = moved(batch, student.facts.device)
            noise = student.no_noise(*batch.tokens.shape) if compressed else None
            nats, known, marks = losses(student, batch, noise)
            total, count = total + float(nats), count + int(known)
            for layer in marks.values():
                gone = entries_left(layer.marked, batch.doc_start, student.gates.config)
                kept, seen = kept + layer.marked.numel() - gone, seen + layer.marked.numel()
    finally:
        student.temperature, student.compiled = before
    return total / max(1, count), seen / kept if kept else 1.0


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return Batch(*(x.to(device, non_blocking=True) for x in (batch.tokens, batch.doc_start, batch.loss_weight)))


def rehearse(arm: Arm, texts: Texts) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation, once everything is compiled. The arm is left as it was."""
    parameters = [*arm.student.model.parameters(), *arm.student.gates.parameters()]
    start = [p.detach().clone() for p in parameters]
    for _ in range(2):
        began = time.perf_counter()
        for step in range(REHEARSALS):
            loss, _ = arm.advance(step, texts.trained[0])
        float(loss)  # waits for the device
        step_s = (time.perf_counter() - began) / REHEARSALS
    began = time.perf_counter()
    arm.evaluate(texts)
    evaluation_s = time.perf_counter() - began
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    arm.reset_optimizer()
    return step_s, evaluation_s


def train(arm: Arm, texts: Texts, write: Write, *, evaluations: int = 10, seconds: float | None = None) -> int:
    """Train an arm, and write a line a step and one an evaluation.

    Args:
        write: takes the lines.
        evaluations: how many there are after the one at the start, evenly spread, the last one at the end.
        seconds: how long training and evaluations may take, compilation left out. Sets the steps.

    Returns:
        the steps.
    """
    with arm.student.attached():
        _write_evaluation(arm, texts, write, 0, 0, 0.0)
        step_s, evaluation_s = rehearse(arm, texts)
        if seconds is not None:
            arm.recipe = replace(arm.recipe, steps=steps_in(seconds, step_s, evaluation_s, evaluations))
        steps = arm.recipe.steps
        stops = sorted({max(1, round(steps * (i + 1) / evaluations)) for i in range(evaluations)})
        tokens, spent = 0, 0.0
        batches = texts.batches()
        try:
            for first, stop in zip([0, *stops], stops, strict=False):
                began = time.perf_counter()
                curve = []
                for step, batch in zip(range(first, stop), batches, strict=False):
                    curve.append(torch.stack(arm.advance(step, batch)))
                    tokens += batch.tokens.numel()
                figures = torch.stack(curve).tolist()  # once for all of them: a step must not wait for the host
                spent += time.perf_counter() - began
                for step, (loss, share) in enumerate(figures, first):
                    asked = arm.recipe.at(step)[0] if arm.compressed else 1.0
                    write(
                        {
                            "kind": "step",
                            "arm": arm.name,
                            "step": step + 1,
                            "loss": loss,
                            "marked": share,
                            "asked": asked,
                        }
                    )
                _write_evaluation(arm, texts, write, stop, tokens, spent)
        finally:
            batches.close()
    return steps


def steps_in(seconds: float, step_s: float, evaluation_s: float, evaluations: int) -> int:
    """Steps that fit into `seconds` beside the evaluations. Raises OptionError where not even one does."""
    steps = int((seconds - evaluations * evaluation_s) / step_s)
    if steps < 1:
        raise OptionError(
            f"seconds={seconds:g}: {evaluations} evaluations of {evaluation_s:.2g} s and a step of {step_s:.2g} s take "
            "longer. Allow more seconds, or fewer evaluations, or shorter rows."
        )
    return steps


def _write_evaluation(arm: Arm, texts: Texts, write: Write, step: int, tokens: int, seconds: float) -> None:
    place = {"kind": "evaluation", "arm": arm.name, "step": step, "tokens": tokens, "seconds": seconds}
    write(place | arm.evaluate(texts))
