"""What a retrofit run is to do: options, and how ratio and learning rate move over its steps."""

import math
from dataclasses import dataclass

from kvpleat.errors import OptionError
from kvpleat.policies.budget import check_at_least, check_ratio
from kvpleat.policies.gates import check_method
from kvpleat.retrofit.objective import target_share

TRAINED = ("gates", "lora", "full")
LAST_RATE = 0.1  # share of the learning rate at the end of a stage
MODEL_RATES = {"lora": 1.5e-3, "full": 5e-5}


@dataclass(frozen=True)
class Recipe:
    """Options of a run.

    Args:
        method: dms, fold or dmc.
        ratios: compression ratios, ascending. Each is a stage of the run and leaves gates of its own behind.
        train: gates (the model stays as it is), lora (low-rank adapters beside them), full (all weights).
        steps: optimiser steps over all stages. rows: sequences a step and process. length: tokens of a row.
        delay: tokens a marked entry waits; dmc takes 0. What helps most: at 4x and 4,096 tokens a KL of .065 with 16,
            .030 with 64, .017 with 256 (docs/log.md).
        sinks: first tokens of a text whose entries always stay.
        rate: learning rate of the gates. model_rate: of adapters or weights; None: that of MODEL_RATES.
        ramp: share of a stage in which the ratio grows; then it stays, and the rates fall.
        margin: what is asked for, as a share of the ratio. Every row that compresses too little is penalised, so means
            come out above what is asked: at 0.93 rows of 4,096 tokens reached 1.98, 4.18 and 8.35 of 2, 4 and 8.
        temperature: of the relaxed decisions. scale: of the gates' logits.
        ratio_weight: of the penalty for compressing too little. lm_weight: of the language model loss.
        recall_share: share of rows that are synthetic recall tasks. answer_weight: of their answers' tokens.
        adapt: what adapters sit on: attention (its projections) or all (every linear layer but the head).
        rank: of the adapters. mlp_size: hidden channels of the gates; None: linear gates.
        seed: of everything random.
        accumulate: batches a step.
        checkpointing: whether activations are recomputed rather than kept.
        compile: whether torch.compile fuses the model.
    """

    method: str = "dms"
    ratios: tuple[float, ...] = (4.0,)
    train: str = "gates"
    steps: int = 2000
    rows: int = 8
    length: int = 4096
    delay: int = 256
    sinks: int = 1
    rate: float = 3e-3
    model_rate: float | None = None
    ramp: float = 0.7
    margin: float = 0.95
    temperature: float = 0.1
    scale: float = 10.0
    ratio_weight: float = 10.0
    lm_weight: float = 0.0
    recall_share: float = 0.4
    answer_weight: float = 5.0
    adapt: str = "attention"
    rank: int = 8
    mlp_size: int | None = None
    seed: int = 0
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_method(self.method, self.delay)
        if self.train not in TRAINED:
            raise OptionError(f"train={self.train!r}: one of {', '.join(TRAINED)} is trained.")
        if self.adapt not in ("attention", "all"):
            raise OptionError(f"adapt={self.adapt!r}: adapters sit on attention or all.")
        if not self.ratios or list(self.ratios) != sorted(set(self.ratios)):
            raise OptionError(f"ratios={self.ratios}: pass them ascending, each once, such as 2,4,8.")
        if self.steps < len(self.ratios):
            raise OptionError(f"steps={self.steps} for {len(self.ratios)} ratios: each needs a step at least.")
        for ratio in self.ratios:
            check_ratio(ratio)
            target_share(ratio * self.margin, self.delay, self.length)
        check_at_least(rows=(self.rows, 1), length=(self.length, 2), rank=(self.rank, 1), margin=(self.margin, 0.5),
                       sinks=(self.sinks, 0),
                       accumulate=(self.accumulate, 1))  # fmt: skip

    @property
    def weights_rate(self) -> float:
        """Learning rate of adapters or weights."""
        return MODEL_RATES.get(self.train, 0.0) if self.model_rate is None else self.model_rate

    def stage_ends(self) -> list[int]:
        """The step after each stage. A stage is as long as its ratio is above the one before, in octaves."""
        octaves = [math.log2(b / a) for a, b in zip((1.0, *self.ratios), self.ratios, strict=False)]
        passed, ends = 0.0, []
        for i, octave in enumerate(octaves):
            passed += octave or 1e-9
            left = len(octaves) - 1 - i
            ends.append(min(self.steps - left, max(i + 1, round(self.steps * passed / (sum(octaves) or 1e-9)))))
        ends[-1] = self.steps
        return ends

    def at(self, step: int) -> tuple[float, float]:
        """(ratio asked for, share of the learning rates) at a step."""
        ends = self.stage_ends()
        stage = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
        first = ends[stage - 1] if stage else 0
        before = self.ratios[stage - 1] if stage else 1.0
        done = (step - first + 1) / (ends[stage] - first)
        if done <= self.ramp:
            return before + (self.ratios[stage] - before) * done / self.ramp, 1.0
        over = (done - self.ramp) / (1 - self.ramp)
        return self.ratios[stage], LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * over))

    def target(self, step: int) -> float:
        """Share of entries to mark at a step."""
        return target_share(max(1.0, self.at(step)[0] * self.margin), self.delay, self.length)
