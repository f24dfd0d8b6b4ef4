"""Streams as decode on a CPU reads them: in place, as far as their pages are neighbours."""

import torch
from torch import Tensor

from kvpleat.cache.entries import Content, coded
from kvpleat.cache.paged import PagedKVCache
from kvpleat.kernels.reference import Quantised

Piece = Tensor | Quantised


def readable(kv: PagedKVCache) -> Content:
    """The pool's arrays that attention reads, entry by entry: keys, values, log-weights."""
    return {name: kv.pool.slots(name) for name in kv.shape.arrays if name not in ("position", "score")}


def stream_pieces(
    arrays: Content, pieces: list[list[int]], length: int
) -> tuple[list[Piece], list[Piece], list[Tensor] | None]:
    """Keys, values and log-weights of a stream in at most two pieces: its longest run of pages in place, the rest
    gathered. Keys and values are numbers or codes, as the pages hold them.

    Args:
        arrays: what `readable` returns. pieces: runs of slots as in `PagedKVCache.pieces`. length: of the stream.
    """
    runs = []
    left = length
    for first, count in pieces:
        runs.append((first, min(count, left)))
        left -= count
        if left <= 0:
            break
    longest = max(runs, key=lambda run: run[1])
    parts: list[Content] = [{name: x[longest[0] : longest[0] + longest[1]] for name, x in arrays.items()}]
    rest = [run for run in runs if run is not longest]
    if rest:
        firsts, counts = torch.tensor(rest).unbind(1)
        index = (firsts - counts.cumsum(0) + counts).repeat_interleave(counts)  # slot of each entry, less its number
        index += torch.arange(index.numel())
        parts.append({name: x.index_select(0, index) for name, x in arrays.items()})
    is_coded = "key_steps" in arrays
    keys, values = ([coded(part, name) if is_coded else part[name] for part in parts] for name in ("key", "value"))
    return keys, values, [part["log_weight"] for part in parts] if "log_weight" in arrays else None
