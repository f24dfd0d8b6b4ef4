"""The commands of `kvpleat`. Answers go to stdout; progress, meters of single runs and errors to stderr."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvpleat import explain as explain_model
from kvpleat import policies as policies_module
from kvpleat.cli import bench as _bench  # noqa: F401  # registers its command
from kvpleat.cli import encode as _encode  # noqa: F401  # registers its command
from kvpleat.cli import eval as _eval  # noqa: F401  # registers its command
from kvpleat.cli import options, show
from kvpleat.cli import report as _report  # noqa: F401  # registers its command
from kvpleat.cli import retrofit as _retrofit  # noqa: F401  # registers its command
from kvpleat.cli import serve as _serve  # noqa: F401  # registers its command
from kvpleat.cli.chat import Chat, converse
from kvpleat.cli.command import app, command, main, plain
from kvpleat.cli.run import Answer, agreement, answer_compressed, answer_full
from kvpleat.hf.models import known_models
from kvpleat.policies import Policy

__all__ = ["app", "main"]


@command
def generate(
    model: options.Model = "smollm2-135m",
    policy: options.PolicyName = "attention",
    ratio: options.Ratio = None,
    coverage: options.Coverage = None,
    gates: options.Gates = None,
    bits: options.Bits = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; after the file's, if both are given.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with text to continue.")] = None,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed the text as it is, without the chat template.")] = False,
    max_new_tokens: options.MaxNewTokens = 128,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too, and compare.")] = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill_chunk: options.PrefillChunk = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt (--prompt, --prompt-file or stdin) with a compressed cache, and say what it took."""
    decoding = options.Decoding(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    chosen = options.make_policy(policy, ratio, coverage, bits, gates)
    text = options.read_prompt(prompt, prompt_file)
    loaded = options.load_model(model, dtype, device, trust_remote_code)
    ids = options.encode(loaded, text, system, raw, max_new_tokens)
    label = options.policy_label(chosen)
    log = Console(stderr=True, highlight=False)
    out = Console(stderr=as_json, highlight=False)

    def run(title: str, answer: Callable[..., Answer], *args: Any) -> Answer:
        if compare:
            out.print(f"[bold]{title}:[/] ", end="")
        result = answer(
            loaded, *args, ids, decoding, lambda text: _stream(out, text), show.prefilling(log, f"prefill, {title}")
        )
        out.print()
        return result

    full = run("full cache", answer_full) if compare else None
    compressed = run(label, answer_compressed, chosen)
    _print_meter(out if compare else log, full, compressed, label)
    if as_json:
        print(json.dumps(_generate_json(chosen, full, compressed)))


def _stream(out: Console, text: str) -> None:
    out.file.write(text)
    out.file.flush()


def _print_meter(console: Console, full: Answer | None, compressed: Answer, label: str) -> None:
    memory = compressed.memory
    console.print()
    console.print(show.meter(full, compressed, label))
    console.print()
    console.print(show.kept_picture(memory.kept, memory.seen_tokens, console.width))


def _generate_json(policy: Policy, full: Answer | None, compressed: Answer) -> dict[str, Any]:
    result = {**compressed.to_dict(), "policy": policy.to_dict()}
    if full is not None:
        result["full"] = full.to_dict()
        result["agreement"] = round(agreement(full.tokens, compressed.tokens), 4)
    return result


@command
def chat(
    model: options.Model = "smollm2-135m",
    policy: options.PolicyName = "attention",
    ratio: options.Ratio = None,
    coverage: options.Coverage = None,
    gates: options.Gates = None,
    bits: options.Bits = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill_chunk: options.PrefillChunk = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat over one compressed cache. /report, /save FILE, /load FILE, /reset and /quit are commands."""
    decoding = options.Decoding(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    chosen = options.make_policy(policy, ratio, coverage, bits, gates)
    loaded = options.load_model(model, dtype, device, trust_remote_code)
    with Chat(loaded, chosen, decoding, system) as session:
        converse(session, options.policy_label(chosen))


@command
def policies(as_json: options.Json = False) -> None:
    """The policies: what each does, needs and guarantees, and the gates that come with kvpleat."""
    names = ("name", "summary", "needs", "guarantees")
    rows = [{name: getattr(policy, name) for name in names} for policy in policies_module.registry().values()]
    gates = {row["name"]: _shipped_gates(row["name"]) for row in rows}
    if as_json:
        print(json.dumps({"policies": [{**row, "gates": gates[row["name"]]} for row in rows]}))
        return
    for row in rows:
        if gates[row["name"]]:
            row["gates"] = "\n".join(map(_gates_line, gates[row["name"]]))
    _print_rows(rows)


def _shipped_gates(method: str) -> list[dict[str, Any]]:
    """The gates that come with kvpleat for a policy."""
    return [
        {"name": name, "ratio": config.ratio, "base": config.base, "measured": config.training.get("measured", {})}
        for name, config in policies_module.shipped().items()
        if config.method == method
    ]


def _gates_line(gates: dict[str, Any]) -> str:
    figures = "".join(f", {name} {value:.4g}" for name, value in gates["measured"].items())
    return f"{gates['name']}: ratio {gates['ratio']:g}{figures}"


@command
def explain(
    model: options.Model = "smollm2-135m",
    policy: options.PolicyName = "attention",
    ratio: options.Ratio = None,
    coverage: options.Coverage = None,
    gates: options.Gates = None,
    bits: options.Bits = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Which policy, memory and kernels would run for a model, and why."""
    chosen = options.make_policy(policy, ratio, coverage, bits, gates)
    loaded = options.load_model(model, dtype, device, trust_remote_code)
    explanation = explain_model(loaded.model, chosen)
    if as_json:
        print(json.dumps(explanation.to_dict()))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for topic, text in explanation.topics.items():
        table.add_row(f"[bold]{topic}[/]", plain(text))
    table.add_row("[bold]source[/]", plain(loaded.source))
    Console(highlight=False).print(table)


@command
def models(as_json: options.Json = False) -> None:
    """Models with short names. Local folders and names on the hub work everywhere too."""
    rows = [{"name": m.name, "state": m.state, "summary": m.summary, "remedy": m.remedy} for m in known_models()]
    if as_json:
        print(json.dumps({"models": rows}))
        return
    _print_rows([{name: row[name] for name in ("name", "state", "summary")} for row in rows])
    console = Console(highlight=False)
    for row in rows:
        if row["remedy"]:
            console.print(f"\nTo install {row['name']}: {plain(row['remedy'])}", soft_wrap=True)
    console.print("\nAny folder that save_pretrained wrote and any name on the hub (org/model) work as --model too.")


def _print_rows(rows: list[dict[str, str]]) -> None:
    """A block per row: the name, then what there is to say about it. Readable at any width."""
    console = Console(highlight=False)
    for row in rows:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=12)
        table.add_column()
        (first, name), *others = row.items()
        table.add_row(f"[bold]{first}[/]", f"[bold]{name}[/]")
        for topic, text in others:
            table.add_row(topic, plain(text))
        console.print(table)
        if row is not rows[-1]:
            console.print()
