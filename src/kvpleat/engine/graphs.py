"""CUDA graphs of functions whose inputs lie in tensors of fixed addresses and sizes; without a GPU, the functions."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries choose theirs
Result = TypeVar("Result")


class Graphs:
    """One graph for each key. What a function returns lies at fixed addresses too: the next run writes over it.

    Args:
        device: where the functions run. eager: make no graphs.
    """

    def __init__(self, device: torch.device, eager: bool) -> None:
        self._on = device.type == "cuda" and not eager
        self._pool = torch.cuda.graph_pool_handle() if self._on else None  # all share their memory: one runs at a time
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Run a function, by its graph. Where there is none yet it runs three times, so that twice must be as once."""
        if not self._on:
            return function()
        if key not in self._captured:
            self._captured[key] = self._capture(function)
        graph, result = self._captured[key]
        graph.replay()
        return result  # type: ignore[no-any-return]

    def _capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return graph, result

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        self._captured.clear()
