"""The files of the judge: what an evaluation or a benchmark writes, and reads back to resume or to report.

A file is one JSON object: `kind` ("eval", "bench" or "encoder"), `version`, `command`, `created`, `environment`,
`model`, `settings`, `methods` (what `Method.to_dict` says) and `records`. A record of an evaluation is one method on
one item:

    {"task": "passkey", "item": "passkey/known/4096/3", "group": {"length": 4096, "form": "known", "depth": 0.5},
     "method": "attention:ratio=4", "weights": "full", "scores": {"correct": 1.0}, "memory": {...}, "seconds": 8.1}

While it runs, records go line by line to FILE.part; a run that was cut off goes on from there.
"""

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel

VERSION = 1
KINDS = ("eval", "bench", "encoder")
PACKAGES = ("kvpleat", "torch", "transformers", "kvpress", "optimum-quanto", "torchao", "lm-eval")


@dataclass
class Record:
    """One method on one item.

    Args:
        task: name of the task.
        item: id of the item, the same for every method; what pairs are made by.
        group: what the item is one of, such as {"length": 4096, "source": "sotu"}.
        method: spec of the method.
        scores: numbers by metric name; counts and sums where a figure is a ratio of sums.
        memory: bytes during the item: `Memory.to_dict()`, and "trace" [[tokens, allocated bytes], ...] where taken.
        weights: how the model's weights are held ("full", "int8", ...).
        seconds: wall-clock time.
    """

    task: str
    item: str
    group: dict[str, Any]
    method: str
    scores: dict[str, float]
    memory: dict[str, Any]
    weights: str = "full"
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a record unique within a file."""
        return self.weights, self.item, self.method


@dataclass
class ResultFile:
    """A result file in memory; the arguments are the keys described at the top of this module."""

    kind: str
    settings: dict[str, Any]
    model: dict[str, Any]
    methods: list[dict[str, Any]]
    records: list[Any] = field(default_factory=list)
    command: str = ""
    created: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def write(self, path: Path) -> None:
        """Put the file in place once it is complete."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), separators=(",", ":")), encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path) -> "ResultFile":
        """A file that `write` wrote. Raises OptionError where it is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION or content["kind"] not in KINDS:
                raise ValueError(f"kind {content['kind']!r}, version {content['version']}")
            result = ResultFile(**content)
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path} is no result of `kvpleat eval`, `kvpleat bench` or the judge of encoders of this version "
                f"({error}), so nothing can be read from it. Pass a file that --out wrote."
            ) from error
        if result.kind == "eval":
            result.records = [Record(**record) for record in result.records]
        return result


def describe_run(kind: str, loaded: LoadedModel, settings: dict[str, Any], methods: list[dict[str, Any]]) -> ResultFile:
    """An empty result file with everything about the run that a reader will ask for."""
    facts = describe(loaded.model)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return ResultFile(
        kind=kind,
        settings=settings,
        model={
            "name": loaded.name,
            "source": loaded.source.replace(
                str(Path.home()), "~"
            ),  # files are shared; a home folder is nobody's business
            "family": facts.family,
            "dtype": str(facts.shape.dtype).removeprefix("torch."),
            "parameters": parameters,
            "layers": facts.shape.num_layers,
            "kv_heads": facts.shape.num_kv_heads,
            "head_dim": facts.shape.head_dim,
        },
        methods=methods,
        command=" ".join(["kvpleat", *map(shlex.quote, sys.argv[1:])]),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        environment=environment(facts.device),
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the foot of a report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": device.type,
        "machine": name,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.machine()
