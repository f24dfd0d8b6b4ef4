"""`kvpleat encode`: lines of text to vectors, by an encoder with merged tokens or as it is."""

import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import typer
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from kvpleat import compress, policies
from kvpleat.cli import options
from kvpleat.cli.command import command
from kvpleat.errors import OptionError
from kvpleat.hf.embed import POOLINGS, cut, embed, max_tokens, tokenize
from kvpleat.hf.minilm import NAME
from kvpleat.hf.models import load_encoder

POLICIES = ("merge", "full")
DEFAULT_RATIO = 2.0
SUFFIXES = (".jsonl", ".npy", ".safetensors")


@command
def encode(
    file: Annotated[Path | None, typer.Argument(help="UTF-8 file, one text a line (default: stdin).")] = None,
    model: Annotated[str, typer.Option(help=f"{NAME}, a folder, or a name on the hub.")] = NAME,
    policy: Annotated[str, typer.Option(help="merge, or full: the model as it is.")] = "merge",
    ratio: Annotated[
        float | None, typer.Option(help="Times fewer tokens in the layers, such as 2.6 (default: 2).")
    ] = None,
    coverage: Annotated[float | None, typer.Option(help="Merge what is alike enough, instead of a ratio.")] = None,
    lora: Annotated[
        str | None,
        typer.Option(help="A LoRA that was trained under merging: a folder, or a name that comes with kvpleat."),
    ] = None,
    pooling: Annotated[str, typer.Option(help="mean over the tokens, or cls: the first one.")] = "mean",
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a forward.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="FILE.jsonl, .npy or .safetensors (default: JSON lines on stdout).")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Embed lines of text: a vector for each, in their order. An empty line is a text, too."""
    on = _policy(policy, {"ratio": ratio, "coverage": coverage, "lora": lora})
    if pooling not in POOLINGS:
        raise OptionError(f"--pooling {pooling}: there are {' and '.join(POOLINGS)}.")
    if out is not None and out.suffix not in SUFFIXES:
        raise OptionError(f"--out {out}: the format goes by the ending, and it is none of {', '.join(SUFFIXES)}.")
    texts = _lines(file)
    log = Console(stderr=True, highlight=False)
    loaded = load_encoder(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=log.is_terminal
    )
    limit = max_tokens(loaded)
    rows = tokenize(loaded, texts)
    if long := sum(len(row) > limit for row in rows):
        log.print(f"{long} of {len(rows)} texts have more than {limit} tokens: what follows them was left out")
    rows = cut(rows, limit)
    start = time.perf_counter()
    with on(loaded.model):
        vectors = embed(loaded, rows, pooling=pooling, normalize=normalize, batch_size=batch)
    seconds = time.perf_counter() - start
    _write(vectors, out)
    tokens = sum(map(len, rows))
    log.print(f"{len(rows):,} texts, {tokens:,} tokens in {seconds:.1f} s: {len(rows) / seconds:,.1f} texts/s")


def _policy(name: str, given: dict[str, Any]) -> Any:
    """What puts the policy on a model."""
    given = {key: value for key, value in given.items() if value is not None}
    if name == "full":
        if given:
            raise OptionError(f"--policy full merges nothing, so --{next(iter(given))} means nothing. Leave one out.")
        return nullcontext
    if name != "merge":
        raise OptionError(f"--policy {name}: there is no such policy for encoders. Known: {', '.join(POLICIES)}.")
    if {"ratio", "coverage"} <= set(given):
        both = f"--ratio {given['ratio']:g} and --coverage {given['coverage']:g}"
        raise OptionError(f"{both} both say how much to merge. Pass one of them.")
    chosen = policies.EncoderMerge(**({} if "coverage" in given else {"ratio": DEFAULT_RATIO}) | given)

    def on(model: Any) -> AbstractContextManager[Any]:
        return compress(model, chosen)

    return on


def _lines(file: Path | None) -> list[str]:
    """The lines of a file or of stdin."""
    if file is None and sys.stdin.isatty():
        raise OptionError("There are no texts to encode. Pass a file with one a line, or pipe lines in.")
    try:
        text = (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file or 'stdin'} cannot be read as UTF-8 text: {error}.") from error
    if not text:
        raise OptionError(f"{file or 'stdin'} is empty, so there is nothing to encode. Pass one text a line.")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _write(vectors: Tensor, out: Path | None) -> None:
    """JSON lines, or a file by its ending, put in place once it is complete."""
    if out is None:
        sys.stdout.flush()
        _dump(vectors, ".jsonl", sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    temporary = out.with_name(out.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            _dump(vectors, out.suffix, file)
        os.replace(temporary, out)
    except OSError as error:
        raise OptionError(f"{out} cannot be written ({error}), so no vector is kept. Pass another place.") from error


def _dump(vectors: Tensor, suffix: str, file: BinaryIO) -> None:
    if suffix == ".npy":
        np.save(file, vectors.numpy())
    elif suffix == ".safetensors":
        file.write(save({"embeddings": vectors}))
    else:
        for place, vector in enumerate(vectors.tolist()):
            line = {"line": place, "embedding": [round(x, 7) for x in vector]}
            file.write(json.dumps(line).encode() + b"\n")
