"""`kvpleat bench`: prefill, decode and memory of any policy or cache beside the full one, in turns."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from kvpleat.accounting import full_bytes, human_bytes
from kvpleat.bench import corpus, methods
from kvpleat.bench.evaluate import with_reference
from kvpleat.bench.floor import copy_bandwidth, weights_read
from kvpleat.bench.methods.peers import worker_versions
from kvpleat.bench.records import describe_run
from kvpleat.bench.speed import Pace, measure
from kvpleat.cli import options
from kvpleat.cli.command import command, plain
from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel

WIDTH = 160  # of the table, also where stdout is no terminal
COLUMNS = ["method", "floor ms", "TPOT ms", "of floor", "ITL ms p50 p90 p99", "tokens/s", "x dynamic", "TTFT s"]
COLUMNS += ["allocated", "process", "peak"]


@command
def bench(
    model: options.Model = "smollm2-135m",
    policy: Annotated[
        str, typer.Option(help="P,P,...: see `kvpleat eval --list`; attention:ratio=2|4 stands for two.")
    ] = "dynamic,attention:ratio=4",
    batch: Annotated[str, typer.Option(help="Rows at a time, with commas between several.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of a row at the end, with commas between several.")] = "2048",
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps of a repeat.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Decode steps before them, left out.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="How often a prompt and its steps are timed.")] = 3,
    data: Annotated[Path | None, typer.Option(help="JSONL (.xz, .gz) of texts with `source` and `text`.")] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for everything; what is done is kept.")] = None,
) -> None:
    """Time policies and caches beside DynamicCache, one step each in turns, with memory and the floor."""
    chosen = with_reference(methods.parse_list(policy))
    pace = Pace(steps, warmup, repeats)
    batches, contexts = options.whole_numbers(batch, "--batch"), options.whole_numbers(context, "--context")
    loaded = options.load_model(model, dtype, device, False)
    windows = _windows(loaded, data or corpus.shipped(), batches, contexts, pace, seed)
    bandwidth, weights = copy_bandwidth(loaded.model.device), weights_read(loaded.model)
    settings = {"batch": batches, "context": contexts, "data": (data or corpus.shipped()).name, "seed": seed}
    settings |= {**asdict(pace), "bandwidth_bytes_per_s": bandwidth, "weights_bytes": weights}
    result = describe_run("bench", loaded, settings, [method.to_dict() for method in chosen])
    console = Console(highlight=False, width=WIDTH)
    console.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; weights read at each step {human_bytes(weights)}")
    for length in contexts:
        for rows in batches:
            console.print(_floor_line(loaded, rows, length, bandwidth, weights))
    with _progress() as progress:
        for length in contexts:
            for rows in batches:
                records = measure(loaded, chosen, windows[length][:rows], pace, bandwidth, progress)
                result.records += records
                result.environment["versions"] |= {f"{k} (peers)": v for k, v in worker_versions().items()}
                if out is not None:
                    result.write(out)
                console.print(_table(records))
                for record in filter(lambda record: record["refused"], records):
                    console.print(f"{record['method']} refused: {plain(record['refused'])}", soft_wrap=True)


def _windows(
    loaded: LoadedModel, data: Path, batches: list[int], contexts: list[int], pace: Pace, seed: int
) -> dict[int, Tensor]:
    """[rows, context] real text for each context, enough rows for the largest batch."""
    limit, decoded = describe(loaded.model).max_positions, pace.warmup + pace.steps
    for length in contexts:
        if not decoded < length <= limit:
            raise OptionError(
                f"--context {length}: it counts the {decoded} decoded tokens in, and {loaded.name} knows {limit:,} "
                f"positions, so it must lie between {decoded + 1} and {limit:,}."
            )
    rows = max(batches)
    return {
        length: torch.stack([ids for _, ids in corpus.token_windows(loaded, data, length, rows, seed)])
        for length in contexts
    }


def _floor_line(loaded: LoadedModel, rows: int, length: int, bandwidth: float, weights: int) -> str:
    """The floor with a full cache, known before anything is timed."""
    held = full_bytes(describe(loaded.model).shape, rows * length)
    return (
        f"floor at {rows} x {length:,}: {1e3 * weights / bandwidth:.1f} ms a step for the weights, "
        f"{1e3 * (weights + held) / bandwidth:.1f} ms with a full cache ({human_bytes(held)})"
    )


def _progress() -> Progress:
    """Bars on stderr, so that stdout holds figures only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _table(records: list[dict[str, Any]]) -> Table:
    """One line a method, the floor first."""
    first = records[0]
    table = Table(title=f"{first['batch']} x {first['context']:,} tokens", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for record in records:
        table.add_row(plain(record["method"]), *(["refused"] if record["refused"] else _cells(record)))
    return table


def _cells(record: dict[str, Any]) -> list[str]:
    speedup, process = record["speedup"], record["process"]
    tpots = [statistics.mean(steps) for steps in record["step_s"]]
    return [
        f"{1e3 * record['floor_step_s']:.1f}",
        _spread([1e3 * tpot for tpot in tpots], 1),
        f"{record['floor_share']:.0%}",
        " ".join(f"{1e3 * record['itl_s'][p]:.1f}" for p in ("p50", "p90", "p99")),
        f"{record['tokens_per_s']:.1f}",
        f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})" if speedup else "",
        _spread(record["ttft_s"], 2),
        human_bytes(record["memory"]["allocated_bytes"]),
        human_bytes(process["process_bytes"]) if process else "",
        human_bytes(record["peak_bytes"]) if process else "",
    ]


def _spread(values: list[float], digits: int) -> str:
    """Median, and the least and most in brackets."""
    middle, least, most = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"
