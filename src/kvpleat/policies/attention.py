"""AttentionScore: selective and adaptive compression without training, by the attention that entries receive."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.errors import OptionError
from kvpleat.policies import importance
from kvpleat.policies.base import LayerScores, Policy
from kvpleat.policies.budget import allowed_pages, check_at_least, check_ratio, next_multiple
from kvpleat.policies.fold import fold
from kvpleat.policies.selection import Candidates, Ranking, cover, known_empty, rank, share_pages
from kvpleat.types import Decision, KVShape, Phase, PolicyInput

LAYER_CAP = 3.0  # a layer may bring this many times an equal share into the competition between layers
OVERSHOOT = 1.25  # layers may hold this much of the budget before they compete in the middle of a prefill
SMALLEST = 128  # entries per stream below which a prompt is not compressed before its end
APART = 64  # moments while decoding are about this share of the text apart, or `interval` where that is more
PREFILL_STEP = 64  # interim moments of a prompt are multiples of this
RECENT_COVERAGE = 64  # recent window (entries) under the coverage contract, which knows no budget


@dataclass(frozen=True)
class AttentionScore(Policy):
    """Keep important entries exact, fold less important ones into their neighbours, evict the rest.

    - Importance is the attention received from the last queries plus the attention foreseen from sampled queries moved
      just ahead (see kvpleat.policies.importance), times the norm of the value. It is carried from moment to moment
      with exponential forgetting.
    - Selective. Sinks, a recent window and the entries of highest importance stay exact; the next ones fold 2, 4 and 8
      to 1; the rest leaves.
    - Adaptive. Streams compete for pages by importance, over the heads of a layer and over all layers, above a floor.
    - When. At the end of a prompt; while decoding whenever the token index is a multiple of `interval`, in texts of 128
      times that of twice as many, and so on, because a moment looks at all entries; and, with a finite `slack`, inside
      a prompt whenever its streams exceed `slack` times their budget, at multiples of 64 tokens.

    Args:
        ratio: compression ratio: allocated bytes, the remembered queries included, stay at or below full / ratio after
            the prompt, once past the windows. Exactly one of ratio and coverage is given.
        coverage: share of the importance of each stream that stays, between 0 and 1; the ratio then follows the text.
        sinks: first entries that always stay (entries).
        recent: latest entries that always stay, as a share of the budget per stream.
        observation_window: last queries of each row and layer that are remembered (tokens).
        question_window: last of them that `received` is computed from (tokens).
        smoothing: neighbours over which received attention is averaged (entries, odd).
        foresight: weight of foreseen beside received attention.
        half_life: tokens after which a carried score counts half.
        floor: share of an equal part of the budget that every stream gets.
        fold: share of the unprotected entries of a stream that are folded ones.
        interval: tokens between two moments while decoding, in texts of up to 128 times as many; later a 64th to a
            128th of the text. Also how far a stream may grow in between.
        slack: growth of a prompt's streams over their budget that triggers compression inside the prompt; inf: never.
    """

    ratio: float | None = None
    coverage: float | None = None
    sinks: int = 4
    recent: float = 0.25
    observation_window: int = 16
    question_window: int = 16
    smoothing: int = 15
    foresight: float = 1.0
    half_life: float = 256.0
    floor: float = 0.1
    fold: float = 0.05
    interval: int = 32
    slack: float = math.inf

    name: ClassVar[str] = "attention"
    summary: ClassVar[str] = "keeps what receives attention exact, folds what receives less, evicts the rest"
    needs: ClassVar[str] = "no training; where each prompt ends (generate and prefill say so)"
    guarantees: ClassVar[str] = (
        "ratio: allocated <= full / ratio once past the windows; coverage: that share of importance"
    )
    fields: ClassVar[tuple[str, ...]] = ("position", "log_weight", "score")
    uses_prompt_end: ClassVar[bool] = True
    decides_at_once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.coverage is None):
            raise OptionError(
                f"AttentionScore(ratio={self.ratio}, coverage={self.coverage}): exactly one of the two says how much "
                "to keep. Pass ratio=4.0, or coverage=0.98 for a ratio that follows the text."
            )
        check_ratio(self.ratio)
        if self.coverage is not None and not 0.0 < self.coverage <= 1.0:
            raise OptionError(
                f"coverage={self.coverage}: a share of attention lies above 0 and at most at 1. Pass 0.98, say."
            )
        for name in ("recent", "floor", "fold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(
                    f"{name}={getattr(self, name)}: a share lies between 0 and 1. Leave it out for the default."
                )
        if self.smoothing % 2 != 1:
            raise OptionError(
                f"smoothing={self.smoothing}: neighbours on both sides and the entry itself make an odd number."
            )
        check_at_least(
            sinks=(self.sinks, 0),
            observation_window=(self.observation_window, self.question_window),
            question_window=(self.question_window, 1),
            foresight=(self.foresight, 0.0),
            half_life=(self.half_life, 1.0),
            interval=(self.interval, 1),
            slack=(self.slack, 1.0),
        )

    @property
    def num_sinks(self) -> int:
        return self.sinks

    # ---- when

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        if phase is Phase.DECODE:
            moments = []
            while (start := self._next_decoding(start)) <= stop:
                moments.append(start)
            return moments
        moments = []
        while math.isfinite(self.slack) and self.ratio is not None:
            last = self._next_in_prompt(last, stop, shape)
            if last > stop:
                break
            if last > start:
                moments.append(last)
        return moments

    def _next_decoding(self, position: int) -> int:
        """The first moment after `position` in an answer. One step divides the next, and where it doubles there is a
        moment of both, so moments do not depend on where one begins to look."""
        step = self.interval
        while position >= 2 * APART * step:
            step *= 2
        return next_multiple(position, step)

    def _next_in_prompt(self, last: int, stop: int, shape: KVShape) -> int:
        """The first moment after `last` at which a prompt exceeds slack times its budget; past `stop` if there is
        none."""
        held = min(last, self._budget(last, shape))
        moment = next_multiple(last, PREFILL_STEP)
        while moment <= stop and held + moment - last <= self.slack * self._budget(moment, shape):
            moment += PREFILL_STEP
        return moment

    def _budget(self, position: int, shape: KVShape) -> int:
        """Entries per stream under the ratio contract, and never fewer than are worth compressing."""
        return max(SMALLEST, self._pages(position, shape) * shape.page_size // shape.num_streams)

    def _pages(self, position: int, shape: KVShape) -> int:
        """Pages that all streams of a row may hold together under the ratio contract, beside the remembered queries."""
        assert self.ratio is not None
        return allowed_pages(shape, position, self.ratio, accounting.query_bytes(shape, self.observation_window))

    def expected_entries(self, tokens: int, shape: KVShape) -> float:
        return tokens if self.ratio is None else min(tokens, self._budget(tokens, shape))

    def peak_entries(self, tokens: int, shape: KVShape) -> float:
        if self.ratio is None or not math.isfinite(self.slack):
            return tokens  # a prompt is compressed when it has ended
        return min(tokens, self.slack * self._budget(tokens, shape) + PREFILL_STEP)

    # ---- what

    def decide(self, inputs: PolicyInput) -> Decision | None:
        scores = self._score(inputs)
        layer = LayerScores(scores, inputs.positions, inputs.live, inputs.log_weights)
        candidates = self._candidates(layer, inputs.position, inputs.shape)
        ranking, size = rank(candidates), inputs.shape.page_size
        if self.coverage is not None:
            reserve = self._reserve(inputs.position) if inputs.competes else 0
            room = cover(candidates, ranking, self.coverage, reserve, size)
            return replace(self._fold(layer, candidates, ranking, room, reserve), scores=scores)
        share = LAYER_CAP / inputs.shape.num_layers if inputs.competes else inputs.layer_share
        budget = int(self._pages(inputs.position, inputs.shape) * min(1.0, share))
        layers = inputs.live.shape[0] // inputs.shape.num_kv_heads
        room = share_pages(candidates, ranking, budget, self.floor, 0, size, layers)
        if inputs.competes:  # what remains is settled between the layers, in `squeeze`
            return Decision(
                keep=candidates.protected | (candidates.live & (ranking.rank < room[:, None])), scores=scores
            )
        return replace(self._fold(layer, candidates, ranking, room, reserve=0), scores=scores)

    def over_budget(self, lengths: Tensor, position: int, shape: KVShape) -> Tensor | bool:
        if self.ratio is None:
            return False
        tolerance = 1.0 if lengths.shape[0] == shape.num_layers else OVERSHOOT
        pages = -(-(lengths + self._reserve(position)) // shape.page_size)
        return pages.sum() > tolerance * self._pages(position, shape)

    def squeeze(self, layers: list[LayerScores], position: int, shape: KVShape, final: bool) -> list[Decision]:
        candidates = Candidates.stack([self._candidates(layer, position, shape) for layer in layers])
        ranking, reserve = rank(candidates), self._reserve(position)
        floor = self.floor * (len(ranking.count) // shape.num_kv_heads) / shape.num_layers
        room = share_pages(candidates, ranking, self._pages(position, shape), floor, reserve, shape.page_size)
        decisions, before = [], 0
        for layer in layers:
            (count, width), heads = layer.live.shape, slice(before, before + layer.live.shape[0])
            before += count
            part = Candidates(*(x[heads, :width] for x in (candidates.scores, candidates.live, candidates.protected)))
            its = Ranking(ranking.scores[heads, :width], ranking.rank[heads, :width], ranking.count[heads])
            if final:
                decisions.append(self._fold(layer, part, its, room[heads], reserve))
            else:
                decisions.append(Decision(keep=part.protected | (part.live & (its.rank < room[heads, None]))))
        return decisions

    def _reserve(self, position: int) -> int:
        """Tokens until the next moment while decoding."""
        return self._next_decoding(position) - position

    def _recent(self, position: int, shape: KVShape) -> int:
        """Entries of the recent window."""
        return RECENT_COVERAGE if self.ratio is None else int(self.recent * self._budget(position, shape))

    def _candidates(self, layer: LayerScores, position: int, shape: KVShape) -> Candidates:
        recent = layer.positions >= position - self._recent(position, shape)
        return Candidates(layer.scores, layer.live, layer.live & ((layer.positions < self.sinks) | recent))

    def _score(self, inputs: PolicyInput) -> Tensor:
        assert inputs.sample_positions is not None
        scores = importance.received(inputs, self.question_window, self.smoothing)
        if self.foresight:
            recent = self._recent(inputs.position, inputs.shape)
            scores = scores + self.foresight * importance.foreseen(inputs, recent, smoothing=7)
        scores = scores * inputs.values.float().norm(dim=-1)
        passed = inputs.position - inputs.last_moment
        return importance.carry(inputs.scores, scores, passed, self.half_life)

    def _fold(
        self, layer: LayerScores, candidates: Candidates, ranking: Ranking, room: Tensor, reserve: int
    ) -> Decision:
        """Give `room` entries of each stream, beside the protected ones, to exact and folded entries."""
        slots = torch.where(ranking.count > room, (self.fold * room).long(), 0)
        exact = room - slots
        keep = candidates.protected | (candidates.live & (ranking.rank < exact[:, None]))
        if known_empty(slots):
            return Decision(keep=keep, reserve=reserve)
        assert layer.log_weights is not None
        leaders, merge_into, log_weights = fold(
            ranking.rank, exact, slots, layer.scores, layer.positions, layer.log_weights
        )
        return Decision(
            keep=keep | leaders,
            merge_into=torch.where(keep, torch.arange(keep.shape[1], device=keep.device), merge_into),
            share=(layer.scores * layer.log_weights.exp()).clamp(min=torch.finfo(torch.float32).tiny),
            log_weights=log_weights,
            reserve=reserve,
        )
