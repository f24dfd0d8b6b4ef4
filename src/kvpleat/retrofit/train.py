"""The retrofit loop: teach a model to compress, and leave gate folders behind."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.measure import judge
from kvpleat.retrofit.run import Run

MEASURED_FILE = "measured.json"
FITTED = 30  # step after which the number of steps is fitted to the time: everything is compiled by then
TIMED = 15  # of its last steps, whose median is the time of a step


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
    fit_s: float | None = None,
) -> dict[str, dict[str, float]]:
    """Teach `model` to compress. Each ratio of the recipe leaves a gate folder `out/RATIOx`.

    Under `accelerate launch` or torchrun every process calls this, with batches of its own rows (rank and world_size of
    `mixture`); the first one writes the files. The model is in shards afterwards. Every process judges all of
    `held_out`.

    Args:
        model: a causal LM in eval mode, on its device.
        recipe: what to do. batches: see `Run`.
        out: folder; metrics go to out/metrics.jsonl and TensorBoard files beside it.
        held_out: batches to judge each ratio's gates on.
        on_step: told of every step.
        save_every: steps between resumable checkpoints in out/checkpoint; 0: none.
        resume: go on from out/checkpoint if it is there.
        deadline_s: stop after so many seconds, with a checkpoint of what has been learned.
        fit_s: do as many steps as fit into so many seconds, judging and saving left out, whatever the recipe says; the
            recipe that is written has their number.

    Returns:
        per gate folder what `judge` measured.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run, state = Run(model, recipe, batches), out / "checkpoint"
    try:
        measured = _resume(run, out, fit_s is not None) if resume else {}
        with run.student.attached(), checkpoint.Metrics(out, run.step, run.processes.main) as metrics:
            for progress in _steps(run, deadline_s, fit_s):
                metrics.write(asdict(progress))
                if on_step is not None:
                    on_step(progress)
                if save_every and run.step % save_every == 0:
                    checkpoint.save(run, state)
                _leave_gates(run, out, held_out, metrics, measured)
            if save_every or run.step < run.recipe.steps:
                checkpoint.save(run, state)
    finally:
        run.close()
    run.processes.wait()
    return measured


def _resume(run: Run, out: Path, fitted: bool) -> dict[str, dict[str, float]]:
    """Go on from a checkpoint where there is one: what was measured so far. `fitted`: with its number of steps."""
    found = checkpoint.find(out / "checkpoint", run.processes)
    if found is None:
        return {}
    checkpoint.load(run, found, any_steps=fitted)
    known: dict[str, dict[str, float]] = {}
    if (out / MEASURED_FILE).is_file():
        known = json.loads((out / MEASURED_FILE).read_text(encoding="utf-8"))
    return known


def _leave_gates(
    run: Run,
    out: Path,
    held_out: Callable[[], Iterable[Batch]] | None,
    metrics: checkpoint.Metrics,
    measured: dict[str, dict[str, float]],
) -> None:
    """At the end of a stage its gates are judged and written."""
    for ratio, end in zip(run.recipe.ratios, run.recipe.stage_ends(), strict=True):
        if run.step != end:
            continue
        name = f"{ratio:g}x"
        measured[name] = judge(run.lesson, held_out()) if held_out else {}
        run.save_gates(out / name, ratio, measured[name])
        metrics.write({"step": run.step, "gates": name, **measured[name]})
        if run.processes.main:
            (out / MEASURED_FILE).write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def _steps(run: Run, deadline_s: float | None, fit_s: float | None) -> Iterator[Progress]:
    start, speed = time.perf_counter(), 0.0
    times: list[float] = []
    while run.step < run.recipe.steps:
        ratio, _ = run.recipe.at(run.step)
        before, began = run.tokens, time.perf_counter()
        loss, kl, agreement, share = run.advance()
        now = time.perf_counter()
        rate = (run.tokens - before) / (now - began)
        speed = 0.9 * speed + 0.1 * rate if speed else rate
        reached = 1 / max(1e-9, 1 - share)
        times.append(now - began)
        if fit_s is not None and run.step == FITTED:
            run.fit_steps((fit_s - sum(times)) / statistics.median(times[-TIMED:]))
        yield Progress(run.step, run.recipe.steps, run.tokens, now - start, loss, kl, agreement, ratio, reached, speed)
        if deadline_s is not None and run.processes.any(time.perf_counter() - start > deadline_s):
            return
