"""What `kvpleat retrofit` shows: what it is about to do, where it is, and what came of it."""

import json
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvpleat.cli.command import plain
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel
from kvpleat.policies.gates import CONFIG_FILE
from kvpleat.retrofit import Recipe
from kvpleat.retrofit.data_store import TokenStore
from kvpleat.retrofit.flops import cost, matmul_rate, trained_weights, visible_keys
from kvpleat.retrofit.train import Progress as Step

WIDTH = 150  # of the table, also where stdout is no terminal
TIMED = 20  # latest steps whose median is the speed: neither compiling nor judging moves it
KNOWN = 5  # steps after which the speed is known
COLUMNS = {"ratio": "{:.2f}", "kl": "{:.4f}", "agreement": "{:.1%}", "perplexity_change": "{:+.2%}"}


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun and accelerate number them: rank of size, local_rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Self:
        """What the launcher of this process said; one process where there was none."""
        return cls(*(int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))  # fmt: skip

    def device(self) -> str:
        """Where this process works."""
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def console(self) -> Console:
        """stderr, of the first process alone."""
        return Console(stderr=True, highlight=False, quiet=self.rank != 0)


@contextmanager
def tokenising(world: World, title: str) -> Iterator[Callable[[float, int, int], None]]:
    """A bar while texts become tokens; nothing where they are read back."""
    console = world.console()
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[counts]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0, counts="", visible=False)

        def show(share: float, documents: int, tokens: int) -> None:
            bar.update(task, completed=share, visible=True, counts=f"{documents:,} documents, {tokens:,} tokens")

        yield show


class Teaching:
    """A retrofit as people see it. A context manager: the bar is there inside it.

    Args:
        loaded: the model, before anything is put on it.
        recipe: what to do. text: what it is done on. out: where to.
        world: this process and the others.
        resumes: whether a checkpoint in `out` is used.
    """

    def __init__(
        self, loaded: LoadedModel, recipe: Recipe, text: TokenStore, out: Path, world: World, *, resumes: bool
    ) -> None:
        self.loaded, self.recipe, self.text, self.out, self.world = loaded, recipe, text, out, world
        self.resumes = resumes and (out / "checkpoint").is_dir()
        self.trained = trained_weights(loaded.model, recipe)
        self.step_tokens = recipe.rows * recipe.length * recipe.accumulate * world.size
        self.flops = cost(loaded.model, recipe, visible_keys(text, recipe.length, recipe.recall_share)).total
        self.device = describe(loaded.model).device
        self.peak: float | None = None  # FLOP/s of this GPU
        self.last: Step | None = None
        self._times: deque[float] = deque(maxlen=TIMED)
        self._console = world.console()
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            self.peak = matmul_rate(self.device)
        self._console.print(self._summary())
        self._task = self._bar.add_task("", total=self.recipe.steps, figures="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step(self, step: Step) -> None:
        """Show where the run is."""
        if self.last is not None:
            self._times.append(step.seconds - self.last.seconds)
        self.last = step
        if len(self._times) == KNOWN and step.step < step.steps:
            self._console.print(f"about {self._left()} to go at {self._pace()}")
        figures = f"loss {step.loss:.4f}, KL {step.kl:.4f}, ratio {step.reached:.2f} of {step.ratio:.2f}"
        if self.speed:
            figures += f", {self.speed:,.0f} tokens/s, {self._left()} left"
        self._bar.update(self._task, completed=step.step, total=step.steps, figures=figures)

    @property
    def speed(self) -> float | None:
        """Tokens/s of all processes over the latest steps; None until it is known."""
        return self.step_tokens / statistics.median(self._times) if len(self._times) >= KNOWN else None

    @property
    def share_of_peak(self) -> float | None:
        """What one GPU computes of what it could in large products of bfloat16 matrices."""
        if self.speed is None or self.peak is None:
            return None
        return self.flops * self.speed / self.world.size / self.peak

    def result(self) -> dict[str, Any]:
        """Everything about the run, for programs."""
        return {
            "out": str(self.out),
            "recipe": asdict(self.recipe),
            "steps": self.last.step if self.last else self.recipe.steps,
            "tokens": self.last.tokens if self.last else None,
            "seconds": self.last.seconds if self.last else 0.0,
            "trained": self.trained,
            "tokens_in_store": self.text.num_tokens,
            "tokens_per_s": self.speed,
            "flops_per_token": self.flops,
            "matmul_flops_per_s": self.peak,
            "share_of_peak": self.share_of_peak,
            "gates": self.gates(),
        }

    def gates(self) -> dict[str, dict[str, float]]:
        """What was measured, by the gate folders that this run, or a part of it before, left in `out`."""
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        if self.last:
            recipe["steps"] = self.last.steps  # may have been fitted to a time
        found = {}
        for ratio in self.recipe.ratios:
            file = self.out / f"{ratio:g}x" / CONFIG_FILE
            training = json.loads(file.read_text(encoding="utf-8"))["training"] if file.is_file() else {}
            if training.get("recipe") == recipe:
                found[str(file.parent)] = training["measured"]
        return found

    def print_result(self) -> None:
        """The gates and what was measured, on stdout."""
        out = Console(highlight=False, width=WIDTH)
        if self.last and self.last.step < self.last.steps:
            out.print(f"stopped after step {self.last.step} of {self.last.steps}; the same command goes on")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        for name in ("gates", *COLUMNS):
            table.add_column(name.replace("_", " "), justify="left" if name == "gates" else "right", no_wrap=True)
        for folder, measured in self.gates().items():
            table.add_row(plain(folder), *(f.format(measured[k]) if k in measured else "" for k, f in COLUMNS.items()))
        if table.rows:
            out.print(table)

    def _summary(self) -> Table:
        """What is about to be done."""
        recipe, shape = self.recipe, describe(self.loaded.model).shape
        ratios = ", ".join(f"{ratio:g}x" for ratio in recipe.ratios)
        counts = ", ".join(f"{count:,} of {what}" for what, count in self.trained.items())
        total = recipe.steps * self.step_tokens
        passes = total * (1 - recipe.recall_share) / self.text.num_tokens
        processes = f" x {self.world.size} processes" if self.world.size > 1 else ""
        peak = f"; {self.peak / 1e12:,.0f} TFLOP/s at most, measured" if self.peak else ""
        lines = {
            "model": f"{self.loaded.name}, {shape.num_layers} layers x {shape.num_kv_heads} KV heads, "
            f"{str(shape.dtype).removeprefix('torch.')} on {self.device}",
            "learns": f"{recipe.method} at {ratios}, delay {recipe.delay}; numbers trained: {counts}",
            "text": f"{self.text.num_tokens:,} tokens in {self.text.num_documents:,} documents; "
            f"{recipe.recall_share:.0%} of the rows are recall tasks",
            "run": f"{recipe.steps:,} steps x {recipe.accumulate * recipe.rows} rows x {recipe.length:,} tokens"
            f"{processes} = {total:,} tokens, {passes:.3g} times through the text",
            "cost": f"{self.flops / 1e9:.3g} GFLOP a token{peak}",
            "out": f"{self.out}{', going on from its checkpoint' if self.resumes else ''}",
        }
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for topic, text in lines.items():
            table.add_row(f"[bold]{topic}[/]", plain(text))
        return table

    def _left(self) -> str:
        assert self.last is not None
        steps = self.recipe.steps - self.last.step
        return str(timedelta(seconds=round(steps * statistics.median(self._times))))

    def _pace(self) -> str:
        share = self.share_of_peak
        return f"{self.speed:,.0f} tokens/s" + (f", {share:.0%} of the peak" if share is not None else "")
