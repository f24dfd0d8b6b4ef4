"""The evaluation: every method on every item, the reference first, and a check that the judge itself is honest.

Items come one after the other and all methods take their turn on each, so that whatever is there when a run is cut off
is paired. Records go to FILE.part line by line; the same command goes on from there.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from rich.progress import Progress

from kvpleat.bench.methods import REFERENCE, Method, parse
from kvpleat.bench.records import Record, ResultFile
from kvpleat.bench.tasks import Item, Source, Task, Trial
from kvpleat.errors import JudgeError, OptionError
from kvpleat.hf.models import LoadedModel

IDENTICAL = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 2e-2, "float16": 1e-3}  # KL in nats a token, by dtype


@dataclass
class Evaluation:
    """One run.

    Args:
        header: everything about the run but its records; resuming needs the same settings, model and methods.
        methods: what is judged, the reference first.
        tasks: what by.
        source: where items come from.
        part: file of the records so far, or None to keep them in memory only.
        shard: (i, n): every n-th item from the i-th on, for n processes that share the work.
    """

    header: ResultFile
    methods: list[Method]
    tasks: list[Task]
    source: Source
    part: Path | None = None
    shard: tuple[int, int] = (0, 1)
    records: dict[tuple[str, str, str], Record] = field(default_factory=dict)

    def run(
        self,
        models: dict[str, LoadedModel],
        progress: Progress,
        also: Mapping[str, Callable[[], list[Record]]] = MappingProxyType({}),
    ) -> list[Record]:
        """Judge.

        Args:
            models: the model under each name of its weights ("full" alone, or several for a matrix).
            progress: where bars go.
            also: further measurements by name, each done once (tasks of other harnesses).

        Raises:
            JudgeError: kvpleat's `full` does not equal the reference.
        """
        items = [(task, item) for task in self.tasks for item in task.items(self.source)]
        items = items[self.shard[0] :: self.shard[1]]
        done = self._resume()
        bar = progress.add_task("items", total=len(items) * len(self.methods) * len(models))
        with self._open_part() as out:
            for task, item in items:
                for weights, loaded in models.items() if task.any_weights else [("full", models["full"])]:
                    shared: dict[str, Any] = {}
                    for method in self.methods:
                        progress.update(bar, description=f"{item.id}  {method.label}")
                        mark = f"{weights} {item.id} {method.spec}"
                        if mark not in done:
                            trial = Trial(loaded, method, self.methods[0], shared)
                            self._note(self._measure(task, item, trial, weights), out, mark)
                        progress.advance(bar)
            for mark, measure in also.items():
                if mark not in done:
                    progress.update(bar, description=mark)
                    self._note(measure(), out, mark)
        records = list(self.records.values())
        check_identical(records, self.header.model["dtype"])
        return records

    def _measure(self, task: Task, item: Item, trial: Trial, weights: str) -> list[Record]:
        start = time.perf_counter()
        found = task.measure(item, trial)
        seconds = (time.perf_counter() - start) / len(found)
        return [
            Record(
                task=task.name,
                item=item.id + seen.suffix,
                group=item.group | seen.group,
                method=trial.method.spec,
                scores={k: round(v, 6) for k, v in seen.scores.items()},
                memory=seen.memory,
                weights=weights,
                seconds=round(seconds, 3),
            )
            for seen in found
        ]

    # ---- resuming

    def _fingerprint(self) -> dict[str, Any]:
        return {"settings": self.header.settings, "model": self.header.model, "methods": self.header.methods}

    def _resume(self) -> set[str]:
        """Take over the records of an earlier run; returns what it has done."""
        if self.part is None or not self.part.exists():
            return set()
        lines = self.part.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != json.loads(json.dumps(self._fingerprint())):
            raise OptionError(
                f"{self.part} holds records of a run with other settings, and the two cannot be mixed. Run that "
                "command again to finish it, delete the file, or choose another --out."
            )
        done = set()
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):  # the line at which the run was cut off
                entry = json.loads(line)
                done.add(entry["mark"])
                for found in entry["records"]:
                    record = Record(**found)
                    self.records[record.key] = record
        return done

    @contextlib.contextmanager
    def _open_part(self) -> Iterator[TextIO | None]:
        if self.part is None:
            yield None
            return
        new = not self.part.exists()
        if not new and not self.part.read_bytes().endswith(b"\n"):
            with self.part.open("ab") as file:
                file.write(b"\n")
        with self.part.open("a", encoding="utf-8") as out:
            if new:
                out.write(json.dumps(self._fingerprint()) + "\n")
            yield out

    def _note(self, records: list[Record], out: TextIO | None, mark: str) -> None:
        for record in records:
            self.records[record.key] = record
        if out is not None:
            out.write(json.dumps({"mark": mark, "records": [asdict(record) for record in records]}) + "\n")
            out.flush()


def with_reference(methods: Iterable[Method]) -> list[Method]:
    """The methods, the reference first."""
    return [parse(REFERENCE), *(method for method in methods if method.spec != REFERENCE)]


def check_identical(records: list[Record], dtype: str) -> None:
    """Raise JudgeError unless kvpleat's Full gives the distributions of transformers' own cache, wherever both were
    compared."""
    for record in records:
        if record.method == "full" and "kl" in record.scores and record.task in ("continuation", "drift"):
            kl = record.scores["kl"] / record.scores["tokens"]
            if not kl <= IDENTICAL[dtype]:
                raise JudgeError(
                    f"{record.item}: Full differs from transformers' DynamicCache by {kl:.2g} nats a token (allowed in "
                    f"{dtype}: {IDENTICAL[dtype]:g}), so the judge or the cache is broken and no figure is given out. "
                    "Please report it with the command."
                )
