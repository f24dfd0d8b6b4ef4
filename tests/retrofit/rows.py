"""Small deterministic rows to train on, and gates that mark about half of all tokens."""

from typing import Any

import torch

from kvpleat.hf.families import base_of, describe
from kvpleat.policies import DMC, DMS, Fold, GateConfig, Gates
from kvpleat.policies.learned import Learned
from kvpleat.retrofit.data import Batch
from tests import models

KINDS: dict[str, tuple[type[Learned], int]] = {"dms": (DMS, 5), "fold": (Fold, 3), "dmc": (DMC, 0)}  # policy, delay
SINKS = {"dms": 0, "fold": 1, "dmc": 2}


def packed(length: int, sizes: list[int], rows: list[int]) -> Batch:
    """Rows of documents of these sizes; the rows' numbers are the seeds of their tokens and weights."""
    assert sum(sizes) == length
    tokens = torch.cat([models.prompt(length, seed=row) for row in rows])
    doc_start = torch.cat([torch.full((size,), sum(sizes[:i])) for i, size in enumerate(sizes)]).int()
    weight = torch.ones(len(rows), length)
    for i, row in enumerate(rows):
        weight[i, length // 2 : length // 2 + row % 7] = 5.0  # rows count differently
    weight[:, doc_start.unique().long()] = 0.0
    return Batch(tokens, doc_start.expand(len(rows), -1).contiguous(), weight)


class Rows:
    """Batches without end, dealt to ranks as `retrofit.data.mixture` deals them."""

    def __init__(self, rows: int, sizes: list[int], rank: int = 0, world_size: int = 1) -> None:
        self.rows, self.sizes, self.rank, self.world_size, self.next_row = rows, sizes, rank, world_size, 0

    def __next__(self) -> Batch:
        first = self.next_row + self.rank * self.rows
        self.next_row += self.rows * self.world_size
        return packed(sum(self.sizes), self.sizes, list(range(first, first + self.rows)))

    def state(self) -> dict[str, Any]:
        return {"next_row": self.next_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.next_row = state["next_row"]


def random_gates(model: Any, kind: str, seed: int = 0, bias: float = 0.0) -> Gates:
    """Gates for a model that decide by chance."""
    policy, delay = KINDS[kind]
    base = base_of(model, describe(model))
    sizes = {name: base[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    gates = Gates(GateConfig(policy.name, delay=delay, sinks=SINKS[kind], scale=2.0, base=base, **sizes))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer: Any
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.25 / base["hidden_size"] ** 0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2 + bias)
    return gates
