"""Where training text comes from: files, folders, globs, and data sets of the `datasets` library, read one by one."""

import glob
import gzip
import importlib.util
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvpleat.errors import OptionError

TEXT = (".txt", ".md")
LINES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
TABLES = (".parquet",)
KNOWN = TEXT + LINES + TABLES
HUB = "datasets:"
FORMATS = f"files that end in {', '.join(KNOWN)}, folders and globs of these, or {HUB}NAME[,CONFIG]:SPLIT"


class Source(Protocol):
    """One place with documents."""

    @property
    def size(self) -> int:
        """Bytes, for progress."""

    @property
    def key(self) -> str:
        """Changes when the documents may have changed."""

    def texts(self, field: str) -> Iterator[tuple[str, float]]:
        """(document, share of the source read so far) of every document that is not empty."""


def find(names: Sequence[str | Path]) -> list[Source]:
    """The sources that names stand for, in order; what several names stand for comes once.

    Args:
        names: files, folders (everything below them), globs (`**` too), or `datasets:NAME[,CONFIG]:SPLIT`.

    Raises:
        OptionError: a name stands for nothing, or for a file of another format.
    """
    found: dict[str, Source] = {}
    for name in map(str, names):
        for source in [_hub_set(name)] if name.startswith(HUB) else _files(name):
            found.setdefault(source.key, source)
    if not found:
        raise OptionError(f"No text to train on was named. Pass {FORMATS}.")
    return list(found.values())


def _files(name: str) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_file():
        if not path.name.endswith(KNOWN):
            raise OptionError(f"{path} is of no format that can be read. Pass {FORMATS}.")
        return [File(path)]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(KNOWN))
    else:
        matched = (Path(p) for p in sorted(glob.glob(str(path), recursive=True)))
        inside = [p for p in matched if p.is_file() and p.name.endswith(KNOWN)]
    if not inside:
        raise OptionError(
            f"{name} stands for no text: there is no such file, or none there can be read. Pass {FORMATS}."
        )
    return [File(p) for p in inside]


@dataclass(frozen=True)
class File:
    """A file: one document (.txt, .md), one JSON object a line (.jsonl), or a Parquet table."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def key(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def texts(self, field: str) -> Iterator[tuple[str, float]]:
        name = self.path.name
        whole, lines = name.endswith(TEXT), name.endswith(LINES)
        found = self._whole() if whole else self._lines(field) if lines else self._rows(field)
        return ((text, share) for text, share in found if text.strip())

    def _whole(self) -> Iterator[tuple[str, float]]:
        try:
            yield self.path.read_text(encoding="utf-8-sig"), 1.0
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"{self.path} cannot be read as text ({error}). Convert it to UTF-8, or leave it out."
            ) from error

    def _lines(self, field: str) -> Iterator[tuple[str, float]]:
        size, number = self.size, 0
        openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
        try:
            with self.path.open("rb") as raw, openers.get(self.path.suffix, nullcontext)(raw) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{self.path}, line {number}"
                        yield _text(_object(line, where), field, where), raw.tell() / size
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise OptionError(
                f"{self.path}, line {number + 1}: the file cannot be read any further ({error}). It may be damaged or "
                "cut off: copy it again, or pass what can be unpacked of it."
            ) from error

    def _rows(self, field: str) -> Iterator[tuple[str, float]]:
        if importlib.util.find_spec("pyarrow") is None:
            raise OptionError(
                f"{self.path} cannot be read without pyarrow. Install it: pip install 'kvpleat[retrofit]'"
            )
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as table:
                names = table.schema_arrow.names
                if field not in names:
                    raise _no_field(f"{self.path}", field, names)
                row, rows = 0, max(table.metadata.num_rows, 1)
                for batch in table.iter_batches(batch_size=256, columns=[field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield _text({field: value}, field, f"{self.path}, row {row}"), row / rows
        except (ArrowException, OSError) as error:
            raise OptionError(
                f"{self.path} cannot be read as Parquet ({error}). Copy it again, or leave it out."
            ) from error


@dataclass(frozen=True)
class HubSet:
    """A split of a data set of the `datasets` library."""

    name: str
    data: Any

    @property
    def size(self) -> int:
        return int(self.data.size_in_bytes or len(self.data))

    @property
    def key(self) -> str:
        return f"{self.name} {self.data._fingerprint}"

    def texts(self, field: str) -> Iterator[tuple[str, float]]:
        if field not in self.data.column_names:
            raise _no_field(self.name, field, self.data.column_names)
        rows = len(self.data)
        for row, item in enumerate(self.data.select_columns([field]), 1):
            text = _text(item, field, f"{self.name}, row {row}")
            if text.strip():
                yield text, row / rows


def _hub_set(name: str) -> Source:
    head, _, split = name.removeprefix(HUB).partition(":")  # a split may hold colons: train[:10%]
    path, _, config = head.partition(",")
    if not path or not split:
        raise OptionError(f"{name!r} does not name a data set and its split. Write {HUB}NAME[,CONFIG]:SPLIT.")
    if importlib.util.find_spec("datasets") is None:
        raise OptionError(f"{name} cannot be read without datasets. Install it: pip install 'kvpleat[retrofit]'")
    import datasets

    try:
        return HubSet(name, datasets.load_dataset(path, config or None, split=split))
    except Exception as error:  # whatever a data set's own loading raises
        raise OptionError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}). Check the name, the configuration and the "
            "split, or save the set as JSONL and pass the file."
        ) from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # of the encoding, too
        raise OptionError(f"{where}: not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(item, dict):
        raise OptionError(
            f"{where}: a JSON {type(item).__name__}, where an object with the text is needed. Mend the line."
        )
    return item


def _text(item: dict[str, Any], field: str, where: str) -> str:
    if field not in item:
        raise _no_field(where, field, list(item))
    text = item[field]
    if not isinstance(text, str):
        raise OptionError(
            f"{where}: {field!r} holds {type(text).__name__}, not a text. Mend it, or name another field with "
            "--text-field."
        )
    return text


def _no_field(where: str, field: str, names: list[str]) -> OptionError:
    return OptionError(
        f"{where}: there is no field {field!r}, only {', '.join(map(repr, names)) or 'none at all'}. Name the one that "
        "holds the text with --text-field."
    )
