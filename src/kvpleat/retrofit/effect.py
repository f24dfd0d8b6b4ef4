"""What compression does to training itself: `python -m kvpleat.retrofit.effect --data FILES --held-out FILES ...`

The same model is trained several times on the language model loss alone, with all its weights: with each method, and
without compression, from the same start, on the same batches in the same order, for the same number of steps. The model
is one that exists (`--model smollm2-135m`: does it keep learning while it compresses?) or a small GPT-2 with random
weights (`--model scratch`: does one that never knew anything else learn as much?). Gates decide from the first step on
and are trained along; a one-sided penalty holds the ratio. Where gates are new the ratio grows over the first half.
Losses are in nats a token, on rows of one held-out document each and on the first rows that are trained on, always with
hard decisions; of a compressed model also with its compression off.
"""

import argparse
import copy
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvpleat.errors import OptionError
from kvpleat.hf.adapters import merge
from kvpleat.hf.families import base_of, describe
from kvpleat.hf.models import load
from kvpleat.policies.gates import Gates
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Mixture, TokenStore, load_tokens, mixture
from kvpleat.retrofit.data_held_out import held_out
from kvpleat.retrofit.effect_arm import METHODS, OFF, Arm, Texts, Write, fresh_gates, policy_of, train

SCRATCH = "scratch"
RATES = {SCRATCH: 1e-3}  # learning rate of the weights by model
RATE = 1e-4  # of models that exist
COLUMNS = (
    ("arm", "{arm}"),
    ("steps", "{step}"),
    ("tokens", "{tokens:,}"),
    ("seconds", "{seconds:.1f}"),
    ("ratio", "{ratio:.2f}"),
    ("held out: start", "{start:.4f}"),
    ("end", "{held_out:.4f}"),
    ("to off", "{difference:+.4f}"),
    ("%", "{percent:+.2f}"),
    ("compression off", "{held_out_off:.4f}"),
    ("trained: end", "{trained:.4f}"),
)


def compare(
    model: Any,
    arms: Sequence[tuple[Recipe, Gates | None]],
    texts: Texts,
    write: Write,
    *,
    evaluations: int = 10,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Train copies of a model, one after the other.

    Args:
        model: the common start. It and the gates stay as they are.
        arms: recipe and gates of each; gates None: compression off, exactly once.
        texts: what all are trained and judged on.
        write: takes a line for each step and evaluation.
        evaluations: of each arm.
        seconds: for the first arm; its steps are then those of all arms.

    Returns:
        by arm its last evaluation, with the held-out loss at the "start", the "difference" of the one at the end to
        that without compression (nats a token), and the same in "percent".
    """
    lines: list[dict[str, Any]] = []

    def keep(line: dict[str, Any]) -> None:
        write(line)
        if line["kind"] == "evaluation":
            lines.append(line)

    steps: int | None = None
    for recipe, gates in arms:
        fixed = recipe if steps is None else replace(recipe, steps=steps)
        arm = Arm(copy.deepcopy(model), fixed, copy.deepcopy(gates))
        steps = train(arm, texts, keep, evaluations=evaluations, seconds=seconds if steps is None else None)
    first = {line["arm"]: line for line in reversed(lines)}
    last = {line["arm"]: line for line in lines}
    full = last[OFF]["held_out"]
    return [_summed_up(first[name], last[name], full) for name in sorted(last, key=lambda name: name != OFF)]


def _summed_up(first: dict[str, Any], last: dict[str, Any], full: float) -> dict[str, Any]:
    difference = last["held_out"] - full
    found = {"start": first["held_out"], "difference": difference, "percent": 100 * difference / full}
    return last | found | {"kind": "result"}


def table(results: list[dict[str, Any]]) -> str:
    """The results of `compare` for people."""
    filled = [{"held_out_off": result["held_out"], **result} for result in results]
    cells = [[title for title, _ in COLUMNS], *([form.format(**row) for _, form in COLUMNS] for row in filled)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def texts_of(store: TokenStore, judged: TokenStore, tokenizer: Any, recipe: Recipe, evaluated: int) -> Texts:
    """Training batches without recall tasks, and what losses are measured on: the first batches of these with at least
    `evaluated` rows, and so many rows of other documents at most."""

    def batches() -> Mixture:
        rows, seed = recipe.rows, recipe.seed
        return mixture(store, tokenizer, length=recipe.length, batch_rows=rows, recall_share=0.0, seed=seed, prefetch=2)

    first = batches()
    try:
        trained = list(islice(first, -(-evaluated // recipe.rows)))
    finally:
        first.close()
    return Texts(batches, trained, list(held_out(judged, recipe.length, recipe.rows, evaluated)()))


def small_gpt2(tokenizer: Any, *, layers: int, width: int, heads: int, length: int, seed: int) -> Any:
    """A GPT-2 with random weights and no dropout, in eval mode."""
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **dropouts,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def prepared_gates(model: Any, methods: Sequence[str], folder: str | None) -> dict[str, Gates]:
    """Gates of a folder by their method, their LoRA merged into the model, which is everybody's start."""
    if folder is None:
        return {}
    gates = Gates.from_pretrained(folder)
    if list(methods) != [gates.config.method]:
        raise OptionError(
            f"{gates!r} are for {gates.config.method} and --method is {' '.join(methods)}: trained gates and new ones "
            f"are not compared. Pass --method {gates.config.method}, or leave --gates out."
        )
    policy_of(gates.config.method)(gates=gates).for_model(base_of(model, describe(model)))
    if gates.adapter is not None:
        merge(model, gates.adapter)
    return {gates.config.method: gates}


def main(argv: list[str] | None = None) -> None:
    """Command line of the comparison."""
    args = _parser().parse_args(argv)
    scratch = args.model == SCRATCH
    loaded = load(args.tokenizer if scratch else args.model, dtype="float32")
    device, tokenizer = loaded.model.device, loaded.tokenizer
    model: Any = loaded.model
    if scratch:
        shape = {"layers": args.layers, "width": args.width, "heads": args.heads, "length": args.length}
        model = small_gpt2(tokenizer, seed=args.seed, **shape).to(device)
    given = prepared_gates(model, args.method, args.gates)
    arms: list[tuple[Recipe, Gates | None]] = []
    for method in args.method:
        recipe = recipe_of(args, method, given.get(method))
        arms.append((recipe, given.get(method) or fresh_gates(model, recipe)))
    arms.append((arms[0][0], None))
    store, judged = (load_tokens(names, tokenizer) for names in (args.data, args.held_out))
    texts = texts_of(store, judged, tokenizer, arms[0][0], args.evaluated_rows)
    run = {"kind": "run", "model": args.model, "machine": machine(device), "parameters": model.num_parameters()}
    run |= {"gates": args.gates, "recipe": asdict(arms[0][0]), "epoch_tokens": store.num_tokens}
    run |= {name: sum(batch.tokens.numel() for batch in getattr(texts, name)) for name in ("trained", "held_out")}
    with written(args.out) as write:
        write(run)
        results = compare(model, arms, texts, write, evaluations=args.evaluations, seconds=args.seconds)
        for result in results:
            write(result)
    print(table(results))
    print(f"{args.model}, {run['parameters']:,} parameters; {run['machine']}; {run['held_out']:,} held-out tokens")


def recipe_of(args: argparse.Namespace, method: str, gates: Gates | None) -> Recipe:
    """The recipe of one arm."""
    ratio = args.ratio or (gates.config.ratio if gates else 4.0)
    return Recipe(
        method=method,
        ratios=(ratio,),
        train="full",
        steps=args.steps or 1,  # with --seconds a placeholder until the first arm was timed
        rows=args.rows,
        length=args.length,
        delay=gates.config.delay if gates else args.delay,
        rate=args.gate_rate,
        model_rate=args.rate or RATES.get(args.model, RATE),
        ramp=0.0 if gates else 0.5,
        recall_share=0.0,
        seed=args.seed,
        compile=args.compile,
    )


@contextmanager
def written(out: Path) -> Iterator[Write]:
    """A function that adds a line to a JSON lines file, and shows evaluations on stdout."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            if line["kind"] == "evaluation":
                shown = "{arm:>5}  step {step:>6}  {seconds:7.1f} s  held out {held_out:.4f}  ratio {ratio:.2f}"
                print(shown.format(**line), flush=True)

        yield write


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvpleat.retrofit.effect", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a model's name or folder, or scratch: a GPT-2 with random weights")
    add("--data", nargs="+", required=True, metavar="FILE", help="text to train on; formats as for kvpleat retrofit")
    add("--held-out", nargs="+", required=True, metavar="FILE", help="text to judge on")
    add("--method", nargs="+", choices=METHODS, default=["dms"], help="an arm for each, and one without compression")
    add("--gates", metavar="FOLDER", help="gates to start with, for one --method; left out: new ones")
    add("--ratio", type=float, help="compression ratio; left out: that of the gates, or 4")
    add("--out", type=Path, required=True, help="JSON lines file to write")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimiser steps of each arm")
    length.add_argument("--seconds", type=float, help="as many steps as the first arm, compiled, takes in this time")
    add("--rows", type=int, default=8, help="sequences a step")
    add("--length", type=int, default=4096, help="tokens of a row")
    add("--rate", type=float, help=f"learning rate of the weights; left out: {RATE:g}, from scratch {RATES[SCRATCH]:g}")
    add("--gate-rate", type=float, default=3e-3, help="learning rate of the gates")
    add("--delay", type=int, default=64, help="tokens a marked entry waits, where gates are new")
    add("--seed", type=int, default=0, help="of weights, rows and noise")
    add("--evaluations", type=int, default=10, help="of each arm, beside one at the start")
    add("--evaluated-rows", type=int, default=16, help="rows of each text that losses are measured on")
    add("--compile", action="store_true", help="fuse the model with torch.compile")
    add("--tokenizer", default="smollm2-135m", help="from scratch: the model whose tokenizer is taken")
    add("--layers", type=int, default=6, help="from scratch: layers")
    add("--width", type=int, default=384, help="from scratch: channels of the model")
    add("--heads", type=int, default=6, help="from scratch: attention heads")
    return parser


if __name__ == "__main__":
    main()
