"""Streams on scattered pages that kernels are checked and timed on, and how long they are."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CONTEXT = 8192  # tokens, of which streams keep a part


class Model(NamedTuple):
    """What the entries and queries of a case look like."""

    rows: int
    heads: int
    group: int
    channels: int
    page_size: int = 32
    dtype: torch.dtype = torch.bfloat16


class Pool:
    """Streams of the given lengths on scattered pages, whose entries are random; with `poison`, NaN everywhere else."""

    def __init__(self, model: Model, lengths: Tensor, weighs: bool = False, poison: bool = False) -> None:
        """lengths: [R, L, H] int32."""
        device, size = lengths.device, model.page_size
        self.model, self.lengths = model, lengths
        counts = -(-lengths // size)
        pages = torch.arange(max(1, int(counts.max())) + 1, device=device)
        used = pages < counts[..., None]
        total = int(counts.sum())
        self.table = torch.full(used.shape, -1, dtype=torch.int32, device=device)
        self.table[used] = torch.randperm(total + 1, device=device)[:total].int()
        shape = total + 1, size, model.channels
        self.keys, self.values = (torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2))
        self.log_weight = torch.randn(shape[:2], device=device) if weighs else None
        if poison:
            live = torch.zeros(shape[:2], dtype=torch.bool, device=device)
            entries = (lengths[..., None] - pages * size)[used]
            live[self.table[used].long()] = torch.arange(size, device=device) < entries[:, None]
            self.keys[~live] = self.values[~live] = math.nan
        self.q = torch.randn(model.rows, model.heads * model.group, model.channels, device=device).to(model.dtype)
        self.scale = model.channels**-0.5

    @property
    def read(self) -> int:
        """Bytes of the entries of a layer, the mean over layers."""
        entries = int(self.lengths.long().sum()) / self.lengths.shape[1]
        return round(entries * 2 * self.model.channels * self.model.dtype.itemsize)


def uneven(rows: int, layers: int, heads: int, mean: float, device: torch.device, longest: int = CONTEXT) -> Tensor:
    """Lengths [R, L, H] with this mean: lognormal over heads (sigma 0.8), rows within 20% of each other."""
    drawn = torch.exp(0.8 * torch.randn(1, layers, heads)) * (0.8 + 0.4 * torch.rand(rows, layers, heads))
    factor = mean
    for _ in range(20):  # what is cut off at the longest goes to the others
        lengths = (drawn * factor).clamp(max=longest)
        factor *= mean / float(lengths.mean())
    return lengths.round().int().to(device)


def as_kept(rows: int, layers: int, heads: int, device: torch.device, tokens: int = CONTEXT) -> Tensor:
    """Lengths as gates that were trained for ratio 4 leave them of so many tokens (`engine_models.profile`)."""
    from kvpleat.bench.engine_models import profile  # knows transformers' models, which nothing else here needs

    kept = profile(4.0, tokens, layers, heads)
    return kept.lengths(torch.full((rows,), tokens, device=device), torch.arange(rows, device=device))
