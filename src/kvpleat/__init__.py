"""kvpleat: Dynamic Memory Compression for the key-value memory of transformers, while they run."""

from kvpleat import errors, policies
from kvpleat.accounting import MemoryReport
from kvpleat.hf.attach import Pleated, attach, compress
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.explain import Explanation, explain

__all__ = [
    "Explanation",
    "MemoryReport",
    "Pleated",
    "PleatedCache",
    "attach",
    "compress",
    "errors",
    "explain",
    "policies",
]
