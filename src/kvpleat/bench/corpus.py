"""Texts and sets to judge with: documents of JSONL files, windows of tokens, and the small sets that kvpleat ships."""

import gzip
import json
import lzma
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.hf.models import LoadedModel

CHARACTERS_PER_TOKEN = 8  # at most, for almost any text: what is cut before it is tokenised holds tokens enough


def shipped(name: str = "texts.jsonl.xz") -> Path:
    """A file that comes with kvpleat: texts.jsonl.xz, qa.json or multiturn.json."""
    return Path(str(files("kvpleat.bench") / "data" / name))


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of each line of a JSONL file (.xz, .gz or plain) with the keys `source` and `text`."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                yield str(item.get("source", path.name)), str(item["text"])
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} cannot be read as texts ({type(error).__name__}: {error}). Pass a JSONL file, plain or packed "
            "with xz or gzip, each line an object with the keys `source` and `text`."
        ) from error


def read_json(path: Path, what: str) -> Any:
    """A JSON file of a set to judge with; `what` says for people what was expected."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read ({error}). Pass {what}.") from error


def encode(loaded: LoadedModel, text: str) -> list[int]:
    """The tokens of a text, no special ones added."""
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def decode(loaded: LoadedModel, tokens: list[int]) -> str:
    """The text of tokens, special ones left out."""
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))


def token_windows(
    loaded: LoadedModel, path: Path, length: int, count: int, seed: int, sources: list[str] | None = None
) -> list[tuple[str, Tensor]]:
    """`count` windows of `length` tokens with their source, drawn without replacement from all of the file's text, or
    from that of some sources.

    Documents of one source are joined, so that short ones count too; a source is drawn in proportion to its length.
    """
    generator = random.Random(seed)
    by_source: dict[str, list[str]] = {}
    for source, text in read_documents(path):
        if sources is None or source in sources:
            by_source.setdefault(source, []).append(text)
    joined = {source: "\n\n".join(texts) for source, texts in sorted(by_source.items())}
    span = CHARACTERS_PER_TOKEN * length
    places = [(source, i) for source, text in joined.items() for i in range(0, len(text) - span + 1, span)]
    generator.shuffle(places)
    windows: list[tuple[str, Tensor]] = []
    for source, start in places:
        if len(windows) == count:
            break
        tokens = encode(loaded, joined[source][start : start + span])
        if len(tokens) >= length:
            windows.append((source, torch.tensor(tokens[:length])))
    if len(windows) < count:
        raise OptionError(
            f"{path} holds {len(windows)} windows of {length} tokens and {count} were asked for. Ask for fewer or "
            "shorter ones (--count, --lengths), or pass a larger file with --data."
        )
    return windows
