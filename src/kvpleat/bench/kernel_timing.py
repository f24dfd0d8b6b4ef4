"""How kernels are checked and timed: what a case says, and the clock.

Times are those of CUDA graphs: one call after the other, each on memory of its own, so that nothing is found in the
cache that would not be there in a model. The floor, a copy, is timed by the same clock.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]

COPIED = 2**30  # bytes of the copy, read and written: far beyond any cache
GRAPH_SECONDS = 2e-3  # of a timed graph, so that what lies between two graphs does not count
REPEATS = 30
ONCE = 3  # launches where nothing is timed


@dataclass(frozen=True)
class Checked:
    """One comparison with the specification.

    Args:
        case: what was compared.
        error: largest absolute difference; NaN fails.
        allowed: what it may be.
    """

    case: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the kernel computed what it should."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Timed:
    """One time.

    Args:
        case: what was timed.
        seconds: of a call, the median.
        read: bytes that a call cannot avoid reading or writing; None: memory is not what limits it.
        beside: other times or numbers to print behind it, by name.
    """

    case: str
    seconds: float
    read: int | None = None
    beside: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What cases run on.

    Args:
        device: a GPU, or a CPU, where kernels are interpreted and only checked.
        quick: fewer cases, fewer repeats.
        bandwidth: bytes per second that a large copy reads and writes; 0 on a CPU.
        case: the one whose name begins so; empty: all.
        once: launch only, a few times and outside graphs, for profilers and the like; no time comes of it.
        small: check at the sizes of the interpreter, and time nothing.
    """

    device: torch.device
    quick: bool
    bandwidth: float = 0.0
    case: str = ""
    once: bool = False
    small: bool = False

    @property
    def large(self) -> bool:
        """Whether checks are of the sizes that models have."""
        return self.device.type == "cuda" and not self.small

    def wants(self, name: str) -> bool:
        """Whether a case of this name is to be timed."""
        return name.startswith(self.case)

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call: the median over replays of a graph of all of them, repeated to last long enough.

        Args:
            calls: the same work on different memory, more of it together than the GPU's cache holds.
        """
        for call in list(calls[:1]) * ONCE if self.once else calls:  # compiles
            call()
        if self.once:
            return math.nan
        once = self._replayed(calls, 3)
        rounds = max(1, math.ceil(GRAPH_SECONDS / (once * len(calls))))
        return self._replayed(list(calls) * rounds, REPEATS // 3 if self.quick else REPEATS)

    def _replayed(self, calls: Sequence[Call], repeats: int) -> float:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        graph.replay()  # warms up
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize(self.device)
        times = [float(start.elapsed_time(stop)) for start, stop in itertools.pairwise(events)]
        return statistics.median(times) / 1e3 / len(calls)


class Cases(NamedTuple):
    """All that is asked of one kernel module.

    Args:
        name: of the module.
        check: comparisons with the specification, on any device.
        time: times, on a GPU.
        sweep: tries what a launch can be told, on a GPU, and returns lines to print; None: nothing to try.
    """

    name: str
    check: Callable[[Machine], Iterator[Checked]]
    time: Callable[[Machine], Iterator[Timed]]
    sweep: Callable[[Machine], Iterator[str]] | None = None


def machine(device: torch.device, quick: bool, case: str = "", once: bool = False, small: bool = False) -> Machine:
    """The machine as it is now: a GPU's copy bandwidth is measured, unless nothing is timed."""
    found = Machine(device, quick, case=case, once=once, small=small)
    if small or once or device.type != "cuda":
        return found
    source = torch.ones(COPIED // 8, device=device)
    target = torch.empty_like(source)
    return replace(found, bandwidth=COPIED / found.seconds([lambda: target.copy_(source)]))


def difference(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference; NaN where either has one."""
    return float((mine.double() - wanted.double()).abs().max())


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, Triton's interpreter"
    import triton

    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}
