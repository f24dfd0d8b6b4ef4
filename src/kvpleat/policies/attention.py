"""AttentionScore: selective and adaptive compression without training, by the attention that entries receive."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.kernels import reference
from kvpleat.policies.base import LayerScores, Policy
from kvpleat.policies.budget import allowed_pages, check_at_least, check_ratio, next_multiple, pages_for
from kvpleat.types import Decision, KVShape, Phase, PolicyInput

LAYER_CAP = 2.0  # a layer may bring this many times its equal share into the competition between layers


@dataclass(frozen=True)
class AttentionScore(Policy):
    """draft"""

    ratio: float | None = None
    coverage: float | None = None
    sinks: int = 4
    recent_window: int = 32
    observation_window: int = 32  # type: ignore[assignment]
    smoothing: int = 5
    forgetting: float = 0.8
    floor: float = 0.2
    interval: int = 32
    slack: float = math.inf

    name: ClassVar[str] = "attention"
    summary: ClassVar[str] = "keeps what receives attention exact, folds what receives less, evicts the rest"
    needs: ClassVar[str] = "nothing (no training); the end of the prompt, where its question usually is"
    guarantees: ClassVar[str] = "ratio: allocated <= full / ratio once past the windows; coverage: that share of attention"
    fields: ClassVar[tuple[str, ...]] = ("position", "log_weight", "score")
    uses_prompt_end: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.coverage is None):
            raise OptionError("exactly one of ratio and coverage")
        check_ratio(self.ratio)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        if phase is Phase.DECODE:
            return list(range(next_multiple(start, self.interval), stop + 1, self.interval))
        return []

    def budget_pages(self, position: int, shape: KVShape) -> int | None:
        return None if self.ratio is None else allowed_pages(shape, position, self.ratio)

    def decide(self, inputs: PolicyInput) -> Decision | None:
        scores = self._score(inputs)
        reserve = next_multiple(inputs.position, self.interval) - inputs.position
        layer = LayerScores(scores, inputs.positions, inputs.live)
        budget = self.budget_pages(inputs.position, inputs.shape)
        if budget is not None:
            share = LAYER_CAP / inputs.shape.num_layers if inputs.competes else inputs.layer_share
            keep = self._select([layer], inputs.position, inputs.shape, int(budget * share), reserve)[0]
        else:
            raise NotImplementedError
        return Decision(keep=keep, scores=scores, reserve=reserve)

    def squeeze(self, layers: list[LayerScores], position: int, shape: KVShape) -> list[Decision]:
        reserve = next_multiple(position, self.interval) - position
        budget = self.budget_pages(position, shape)
        assert budget is not None
        return [Decision(keep=keep, reserve=reserve) for keep in self._select(layers, position, shape, budget, reserve)]

    def _protected(self, layer: LayerScores, position: int) -> Tensor:
        return layer.live & ((layer.positions < self.sinks) | (layer.positions >= position - self.recent_window))

    def _score(self, inputs: PolicyInput) -> Tensor:
        assert inputs.queries is not None and inputs.query_positions is not None
        heads = inputs.shape.num_kv_heads
        queries = inputs.queries.view(heads, -1, *inputs.queries.shape[1:])
        bias = None if inputs.log_weights is None else inputs.log_weights
        visible = inputs.live[:, None] & (inputs.positions[:, None] <= inputs.query_positions[None, :, None])
        received = reference.attention_received(queries, inputs.keys, bias, visible, inputs.scale, inputs.softcap)
        mass = received.mean(dim=(1, 2))
        pooled = torch.nn.functional.avg_pool1d(mass[None], self.smoothing, 1, self.smoothing // 2, count_include_pad=False)[0]
        pooled = pooled.masked_fill(~inputs.live, 0)
        if inputs.scores is None:
            return pooled
        return torch.where(inputs.scores.isnan(), pooled, self.forgetting * inputs.scores + (1 - self.forgetting) * pooled)

    def _select(
        self, layers: list[LayerScores], position: int, shape: KVShape, budget: int, reserve: int
    ) -> list[Tensor]:
        size = shape.page_size
        widest = max(layer.live.shape[1] for layer in layers)
        pad = lambda x, value: torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=value)  # noqa
        live = torch.cat([pad(x.live, False) for x in layers])
        protected = torch.cat([pad(self._protected(x, position), False) for x in layers])
        scores = torch.cat([pad(x.scores, 0.0) for x in layers])
        candidate = live & ~protected
        ranked, order = torch.where(candidate, scores, -1.0).sort(dim=1, descending=True, stable=True)
        count = candidate.sum(1)
        streams = live.shape[0]
        base = -(-(protected.sum(1) + reserve) // size)
        base = torch.maximum(base, torch.tensor(int(self.floor * budget / streams)))
        base = torch.minimum(base, -(-(live.sum(1) + reserve) // size))
        first = base * size - reserve - protected.sum(1)
        most = -(-widest // size)
        edges = first[:, None] + size * torch.arange(most + 1)
        sums = torch.nn.functional.pad(ranked.clamp(min=0).cumsum(1), (1, 0))
        value = sums.gather(1, edges.clamp(max=widest)).diff(dim=1)
        value = value.masked_fill(edges[:, :-1] >= count[:, None], -1.0)
        extra = max(0, budget - int(base.sum()))
        taken = torch.zeros_like(value, dtype=torch.bool).flatten()
        taken[value.flatten().topk(min(extra, value.numel())).indices] = True
        pages = (taken.view_as(value) & (value >= 0)).sum(1)
        room = first + pages * size
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(widest).expand_as(order))
        keep = protected | (candidate & (rank < room[:, None]))
        return [part[:, : x.live.shape[1]] for part, x in zip(keep.split(shape.num_kv_heads), layers, strict=True)]
