"""`kvpleat retrofit`: teach a model to compress its KV memory."""

import importlib.util
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvpleat.cli import options
from kvpleat.cli.command import command
from kvpleat.cli.teaching import Teaching, World, tokenising
from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel
from kvpleat.retrofit import Recipe, data_sources, held_out, load_tokens, mixture, retrofit
from kvpleat.retrofit.config import MODEL_RATES
from kvpleat.retrofit.data_held_out import ROWS
from kvpleat.retrofit.data_store import TokenStore

PREFETCH = 2  # batches that are made while the model works
DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(Recipe)}


@command
def retrofit_(
    data: Annotated[
        list[str],
        typer.Option(help="Text: a file, folder, 'glob', or datasets:NAME[,CONFIG]:SPLIT. Repeat it for several."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for gates, checkpoint and metrics; an unfinished run goes on.")],
    model: options.Model = "smollm2-135m",
    method: Annotated[str, typer.Option(help="dms, fold or dmc.")] = DEFAULT["method"],
    ratio: Annotated[
        str, typer.Option(help="R,R,...: compression ratios, ascending; each leaves gates of its own.")
    ] = "4",
    train: Annotated[str, typer.Option(help="gates, lora (adapters beside them) or full (all weights).")] = DEFAULT[
        "train"
    ],
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text to judge on, as --data; without it nothing is measured.")
    ] = None,
    held_out_rows: Annotated[int, typer.Option(min=1, help="Rows of it to judge on.")] = ROWS,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    steps: Annotated[int | None, typer.Option(min=1, help=f"Optimiser steps (default: {DEFAULT['steps']}).")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to train on, instead of --steps.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Train for about so long, judging left out, instead of --steps.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch, on each GPU.")] = DEFAULT["rows"],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = DEFAULT["length"],
    delay: Annotated[
        int | None,
        typer.Option(min=0, help=f"Tokens that a marked entry stays for (default: {DEFAULT['delay']}; dmc: 0)."),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens of a text whose entries always stay.")] = DEFAULT[
        "sinks"
    ],
    rate: Annotated[float, typer.Option(min=0, help="Learning rate of the gates.")] = DEFAULT["rate"],
    model_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"Learning rate of adapters (default: {MODEL_RATES['lora']:g}) or weights ({MODEL_RATES['full']:g}).",
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="What is asked for, as a share of --ratio; rows overshoot it.")
    ] = DEFAULT["margin"],
    recall_share: Annotated[float, typer.Option(help="Share of rows that are synthetic recall tasks.")] = DEFAULT[
        "recall_share"
    ],
    answer_weight: Annotated[float, typer.Option(min=0, help="What a token of their answers counts.")] = DEFAULT[
        "answer_weight"
    ],
    lm_weight: Annotated[float, typer.Option(min=0, help="Of the language model loss beside the KL.")] = DEFAULT[
        "lm_weight"
    ],
    adapt: Annotated[str, typer.Option(help="Adapters on attention or all linear layers.")] = DEFAULT["adapt"],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = DEFAULT["rank"],
    mlp_size: Annotated[int | None, typer.Option(min=1, help="Hidden channels of a gate (default: linear).")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = DEFAULT["accumulate"],
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")] = False,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Fuse the model (default: on a GPU).")
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 100,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start afresh, whatever --out holds.")] = False,
    deadline: Annotated[float | None, typer.Option(min=1, help="Stop after so many seconds, to go on later.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = DEFAULT["seed"],
    dtype: Annotated[
        str | None, typer.Option(help="Of frozen weights (default: bfloat16 on a GPU, else float32).")
    ] = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Teach a model to compress its KV memory: distillation from itself, without compression, on your texts."""
    world = World.of_environment()
    place = device or world.device()
    on_gpu = place.startswith("cuda")
    recipe = Recipe(
        method=method,
        ratios=_ratios(ratio),
        train=train,
        steps=_steps(steps, tokens, seconds, rows * length * accumulate * world.size),
        rows=rows,
        length=length,
        delay=_delay(method, delay),
        sinks=sinks,
        rate=rate,
        model_rate=model_rate,
        margin=margin,
        lm_weight=lm_weight,
        recall_share=recall_share,
        answer_weight=answer_weight,
        adapt=adapt,
        rank=rank,
        mlp_size=mlp_size,
        seed=seed,
        accumulate=accumulate,
        checkpointing=checkpointing,
        compile=on_gpu if compile is None else compile,
    )
    _check(recipe, data, held_out)
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # what stays in float32 (gates, adapters) may use tensor cores
    loaded = options.load_model(model, dtype or ("bfloat16" if on_gpu else "float32"), place, trust_remote_code)
    _check_length(loaded, recipe)
    text, judged = _texts(loaded, data, held_out, text_field, world)
    run = Teaching(loaded, recipe, text, out, world, resumes=not no_resume)
    how = {"save_every": save_every, "resume": not no_resume, "deadline_s": deadline, "fit_s": seconds}
    _teach(run, judged, held_out_rows, how)
    if world.rank == 0:
        if recipe.train == "full":
            for folder in run.gates():  # so that the model there can be loaded by itself
                loaded.tokenizer.save_pretrained(Path(folder) / "model")
        if as_json:
            print(json.dumps(run.result()))
        else:
            run.print_result()


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--ratio {text!r}: pass numbers with commas between them, such as 2,4,8.") from None


def _steps(steps: int | None, tokens: int | None, seconds: float | None, per_step: int) -> int:
    given = {"--steps": steps, "--tokens": tokens, "--seconds": seconds}
    said = [f"{name} {value:g}" for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise OptionError(
            f"{' and '.join(said)}: each says how long to train. A step is {per_step:,} tokens here; leave all but one "
            "of them out."
        )
    return steps or (math.ceil(tokens / per_step) if tokens else DEFAULT["steps"])


def _delay(method: str, delay: int | None) -> int:
    if delay is not None:
        return delay
    return 0 if method == "dmc" else int(DEFAULT["delay"])


def _check(recipe: Recipe, data: list[str], judged: list[str] | None) -> None:
    """Refuse what would fail only after the model is loaded and the text is read."""
    if recipe.train == "lora" and importlib.util.find_spec("peft") is None:
        raise OptionError("--train lora needs peft, which is not installed: pip install 'kvpleat[retrofit]'")
    ours = {source.key for source in data_sources.find(data)}
    both = ours & {source.key for source in data_sources.find(judged)} if judged else set()
    if both:
        raise OptionError(
            f"{', '.join(sorted(key.split(' ')[0] for key in both))}: named by --data and by --held-out, so the "
            "figures would tell how well the text was learned by heart. Hold it out of --data."
        )


def _check_length(loaded: LoadedModel, recipe: Recipe) -> None:
    limit = describe(loaded.model).max_positions
    if recipe.length > limit:
        raise OptionError(
            f"--length {recipe.length:,}: {loaded.name} knows {limit:,} positions; beyond them there is nothing to "
            "learn from. Pass a shorter one."
        )


def _texts(
    loaded: LoadedModel, data: list[str], judged: list[str] | None, field: str, world: World
) -> tuple[TokenStore, TokenStore | None]:
    """What to train on, and what to judge on."""
    with tokenising(world, "reading --data") as progress:
        text = load_tokens(data, loaded.tokenizer, text_field=field, progress=progress)
    if not judged:
        return text, None
    with tokenising(world, "reading --held-out") as progress:
        return text, load_tokens(judged, loaded.tokenizer, text_field=field, progress=progress)


def _teach(run: Teaching, judged: TokenStore | None, judged_rows: int, how: dict[str, Any]) -> None:
    recipe, world = run.recipe, run.world
    test = held_out(judged, recipe.length, recipe.rows, judged_rows) if judged is not None else None
    batches = mixture(
        run.text,
        run.loaded.tokenizer,
        length=recipe.length,
        batch_rows=recipe.rows,
        recall_share=recipe.recall_share,
        answer_weight=recipe.answer_weight,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        prefetch=PREFETCH,
    )
    try:
        with run:
            retrofit(run.loaded.model, recipe, batches, run.out, held_out=test, on_step=run.on_step, **how)
    finally:
        batches.close()
