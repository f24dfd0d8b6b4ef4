"""`kvpleat serve`: vLLM's OpenAI server with a compressed cache. Makes the command, shows it, and becomes it."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig

from kvpleat.cli import options
from kvpleat.cli.command import command
from kvpleat.errors import ModelError
from kvpleat.hf import smollm2
from kvpleat.policies import shipped
from kvpleat.vllm import command as vllm
from kvpleat.vllm.settings import LEARNED


@command
def serve(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, or a name on the hub.")],
    flags: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- FLAGS OF VLLM SERVE]", help="After `--`: any flags of `vllm serve`.", show_default=False
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="dms, fold, dmc or window.")] = "dms",
    ratio: Annotated[
        float | None, typer.Option(help="Which gates that come with kvpleat (default: 4, unless --gates).")
    ] = None,
    gates: Annotated[
        str | None, typer.Option(help="Gates of dms, fold or dmc: a name (`kvpleat policies`) or a folder.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Of window: entries that each stream keeps.")] = None,
    sinks: Annotated[int | None, typer.Option(help="Of window: how many of them are the first ones.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command of vLLM, and end.")] = False,
) -> None:
    """Serve a model to OpenAI's clients by vLLM (`pip install 'kvpleat[vllm]'`), its KV cache compressed."""
    words = list(flags or [])
    if not dry_run or vllm.installed():
        vllm.check_installed()
    given = _given(policy, {"ratio": ratio, "gates": gates, "budget": budget, "sinks": sinks})
    if model == smollm2.NAME:
        model, words = str(smollm2.converted()), ["--served-model-name", model, *words]
    arguments = vllm.build(model, _config(model, words), given, words)
    print(vllm.shown(arguments), file=sys.stdout if dry_run else sys.stderr, flush=True)
    if not dry_run:
        program = vllm.program()
        os.execv(program[0], [*program, *arguments])


def _config(model: str, words: list[str]) -> Any:
    """transformers' config of a model, as vLLM will read it."""
    values = vllm.Flags.read(words).values
    try:
        return AutoConfig.from_pretrained(
            model, revision=values.get("--revision"), trust_remote_code="--trust-remote-code" in values
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"The config of {model!r} cannot be read: {reason} Pass a folder in transformers' format, a name on the "
            f"hub, or {smollm2.NAME}."
        ) from error


def _given(policy: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The policy and its options as kvpleat's settings inside vLLM."""
    given = {name: value for name, value in chosen.items() if value is not None}
    if policy in LEARNED and not given:
        given["ratio"] = options.DEFAULT_RATIO
    folder = given.get("gates")
    if folder is not None and folder not in shipped() and Path(folder).expanduser().is_dir():
        given["gates"] = str(Path(folder).expanduser().resolve())  # workers may run elsewhere
    return {"policy": policy, **given}
