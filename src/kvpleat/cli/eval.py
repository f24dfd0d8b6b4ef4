"""`kvpleat eval`: the quality of any policy or cache beside the full one, on the same items."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvpleat.bench import corpus, methods, summary, tasks
from kvpleat.bench.evaluate import Evaluation, with_reference
from kvpleat.bench.lm import run_lm_eval
from kvpleat.bench.methods.peers import worker_versions
from kvpleat.bench.records import Record, describe_run
from kvpleat.bench.weights import transform, weight_bytes
from kvpleat.cli import options
from kvpleat.cli.command import command
from kvpleat.errors import OptionError
from kvpleat.hf.models import LoadedModel

POLICIES = "full,window:ratio=4,attention:ratio=4,attention:ratio=4,bits=8,random:ratio=4"
WIDTH = 150  # of the tables; narrower ones lose their figures
QUICK = ("continuation,passkey", "1024", 2, 1, "after")  # tasks, lengths, count, depths, forms: three minutes


def _shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and int(index) < int(count):
        return int(index), int(count)
    raise OptionError(f"--shard {text!r}: pass i/n with i from 0 to n-1, such as 0/4.")


@command
def eval_(
    model: options.Model = "smollm2-135m",
    policy: Annotated[
        str, typer.Option(help="P,P,...: policies and caches (see --list), such as attention:ratio=2|4,snapkv:ratio=4.")
    ] = POLICIES,
    task: Annotated[str, typer.Option("--tasks", help="T,T,... (see --list), or all.")] = "continuation,passkey,qa",
    lengths: Annotated[str, typer.Option(help="Tokens of an item, with commas between several.")] = "2048",
    count: Annotated[int, typer.Option(min=1, help="Items of each kind and length.")] = 8,
    depths: Annotated[int, typer.Option(min=1, help="Depths at which pass keys are hidden.")] = 4,
    forms: Annotated[str, typer.Option(help="known, after, or both: is the question there before compression?")] = (
        "known,after"
    ),
    data: Annotated[Path | None, typer.Option(help="JSONL (.xz, .gz) of texts with `source` and `text`.")] = None,
    qa_data: Annotated[Path | None, typer.Option(help="JSON with `paragraphs` and `questions`.")] = None,
    multiturn_data: Annotated[Path | None, typer.Option(help="JSON list of `story` and `turns`.")] = None,
    sources: Annotated[str | None, typer.Option(help="Take texts of these sources only.")] = None,
    weights: Annotated[str, typer.Option(help="full, int8, int4, pruned30, pruned50, 2:4: a matrix with --policy.")] = (
        "full"
    ),
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="T,T,...: tasks of lm-eval to run as well.")] = None,
    lm_eval_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shipped sets, three minutes on two cores.")] = False,
    seed: options.Seed = 0,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n processes that share the items.")] = "0/1",
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(help="Write everything here as JSON; an unfinished run goes on.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Name all policies and tasks, and end.")] = False,
) -> None:
    """Judge policies and caches beside the full cache, on the same items, with intervals."""
    if show_list:
        _print_names()
        return
    if quick:
        task, lengths, count, depths, forms = QUICK
    judged = with_reference(methods.parse_list(policy))
    chosen = tasks.parse_list(task)
    loaded = options.load_model(model, dtype, device, False)
    source = tasks.Source(
        loaded,
        data=data or corpus.shipped(),
        qa=qa_data or corpus.shipped("qa.json"),
        multiturn=multiturn_data or corpus.shipped("multiturn.json"),
        lengths=tuple(options.whole_numbers(lengths, "--lengths")),
        count=count,
        depths=depths,
        forms=tuple(forms.split(",")),
        sources=tuple(sources.split(",")) if sources else None,
        seed=seed,
    )
    settings: dict[str, Any] = {
        "tasks": [one.name for one in chosen],
        "lengths": list(source.lengths),
        "count": count,
        "depths": depths,
        "forms": list(source.forms),
        "sources": sources,
        "data": {"data": source.data.name, "qa": source.qa.name, "multiturn": source.multiturn.name},
        "weights": list(dict.fromkeys(weights.split(","))),
        "lm_eval": lm_eval,
        "seed": seed,
        "shard": shard,
    }
    result = describe_run("eval", loaded, settings, [method.to_dict() for method in judged])
    models = {name: transform(loaded, name) for name in settings["weights"]}
    result.model["weights_bytes"] = {name: weight_bytes(one.model) for name, one in models.items()}
    names = lm_eval.split(",") if lm_eval else []
    also = {f"lm-eval {m.spec}": partial(_lm_eval, models, m, names, lm_eval_path, source) for m in judged if names}
    part = out.with_name(out.name + ".part") if out else None
    evaluation = Evaluation(result, judged, chosen, source, part, _shard(shard))
    with _progress() as progress:
        result.records = evaluation.run(models, progress, also)
    result.environment["versions"] |= {f"{k} (peers)": v for k, v in worker_versions().items()}
    if out is not None:
        result.write(out)
        assert part is not None
        part.unlink(missing_ok=True)
    _print(result.records, judged)


def _lm_eval(
    models: dict[str, LoadedModel], method: methods.Method, names: list[str], path: Path | None, source: tasks.Source
) -> list[Record]:
    """lm-eval's own tasks on one method, as records: its metrics are kept under their names."""
    records = []
    for weights, loaded in models.items():
        done = run_lm_eval(
            loaded, method, names, source.count, include_path=path, seed=source.seed, lengths=source.lengths
        )
        for name, samples in done["samples"].items():
            for sample in samples:
                scores = {k: float(v) for k, v in sample["scores"].items() if isinstance(v, int | float) and v >= 0}
                item = f"lm-eval/{name}/{sample['filter']}/{sample['doc']}/{str(sample['hash'])[:12]}"
                records.append(Record(f"lm-eval {name}", item, {}, method.spec, scores, {}, weights))
    return records


def _progress() -> Progress:
    """Bars on stderr, so that stdout holds figures only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _print_names() -> None:
    out = Console(highlight=False, soft_wrap=True)
    out.print("[bold]policies and caches[/]")
    for name, text in methods.known().items():
        out.print(f"  {name:<14}{text}")
    out.print("[bold]tasks[/]")
    for one in tasks.registry().values():
        out.print(f"  {one.name:<14}{one.summary}")


def _print(records: list[Record], judged: list[methods.Method]) -> None:
    """Every figure: a block for each task and form, a line for each method."""
    labels = {method.spec: method.label for method in judged}
    out = Console(highlight=False, width=WIDTH)
    blocks: dict[tuple[str, summary.Group, str], list[summary.Row]] = {}
    for row in summary.summarize(records):
        blocks.setdefault((row.task, row.group, row.weights), []).append(row)
    for (name, group, weights), rows in blocks.items():
        extra = [f"{key} {value}" for key, value in group] + ([] if weights == "full" else [f"weights {weights}"])
        table = Table(title=", ".join([name, *extra]), title_justify="left", title_style="bold", box=None)
        for column in (
            "method",
            "bytes",
            "metric",
            "value",
            "95% interval",
            "to the full cache",
            "95% interval",
            "items",
        ):
            table.add_column(column, justify="left" if column in ("method", "metric") else "right")
        for row in rows:
            table.add_row(*_cells(row, labels))
        out.print(table)
        out.print()


def _cells(row: summary.Row, labels: dict[str, str]) -> list[str]:
    value, change = row.metric.text, row.metric.difference_text
    interval = f"{value(row.value.low)} to {value(row.value.high)}" if row.certain else ""
    cells = [
        labels[row.method],
        "" if math.isinf(row.ratio) else f"1/{row.ratio:.2f}",
        row.metric.label,
        value(row.value.value),
        interval,
    ]
    if row.difference is None:
        return [*cells, "", "", str(row.items)]
    spread = f"{change(row.difference.low)} to {change(row.difference.high)}" if row.certain else ""
    return [*cells, change(row.difference.value), spread, str(row.items)]
