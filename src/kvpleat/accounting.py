"""The one meter: every memory figure of kvpleat is computed here, from real counts of pages and entries.

full: what an uncompressed cache would hold for the same tokens. live: what attention can read. allocated: what the
pages occupy, holes and side arrays included. overhead: page tables, free lists and observed queries, beside the pages.
A mask is never a saving: only allocated bytes make a compression ratio.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpleat.types import KVShape

PAGE_OVERHEAD = 8  # bytes beside each page: who owns it, and where it stands in the page table


def full_entry_bytes(shape: KVShape) -> int:
    """Bytes of one entry in an uncompressed cache: a key and a value in the model's dtype."""
    return 2 * shape.head_dim * shape.dtype.itemsize


def entry_bytes(shape: KVShape) -> int:
    """Bytes of one entry in a page: a key and a value as they are stored, with scales and zeros where they are codes,
    and the side arrays the policy asked for."""
    return sum(math.prod(item) * dtype.itemsize for item, dtype in shape.arrays.values())


def query_bytes(shape: KVShape, window: int) -> int:
    """Bytes of the last `window` queries that a policy remembers in every compressed layer of one row."""
    return shape.num_layers * shape.num_q_heads * window * shape.head_dim * shape.dtype.itemsize


def page_bytes(shape: KVShape) -> int:
    """Bytes of one page."""
    return shape.page_size * entry_bytes(shape)


def full_bytes(shape: KVShape, tokens: int) -> int:
    """Bytes an uncompressed cache would hold for `tokens` tokens, summed over rows, in the L compressed layers."""
    return tokens * shape.num_streams * full_entry_bytes(shape)


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one cache. Bytes cover all rows and layers.

    Args:
        full_bytes, live_bytes, allocated_bytes, peak_allocated_bytes: as defined at the top of this file.
            Sliding-window layers, which kvpleat leaves as they are, count the same in all of them.
        overhead_bytes: page tables, free lists and observed queries of the policy.
        kept: [L, H] live entries of each layer and KV head, mean over rows, float32.
        seen_tokens: tokens that passed through the cache, summed over rows, padding left out.
    """

    full_bytes: int
    live_bytes: int
    allocated_bytes: int
    peak_allocated_bytes: int
    overhead_bytes: int
    kept: Tensor
    seen_tokens: int

    @property
    def compression_ratio(self) -> float:
        """Full over allocated bytes, a ratio of sums; 1.0 for an empty cache."""
        return self.full_bytes / self.allocated_bytes if self.allocated_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "full_bytes": self.full_bytes,
            "live_bytes": self.live_bytes,
            "allocated_bytes": self.allocated_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "overhead_bytes": self.overhead_bytes,
            "compression_ratio": round(self.compression_ratio, 4),
            "seen_tokens": self.seen_tokens,
            "kept": [[round(x, 1) for x in layer] for layer in self.kept.tolist()],
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                f"tokens seen        {self.seen_tokens:>12,}",
                f"full cache         {human_bytes(self.full_bytes):>12}",
                f"live               {human_bytes(self.live_bytes):>12}",
                f"allocated          {human_bytes(self.allocated_bytes):>12}",
                f"peak allocated     {human_bytes(self.peak_allocated_bytes):>12}",
                f"overhead           {human_bytes(self.overhead_bytes):>12}",
                f"compression ratio  {self.compression_ratio:>11.2f}x",
            ]
        )


def human_bytes(count: float) -> str:
    """`count` bytes with a binary unit, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the storage that `tensors` occupy, counted once per tensor."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def storage_bytes(holder: object) -> int:
    """Bytes of the storages behind every tensor that `holder` reaches through attributes and containers.

    Each storage counts once and whole, however little of it a view shows: what a cache really occupies, without asking
    it. Tensors made of others (quantised ones) are taken apart. Modules and functions are not followed.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    open_: list[Any] = [holder]
    while open_:
        item = open_.pop()
        if id(item) in seen or isinstance(item, str | bytes | int | float | type | torch.nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):
                open_ += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            else:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            open_ += item.values()
        elif isinstance(item, list | tuple | set):
            open_ += item
        elif hasattr(item, "__dict__") and not callable(item):
            open_ += vars(item).values()
    return sum(storages.values())
