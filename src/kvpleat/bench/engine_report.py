"""What all parts of the engine's benchmark share: its options, its clock, and the file that keeps what was measured."""

import gc
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvpleat.bench import floor
from kvpleat.bench.engine_models import random_model
from kvpleat.bench.kernel_timing import machine
from kvpleat.engine.sizes import out_of_memory
from kvpleat.errors import UnsupportedError

Column = tuple[str, str, str, float]  # heading, key of a record, format, what the number is multiplied by
CASE = 40  # characters of a case's name
GRACE = 30.0  # seconds that a case may take longer than there are
RESERVE = 3 * 2**30  # bytes of a GPU left to logits, graphs and what a step computes


@dataclass
class Bench:
    """A run of the benchmark.

    Args:
        device: where. tiny: models of a few kilobytes, to see that all of it runs.
        rows, tokens: of a decode step. kv_memory: bytes, or None for what the GPU has left.
        step_tokens: of a step with prompts. page_size: entries. compile: what `LLM(compile=)` does.
        seconds: after which no case is begun any more. file: for all records, written after each.
        rate: requests a second of `serve`; shape: of `throughput` and `compare`; cases: of `compare`. See these parts.
        bandwidth: bytes per second that a large copy reads and writes, by the clock of the graphs.
    """

    device: torch.device
    tiny: bool
    rows: int = 64
    tokens: int = 8192
    kv_memory: int | None = None
    step_tokens: int = 8192
    page_size: int = 16
    compile: bool = False
    seconds: float = 500.0
    file: Path | None = None
    rate: float | None = None
    shape: str | None = None
    cases: str | None = None
    bandwidth: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    failed: bool = False  # whether a case broke, for another reason than time, memory, or that it is not served

    def __post_init__(self) -> None:
        if not self.bandwidth:
            found = machine(self.device, quick=True)
            self.bandwidth = found.bandwidth or floor.copy_bandwidth(self.device)

    @property
    def left(self) -> float:
        """Seconds until no case is begun any more."""
        return self.start + self.seconds - time.perf_counter()

    def now(self) -> float:
        """Seconds, once everything that was asked of the device is done."""
        return floor.now(self.device)

    def room(self) -> int:
        """Bytes that a cache may take now, all that is needed beside it left out."""
        if self.kv_memory is not None:
            return self.kv_memory
        if self.device.type != "cuda":
            return 2**20
        clean()
        return int(torch.cuda.mem_get_info(self.device)[0]) - RESERVE

    def model(self, part: str, shape: str, columns: Sequence[Column]) -> Any:
        """A random model of this shape; None if there is no time or memory for it."""
        return self.attempt(part, shape, columns, lambda: random_model(shape, self.device, self.tiny))

    def heading(self, part: str, columns: Sequence[Column]) -> None:
        """The first line of a part's table."""
        print(f"\n{part} (at {time.perf_counter() - self.start:.0f} s)")
        print(f"{'':{CASE}}" + " ".join(f"{name:>{width(spec)}}" for name, _, spec, _ in columns), flush=True)

    def add(self, part: str, case: str, columns: Sequence[Column], record: dict[str, Any]) -> dict[str, Any]:
        """Print a case's line and keep it."""
        kept = {"part": part, "case": case, **record}
        self.records.append(kept)
        cells = " ".join(cell(kept.get(key), spec, factor) for _, key, spec, factor in columns)
        print(f"{case:{CASE}}{kept.get('skipped') or kept.get('failed') or cells}", flush=True)
        self.write()
        return kept

    def write(self) -> None:
        """All records so far, complete or not at all."""
        if self.file is not None:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps({"environment": self.about, "records": self.records}, indent=1) + "\n")
            os.replace(part, self.file)

    def case(
        self,
        part: str,
        case: str,
        columns: Sequence[Column],
        call: Callable[[], dict[str, Any]],
        most: float = math.inf,
    ) -> dict[str, Any] | None:
        """Measure a case, print its line and keep it; None where it comes to nothing: see `attempt`."""
        found: dict[str, Any] | None = self.attempt(part, case, columns, call, most)
        return None if found is None else self.add(part, case, columns, found)

    def attempt(
        self, part: str, case: str, columns: Sequence[Column], call: Callable[[], Any], most: float = math.inf
    ) -> Any:
        """Call something that may come to nothing: for lack of time or memory, or as the engine or a peer refuses it.
        The others go on, and a line says why.

        Args:
            most: seconds that it may take.
        """
        try:
            if self.left <= 0:
                raise OutOfTime("there is none left")
            with limit(min(self.left + GRACE, most)):
                return call()
        except (OutOfTime, UnsupportedError) as error:
            self.add(part, case, columns, {"skipped": f"skipped: {said(error)}"})
        except Exception as error:
            if out_of_memory(error):
                self.add(part, case, columns, {"skipped": f"skipped: {said(error)}"})
                return None
            traceback.print_exc()
            self.failed = True
            self.add(part, case, columns, {"failed": f"FAILED: {said(error)}"})
        finally:
            clean()
        return None


class OutOfTime(BaseException):
    """A case took too long. No Exception, so that no library takes it for its own."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """OutOfTime after so long, between two steps of the interpreter: what a library compiles can be given up."""

    def over(*_: Any) -> None:
        raise OutOfTime(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, before)


def clean() -> None:
    """Give memory that nobody holds any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def width(spec: str) -> int:
    """Characters of a column, of a format such as "9.2f"."""
    return int(spec.split(".")[0].rstrip("df%s"))


def cell(value: Any, spec: str, factor: float = 1.0) -> str:
    """A number in its column."""
    return f"{'-':>{width(spec)}}" if value is None else f"{value * factor:>{spec}}"


def said(error: BaseException) -> str:
    """An error in a line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"
