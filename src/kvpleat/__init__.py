"""kvpleat: Dynamic Memory Compression for the key-value memory of transformers, while they run."""

from importlib import import_module
from typing import Any

from kvpleat import errors, policies
from kvpleat.accounting import MemoryReport
from kvpleat.encoder.dispatch import attach, compress
from kvpleat.hf.attach import Pleated
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.explain import Explanation, explain

_ENGINE = ("LLM", "AsyncLLM", "SamplingParams")  # of kvpleat.engine, which stands above and is imported when asked for

__all__ = [
    "LLM",
    "AsyncLLM",
    "Explanation",
    "MemoryReport",
    "Pleated",
    "PleatedCache",
    "SamplingParams",
    "attach",
    "compress",
    "errors",
    "explain",
    "policies",
]


def __getattr__(name: str) -> Any:
    if name in _ENGINE:
        return getattr(import_module("kvpleat.engine"), name)
    raise AttributeError(f"module 'kvpleat' has no attribute {name!r}")
