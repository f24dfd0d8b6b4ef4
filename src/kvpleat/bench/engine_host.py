"""What a step costs the host: planning, sending and taking in, without what a device computes.

An engine of a model of a few kilobytes decodes, with the forward and the draw left out: every row holds as many pages
as it has tokens for, and draws the same token. All else is as in any step, so a step of a large model takes at least
as long, however fast the device is.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpleat.bench import engine_state
from kvpleat.bench.engine_models import random_model
from kvpleat.bench.engine_report import Bench, Column
from kvpleat.engine.sampling import Sampled
from kvpleat.policies import Full

COLUMNS: list[Column] = [
    ("rows", "rows", "6d", 1), ("plan ms", "plan_seconds", "8.3f", 1e3), ("launch ms", "launch_seconds", "9.3f", 1e3),
    ("take in ms", "rest_seconds", "10.3f", 1e3), ("step ms", "step_seconds", "8.3f", 1e3),
    ("least ms", "least_seconds", "8.3f", 1e3), ("mean ms", "mean_seconds", "8.3f", 1e3),
    ("most ms", "most_seconds", "8.3f", 1e3),
]  # fmt: skip
ROWS = (64, 512, 2048)
PROMPT, STEPS = 64, 64  # tokens of a prompt, and steps that are timed
TOKEN = 5  # that every row draws


def host(bench: Bench) -> None:
    """The host's part of a decode step, by number of rows."""
    bench.heading("host: a decode step without the device", COLUMNS)
    for rows in (3,) if bench.tiny else ROWS:
        bench.case("host", f"{rows:,} rows", COLUMNS, functools.partial(measure, bench, rows))


def measure(bench: Bench, rows: int) -> dict[str, Any]:
    """The figures of so many rows, all in the middle of their answers."""
    model = random_model("gpt2-124m", bench.device, tiny=True)
    core = engine_state.new_core(
        bench, model, Full(), 2**32, rows, PROMPT + engine_state.ANSWER, enforce_eager=True,
        max_num_batched_tokens=engine_state.BATCHED, compile=False,
    )  # fmt: skip
    try:
        without_device(core)
        for number in range(rows):
            core.add(engine_state.random_request(number, PROMPT, engine_state.ANSWER, 97))
        for _ in range(engine_state.WARM_UPS):
            core.step()
        return {"rows": len(core.scheduler.running)} | _timed(core)
    finally:
        core.close()


def without_device(core: Any) -> None:
    """Leave out what a step computes: its forward, and the draw."""
    runner = core.runner
    pages, streams = runner.pool.holders.numel(), runner.pool.shape.num_streams

    @functools.cache
    def drawn(n: int) -> tuple[Tensor, Sampled]:
        """See `Runner._draw`."""
        held, longest = torch.full((n,), 8 * streams), torch.full((n,), 8)
        tokens = torch.full((n,), TOKEN)
        counted = torch.cat([torch.tensor([pages - 8 * streams * n, 0]), held, longest, tokens])
        return counted.to(runner.device), Sampled(tokens.to(runner.device))

    runner._mixed = runner._decode = lambda *_: None
    runner._draw = lambda n, mode: drawn(n)


def _timed(core: Any) -> dict[str, float]:
    """Seconds of steps: their median and parts of it, the shortest (what a busy machine left alone), their mean, and
    the longest."""
    plans: list[float] = []
    launches: list[float] = []
    whole = []
    schedule, launch = core.scheduler.schedule, core.runner.launch
    core.scheduler.schedule, core.runner.launch = _noted(schedule, plans), _noted(launch, launches)
    for _ in range(STEPS):
        whole.append(engine_state.timed(lambda: [None for _ in core.step()]))
    parts = [statistics.median(x) for x in (plans, launches)]
    step = statistics.median(whole)
    return {
        "plan_seconds": parts[0], "launch_seconds": parts[1], "rest_seconds": step - sum(parts), "step_seconds": step,
        "least_seconds": min(whole), "mean_seconds": statistics.mean(whole), "most_seconds": max(whole),
    }  # fmt: skip


def _noted(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same call, and how long it takes each time."""

    def noted(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = call(*args, **options)
        seconds.append(time.perf_counter() - start)
        return found

    return noted
