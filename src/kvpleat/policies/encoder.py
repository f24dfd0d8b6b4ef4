"""EncoderMerge: tokens of an encoder that say nearly the same become one, before layers that would process them all.

An encoder has no cache. What each token costs is its way through the layers, so tokens are merged as early as they can
be told apart; see docs/log.md for what merging later costs.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.kernels.grouping import picked
from kvpleat.policies.budget import check_at_least, check_ratio
from kvpleat.policies.gates import SHIPPED
from kvpleat.policies.lora import LoraWeights

WHAT = ("tokens", "kv")
PER_ROUND = 0.5  # share of those that could join which do so in one round: the next one pairs the others anew


@dataclass(frozen=True)
class Row:
    """What `EncoderMerge.pairs` sees of a batch of rows.

    Args:
        states: [B, T, C] what is compared: hidden states, or keys of all heads where what="kv".
        mass: [B, T] importance of each token, of a merged one the sum over its members.
        free: [B, T] bool, tokens that may merge: neither special nor padding.
        position: [B, T] int64 token index in the text.
        counts: free tokens of each row.
        budget: [B] what may still be lost of each row's mass, for coverage; None for ratio.
    """

    states: Tensor
    mass: Tensor
    free: Tensor
    position: Tensor
    counts: list[int]
    budget: Tensor | None = None


@dataclass(frozen=True)
class EncoderMerge:
    """Merge tokens of an encoder: what is special or important stays exact, what resembles another token joins it.

    One round: of a row's free tokens (no special ones, no padding) every second one may join one of the others, the
    one most like it. That costs (1 - cosine of their states + `distance` times how far they are apart) times the
    importance of the token that joins. The cheaper half joins, then the next round pairs what is left, until the row is
    as short as asked. What is left keeps its order. A merged token has its members' mean state, and the logarithm of
    their number is added to the logits of its key.

    Importance is the squared norm of the word embedding before the first layer (rare words have long
    ones), and from then on the attention received, from every eighth query.

    ratio. tokens x layers of the full model over tokens x layers that run: a row of n tokens enters layer l as s(l) n
    tokens, and the mean of s(l) over layers is 1 / ratio. With `steps` = 1 all merging happens before the first layer,
    s(l) = 1 / ratio; with more it happens before each of the first `steps` layers, by the same factor each
    time. Work and memory of everything but attention's logits fall by the ratio; those by its square. BERT, RoBERTa and
    DistilBERT still read keys and values of all tokens in the layer before which tokens merge (`whole_keys`).

    coverage. Tokens join as long as what a row has lost, the sum of those costs, stays below 1 - coverage of the
    importance of its free tokens: texts that repeat themselves shrink more.

    Args:
        ratio: see above; 1 changes nothing. Exactly one of ratio and coverage is given.
        coverage: share of importance that stays, above 0, at most 1 (then only equal tokens join).
        what: "tokens", or "kv": all tokens keep their queries and states, only keys and values merge, in each layer
            anew. Saves nothing but part of the attention; for comparison. With a ratio only.
        steps: layers before which tokens merge, from the first on.
        floor: tokens that a row keeps in any case, special ones included.
        distance: cost of the whole row between two tokens, where two unlike states cost 1.
        whole_keys: whether they do. Without, that layer is as cheap as the others, in time and in the peak of memory,
            and a little more is lost. ModernBERT has no choice: False.
        protect: token ids that never merge, beside a row's first and last token and their like and the special ids
            that the model's config names.
        lora: a LoRA that was trained under merging (`python -m kvpleat.encoder.distill`), merged into the weights while
            the policy is attached: a name of those that come with kvpleat, or a folder. Empty: the model's own weights.
    """

    ratio: float | None = None
    coverage: float | None = None
    what: str = "tokens"
    steps: int = 1
    floor: int = 16
    distance: float = 0.02
    whole_keys: bool = True
    protect: tuple[int, ...] = ()
    lora: str = ""

    name: ClassVar[str] = "encoder"
    summary: ClassVar[str] = "merges an encoder's tokens that resemble others, and undoes it at the end"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.coverage is None):
            raise OptionError(
                f"EncoderMerge(ratio={self.ratio}, coverage={self.coverage}): exactly one of the two says how far to "
                "merge. Pass ratio=2.0, or coverage=0.9 for a ratio that follows the text."
            )
        check_ratio(self.ratio)
        if self.coverage is not None and not 0.0 < self.coverage <= 1.0:
            raise OptionError(
                f"coverage={self.coverage}: a share of importance lies above 0 and at most at 1. Pass 0.9, say."
            )
        if self.what not in WHAT or (self.what == "kv" and self.ratio is None):
            raise OptionError(
                f"what={self.what!r} with coverage={self.coverage}: what is merged is one of {', '.join(WHAT)}, and kv "
                "follows a ratio. Leave it out to merge tokens."
            )
        if self.ratio == 1.0 and self.lora:
            raise OptionError(
                f"ratio=1 with lora={self.lora!r}: a LoRA is learned for merged tokens, and none merge. "
                "Leave it out, or pass a ratio above 1."
            )
        check_at_least(steps=(self.steps, 1), floor=(self.floor, 2), distance=(self.distance, 0.0))

    @property
    def changes_nothing(self) -> bool:
        """Whether this is the full model."""
        return self.ratio == 1.0

    def adapter(self) -> LoraWeights | None:
        """The LoRA, read from its folder. Raises ModelError where there is none."""
        if not self.lora:
            return None
        folder = SHIPPED / self.lora
        return LoraWeights.load(folder if folder.is_dir() else Path(self.lora).expanduser())

    def shares(self, num_layers: int) -> list[float]:
        """s(l) for each layer: tokens that enter it over tokens of the row, under the ratio contract."""
        assert self.ratio is not None
        if self.what == "kv":
            return [1.0 / self.ratio] * num_layers
        steps = min(self.steps, num_layers)
        factor = _factor(self.ratio, steps, num_layers)
        return [factor ** min(layer + 1, steps) for layer in range(num_layers)]

    def kept(self, tokens: int, share: float) -> int:
        """Tokens that a row of `tokens` tokens keeps at a share of them."""
        return max(math.ceil(tokens * share - 1e-9), min(tokens, self.floor))

    def pairs(self, row: Row, wanted: list[int]) -> tuple[Tensor, list[int], Tensor | None]:
        """One round: which tokens join which.

        Args:
            row: what is known of the tokens.
            wanted: joins that each row wants at most.

        Returns:
            target [B, T] int64: the token that each one joins, or itself;
            the number of joins in each row, `wanted` or half of its free tokens; with a budget as many as it allows;
            [B] what each row has lost, None without a budget.
        """
        target = torch.arange(row.free.shape[1], device=row.free.device).repeat(row.free.shape[0], 1)
        most = [_joins(w, count) for w, count in zip(wanted, row.counts, strict=True)]
        if max(most) == 0:
            return target, most, row.budget
        order = row.free.cumsum(1) - 1
        joiners, has = _every_second(row.free, order, 1, max(row.counts) // 2)
        others, there = _every_second(row.free, order, 0, (max(row.counts) + 1) // 2)
        cost, best = self._costs(row, joiners, others, there)
        cost = torch.where(has, cost, math.inf)
        cheap = cost.topk(max(most), dim=1, largest=False)
        allowed = torch.tensor(most, device=cost.device)[:, None]
        joins = torch.arange(max(most), device=cost.device) < allowed
        lost = None
        if row.budget is not None:
            spent = torch.where(joins, cheap.values, math.inf).cumsum(1)
            joins = spent <= row.budget[:, None]
            lost = torch.where(joins, cheap.values, 0).sum(1)
            most = joins.sum(1).tolist()
        token = joiners.gather(1, cheap.indices)
        other = others.gather(1, best.gather(1, cheap.indices))
        target.scatter_(1, token, torch.where(joins, other, token))
        return target, most, lost

    def _costs(self, row: Row, joiners: Tensor, others: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """[B, A] the least cost of joining, and [B, A] which of the others it is to."""
        wide = torch.promote_types(row.states.dtype, torch.float32)
        left, right = (_normalised(picked(row.states, index), wide) for index in (joiners, others))
        tokens = (row.free.sum(1) + 1).to(wide)[:, None, None]
        position = row.position.to(wide)
        # A quarter of a token more to the right, so that two equal tokens equally far are no tie.
        away = (position.gather(1, others)[:, None] - 0.25) - position.gather(1, joiners)[..., None]
        cost = away.abs_().mul_(self.distance / tokens)
        with torch.autocast(left.device.type, enabled=False):
            cost.baddbmm_(left, right.transpose(1, 2), alpha=-1.0)
        cost, best = cost.masked_fill_(~there[:, None], math.inf).min(-1)
        return (cost + 1.0).clamp(min=0.0) * row.mass.gather(1, joiners).to(wide), best

    def to_dict(self) -> dict[str, Any]:
        """Name and options, JSON-ready."""
        return {"name": self.name, **{key: getattr(self, key) for key in self.__dataclass_fields__}}


@functools.lru_cache(maxsize=65536)
def schedule(tokens: int, free: int, keep: int) -> tuple[int, ...]:
    """Joins of each round until a row of `tokens` tokens, `free` of which may merge, has `keep`, or none may merge."""
    rounds: list[int] = []
    while (joins := _joins(tokens - keep, free)) > 0:
        rounds.append(joins)
        tokens, free = tokens - joins, free - joins
    return tuple(rounds)


def _joins(wanted: int, free: int) -> int:
    """Joins of one round: what a row wants, and at most a share of the tokens that could."""
    return min(wanted, math.ceil(PER_ROUND * (free // 2)))


@functools.lru_cache
def _factor(ratio: float, steps: int, num_layers: int) -> float:
    """What each of the first `steps` layers leaves of the tokens, so that the mean share over layers is 1 / ratio."""
    low, high = 0.0, 1.0  # the mean share grows with it
    for _ in range(60):
        factor = (low + high) / 2
        mean = sum(factor ** min(layer + 1, steps) for layer in range(num_layers)) / num_layers
        low, high = (low, factor) if mean > 1.0 / ratio else (factor, high)
    return low


def _normalised(states: Tensor, wide: torch.dtype) -> Tensor:
    """The states, which are overwritten, at length 1."""
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=wide)
    return states.to(wide).div_(norm.clamp_(min=1e-12))


def _every_second(free: Tensor, order: Tensor, odd: int, width: int) -> tuple[Tensor, Tensor]:
    """[B, width] indices of the free tokens that are the second, fourth, ... (odd = 1) or the first, third, ... of
    their row, and which of them exist."""
    chosen = free & (order % 2 == odd)
    index = torch.arange(free.shape[1], device=free.device).expand_as(free)
    found = torch.zeros(free.shape[0], width + 1, dtype=torch.int64, device=free.device)
    found.scatter_(1, torch.where(chosen, order // 2, width).clamp(max=width), index)
    return found[:, :width], torch.arange(width, device=free.device) < chosen.sum(1, keepdim=True)
