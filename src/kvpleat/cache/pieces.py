"""Streams as decode on a CPU reads them: in place, as far as their pages are neighbours."""

import torch
from torch import Tensor

from kvpleat.cache.entries import Content, coded
from kvpleat.cache.paged import PagedKVCache
from kvpleat.kernels.reference import Quantised

Piece = Tensor | Quantised


def stream_pieces(
    kv: PagedKVCache, layer: int, row: int, head: int, length: int
) -> tuple[list[Piece], list[Piece], list[Tensor] | None]:
    """Keys, values and log-weights of a stream in at most two pieces: its longest run of pages in place, the rest
    gathered. Keys and values are numbers or codes, as the pages hold them."""
    runs = []
    left = length
    for first, count in kv.pieces(layer, row, head):
        runs.append((first, min(count, left)))
        left -= count
        if left <= 0:
            break
    slots = {name: kv.pool.slots(name) for name in kv.shape.arrays if name not in ("position", "score")}
    longest = max(runs, key=lambda run: run[1])
    pieces: list[Content] = [{name: x[longest[0] : longest[0] + longest[1]] for name, x in slots.items()}]
    rest = [run for run in runs if run is not longest]
    if rest:
        index = torch.cat([torch.arange(first, first + count) for first, count in rest])
        pieces.append({name: x.index_select(0, index) for name, x in slots.items()})
    is_coded = kv.shape.bits is not None
    keys, values = ([coded(piece, name) if is_coded else piece[name] for piece in pieces] for name in ("key", "value"))
    bias = [piece["log_weight"] for piece in pieces] if "log_weight" in slots else None
    return keys, values, bias
