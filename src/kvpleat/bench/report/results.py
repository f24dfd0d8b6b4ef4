"""Several result files as one: what is merged, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.records import Record, ResultFile
from kvpleat.errors import OptionError


@dataclass(frozen=True)
class Results:
    """The files of one report, all of one model and dtype.

    Args:
        files: as read, in the order given. records: of all evaluations. benches: the files of kind "bench".
        encoders: those of kind "encoder"; their methods are named in their records alone.
        methods: spec -> `Method.to_dict()`, the reference first.
        model: of the first file.
        weights: the kinds of weights there are records of, "full" first where it is there.
    """

    files: tuple[ResultFile, ...]
    records: list[Record]
    benches: tuple[ResultFile, ...]
    encoders: tuple[ResultFile, ...]
    methods: dict[str, dict[str, Any]]
    model: dict[str, Any]
    weights: list[str]

    @property
    def main_records(self) -> list[Record]:
        """What plots and tables are made of where weights are not compared: the records of the first kind."""
        return [record for record in self.records if record.weights == self.weights[0]]

    @property
    def ratios(self) -> list[float]:
        """The ratios above 1 that methods were asked for, rising."""
        return sorted({m["ratio"] for m in self.methods.values() if m["ratio"] and m["ratio"] > 1})

    def label(self, spec: str) -> str:
        """A method's name for people."""
        return str(self.methods[spec]["label"])

    def masked(self, spec: str) -> bool:
        """Whether a method only masks what it evicts and holds the full cache all the while."""
        return bool(self.methods[spec]["storage"] == "mask only")

    def ours(self, spec: str) -> bool:
        """Whether a method is kvpleat's own; what is broken on purpose is nobody's."""
        return bool(self.methods[spec]["family"] == "kvpleat" and not self.broken(spec))

    def broken(self, spec: str) -> bool:
        """Whether a method is there to show what failure looks like. Its label says so."""
        return "broken" in self.label(spec)


def read(paths: Sequence[Path]) -> Results:
    """Read and merge files. Raises OptionError as `merge` does, or where one is no result file."""
    return merge([ResultFile.read(path) for path in paths], [str(path) for path in paths])


def merge(files: Sequence[ResultFile], names: Sequence[str]) -> Results:
    """One view of several files.

    Raises:
        OptionError: there is none, they are of different models or dtypes, a method means different things in two of
            them or is not described, or an item of a method is in two of them.
    """
    if not files:
        raise OptionError("There is nothing to report. Pass at least one file that --out wrote.")
    methods: dict[str, dict[str, Any]] = {}
    records: dict[tuple[str, str, str], tuple[Record, str]] = {}
    for file, name in zip(files, names, strict=True):
        _check_model(files[0], file, names[0], name)
        for method in file.methods:
            if methods.setdefault(method["spec"], method) != method:
                raise OptionError(
                    f"{method['spec']} has other options in {name} than in a file before it, so its figures cannot "
                    "stand in one row. Report the files one by one, or measure one of them again."
                )
        for record in file.records if file.kind == "eval" else []:
            if record.key in records:
                raise OptionError(
                    f"{record.item} of {record.method} is in {records[record.key][1]} and again in {name}, so it would "
                    "count twice. Leave one of the files out."
                )
            records[record.key] = record, name
    benches = tuple(file for file in files if file.kind == "bench")
    used = [record.method for record, _ in records.values()] + [r.get("method") for b in benches for r in b.records]
    if unknown := sorted({str(spec) for spec in used} - set(methods)):
        raise OptionError(
            f"The files have records of {', '.join(unknown)} but do not say what that is, so it cannot be named or "
            "marked. Pass files as --out wrote them."
        )
    ordered = dict(sorted(methods.items(), key=lambda item: item[0] != REFERENCE))
    weights = sorted({key[0] for key in records}, key=lambda kind: (kind != "full", kind))
    encoders = tuple(file for file in files if file.kind == "encoder")
    return Results(tuple(files), [r for r, _ in records.values()], benches, encoders, ordered, files[0].model, weights)


def _check_model(first: ResultFile, file: ResultFile, first_name: str, name: str) -> None:
    for key in ("name", "dtype"):
        ours, theirs = first.model.get(key), file.model.get(key)
        if ours is None or theirs != ours:
            raise OptionError(
                f"{name} was measured with model {key} {theirs!r} and {first_name} with {ours!r}; figures of the two "
                "cannot be compared. Report them one by one."
            )
