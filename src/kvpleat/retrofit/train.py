"""The retrofit loop: teach a model to compress, and leave gate folders behind."""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.hf.families import base_of, describe
from kvpleat.policies.learned import Learned, new_gates
from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.objective import Distance, distill, marked_share, too_little
from kvpleat.retrofit.student import Student, attention_modules

HARD = 1e-4  # temperature at which decisions are as good as hard


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step.

    Args:
        step, steps: done and in all. tokens: seen by the student. seconds: of this process.
        loss, kl, agreement: of the step's batches, with relaxed decisions.
        ratio: compression ratio asked for. reached: that of the step's decisions, without what waits for its delay.
        tokens_per_s: of all processes, over the last steps.
    """

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    kl: float
    agreement: float
    ratio: float
    reached: float
    tokens_per_s: float


class Run:
    """A retrofit in progress.

    Args:
        model: a causal LM, on its device; its weights change only where the recipe says so.
        recipe: what to do.
        batches: endless, of the recipe's rows and length; has state() and load_state() (retrofit.data.mixture).
    """

    def __init__(self, model: Any, recipe: Recipe, batches: Any) -> None:
        self.recipe, self.batches = recipe, batches
        self.step = self.tokens = 0
        self.policy = _policy(recipe.method)
        facts = describe(model)
        self.device = facts.device
        self.base = base_of(model, facts)
        gates = new_gates(
            self.policy,
            delay=recipe.delay,
            num_layers=facts.shape.num_layers,
            num_kv_heads=facts.shape.num_kv_heads,
            hidden_size=self.base["hidden_size"],
            scale=recipe.scale,
            mlp_size=recipe.mlp_size,
            base=self.base,
        ).to(self.device)
        teacher = None
        if recipe.train == "full":
            teacher = checkpoint.frozen_copy(model)
            model.float()
        model.requires_grad_(recipe.train == "full")
        self.adapted: Any = _with_lora(model, recipe) if recipe.train == "lora" else None
        self.student = Student(
            model, gates, self.policy, temperature=recipe.temperature, teacher=teacher, compile=recipe.compile
        )
        if recipe.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train(recipe.checkpointing)  # transformers recomputes in that mode only
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name, in a fixed order."""
        named = [(f"gates.{name}", p) for name, p in self.student.gates.named_parameters()]
        named += [(f"model.{name}", p) for name, p in self.student.model.named_parameters() if p.requires_grad]
        return dict(named)

    def _groups(self) -> list[dict[str, Any]]:
        trained = self.trained()
        gates = [p for name, p in trained.items() if name.startswith("gates.")]
        rest = [p for name, p in trained.items() if not name.startswith("gates.")]
        groups = [{"params": gates, "lr": self.recipe.rate}]
        return groups + ([{"params": rest, "lr": self.recipe.model_rate}] if rest else [])

    def advance(self) -> tuple[Distance, Tensor]:
        """One optimiser step: (distance of the last batch, mean share of marked entries)."""
        recipe = self.recipe
        _, rate = recipe.at(self.step)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        for part in range(recipe.accumulate):
            distance, share = self._backward(next(self.batches), part)
        torch.nn.utils.clip_grad_norm_(list(self.trained().values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return distance, share

    def _backward(self, batch: Batch, part: int) -> tuple[Distance, Tensor]:
        recipe, student = self.recipe, self.student
        generator = torch.Generator(self.device).manual_seed(
            hash((recipe.seed, self.step, part, getattr(self.batches, "rank", 0))) % 2**63
        )
        batch = _moved(batch, self.device)
        with _precision(self.device):
            wanted = student.teach(batch.tokens, batch.doc_start)
            noise = student.noise(*batch.tokens.shape, generator)
            hidden, marks = student(batch.tokens, batch.doc_start, noise)
            distance = measure(student, hidden, wanted, batch, recipe.lm_weight, recipe.compile)
        share = marked_share([marks[i].marked for i in sorted(marks)], batch.doc_start)
        penalty = too_little(share, recipe.target(self.step))
        ((distance.loss + recipe.ratio_weight * penalty) / recipe.accumulate).backward()
        self.tokens += batch.tokens.numel()
        return distance, share.detach().mean()

    # ---- files

    def save_gates(self, folder: Path, ratio: float, measured: dict[str, Any] | None = None) -> None:
        """Write a usable gate folder for `ratio`: gates, the adapters if there are any, a model card."""
        from kvpleat.retrofit.card import write_card

        training = {
            "recipe": asdict(self.recipe) | {"ratios": list(self.recipe.ratios)},
            "step": self.step,
            "tokens": self.tokens,
            "measured": measured or {},
        }
        self.student.gates.config = replace(self.student.gates.config, ratio=ratio, training=training)
        self.student.gates.save_pretrained(folder)
        if self.adapted is not None:
            checkpoint.save_adapter(self.adapted, folder)
        if self.recipe.train == "full":
            checkpoint.save_model(self.student.model, folder)
        write_card(folder)


def measure(
    student: Student, hidden: Tensor, wanted: Tensor, batch: Batch, lm_weight: float = 0.0, compile: bool = False
) -> Distance:
    """Distance of student and teacher hidden states [R, T, hidden] on a batch."""
    same_document = batch.doc_start[:, 1:] == batch.doc_start[:, :-1]
    targets = nn.functional.pad(torch.where(same_document, batch.tokens[:, 1:], -1), (0, 1), value=-1)
    weight = nn.functional.pad(batch.loss_weight[:, 1:], (0, 1))  # of the token that each hidden state predicts
    softcap = getattr(student.model.config, "final_logit_softcapping", None)
    return distill(
        hidden.flatten(0, 1), wanted.flatten(0, 1), student.head, student.teacher_head, targets.flatten(),
        weight.flatten(), lm_weight=lm_weight, softcap=softcap, compile=compile,
    )  # fmt: skip


@torch.no_grad()
def judge(student: Student, batches: Iterable[Batch]) -> dict[str, float]:
    """Hard decisions on held-out batches: KL (nats a token), perplexities, agreement, and the compression ratio with
    all entries that wait counted, after the last token of each row."""
    before = student.temperature, student.compiled
    student.temperature, student.compiled = HARD, False
    sums: dict[str, float] = {}
    count = 0
    kept = seen = 0.0
    try:
        for batch in batches:
            batch = _moved(batch, student.facts.device)
            with _precision(student.facts.device):
                wanted = student.teach(batch.tokens, batch.doc_start)
                hidden, marks = student(batch.tokens, batch.doc_start, student.no_noise(*batch.tokens.shape))
                distance = measure(student, hidden, wanted, batch)
            figures = (distance.kl, distance.agreement, distance.student_nll, distance.teacher_nll)
            for name, value in zip(("kl", "agreement", "nll", "full_nll"), figures, strict=True):
                sums[name] = sums.get(name, 0.0) + float(value)
            delay = student.gates.config.delay
            columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
            for layer in marks.values():
                marked = layer.marked.round() * (columns > batch.doc_start)[:, None]
                gone = marked[..., : marked.shape[-1] - delay].sum()
                kept, seen = kept + marked.numel() - float(gone), seen + marked.numel()
            count += 1
    finally:
        student.temperature, student.compiled = before
    if not count:
        raise OptionError("There is no batch to judge with. Pass held-out text.")
    means = {name: value / count for name, value in sums.items()}
    perplexity, full = (torch.tensor(means[name]).exp().item() for name in ("nll", "full_nll"))
    return {
        "kl": means["kl"],
        "agreement": means["agreement"],
        "perplexity": perplexity,
        "full_perplexity": full,
        "perplexity_change": perplexity / full - 1,
        "ratio": seen / kept,
    }


def retrofit(
    model: Any,
    recipe: Recipe,
    batches: Any,
    out: str | Path,
    *,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    on_step: Callable[[Progress], None] | None = None,
    save_every: int = 0,
    resume: bool = True,
    deadline_s: float | None = None,
) -> dict[str, dict[str, float]]:
    """Teach `model` to compress. Each ratio of the recipe leaves a gate folder `out/RATIOx`.

    Args:
        model: a causal LM in eval mode, on its device.
        recipe: what to do. batches: see `Run`.
        out: folder; metrics go to out/metrics.jsonl and TensorBoard files beside it.
        held_out: batches to judge each ratio's gates on.
        on_step: told of every step.
        save_every: steps between resumable checkpoints in out/checkpoint; 0: none.
        resume: go on from out/checkpoint if it is there.
        deadline_s: stop after so many seconds, with what has been learned saved.

    Returns:
        per gate folder what `judge` measured.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(model, recipe, batches)
    state = out / "checkpoint"
    if resume and state.is_dir():
        checkpoint.load(run, state)
    measured: dict[str, dict[str, float]] = {}
    with run.student.attached(), checkpoint.Metrics(out) as metrics:
        for progress in _steps(run, deadline_s):
            metrics.write(asdict(progress))
            if on_step is not None:
                on_step(progress)
            if save_every and run.step % save_every == 0:
                checkpoint.save(run, state)
            for ratio, end in zip(recipe.ratios, recipe.stage_ends(), strict=True):
                if run.step == end:
                    name = f"{ratio:g}x"
                    measured[name] = judge(run.student, held_out()) if held_out else {}
                    run.save_gates(out / name, ratio, measured[name])
                    metrics.write({"step": run.step, "gates": name, **measured[name]})
        if save_every:
            checkpoint.save(run, state)
    (out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return measured


def _steps(run: Run, deadline_s: float | None) -> Iterator[Progress]:
    start = last = time.perf_counter()
    speed = 0.0
    while run.step < run.recipe.steps:
        ratio, _ = run.recipe.at(run.step)
        before = run.tokens
        distance, share = run.advance()
        loss, kl, agreement = (x.item() for x in (distance.loss.detach(), distance.kl, distance.agreement))
        now = time.perf_counter()
        rate = (run.tokens - before) / (now - last)
        speed = rate if not speed else 0.9 * speed + 0.1 * rate
        last = now
        reached = 1 / max(1e-9, 1 - float(share))
        yield Progress(run.step, run.recipe.steps, run.tokens, now - start, loss, kl, agreement, ratio, reached, speed)
        if deadline_s is not None and now - start > deadline_s:
            return


def _policy(method: str) -> type[Learned]:
    known = {name: policy for name, policy in policies.registry().items() if issubclass(policy, Learned)}
    if method not in known:
        raise OptionError(f"method={method!r}: retrofit teaches one of {', '.join(known)}.")
    return known[method]


def _precision(device: torch.device) -> Any:
    """bfloat16 products on a GPU; on a CPU everything in the weights' dtype."""
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()


def _with_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: Any = "all-linear"
    if recipe.adapt == "attention":
        inside = (pair for module in attention_modules(describe(model).decoder) for pair in module.named_children())
        targets = sorted({name for name, module in inside if type(module).__name__ in ("Linear", "Conv1D")})
    options = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft asks for a name that transformers calls old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, options)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on the model's device."""
    return Batch(*(x.to(device, non_blocking=True) for x in (batch.tokens, batch.doc_start, batch.loss_weight)))
