"""Attention sinks and recency (StreamingLLM, arXiv 2309.17453): the baseline everyone must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.errors import OptionError
from kvpleat.policies.base import Policy
from kvpleat.policies.budget import check_at_least, check_ratio, next_multiple, pages_for
from kvpleat.types import Decision, KVShape, Phase, PolicyInput

INTERVAL = 16  # tokens between two moments: the window slides in steps of a page, so that pages come back whole
MIN_RECENT = 16


@dataclass(frozen=True)
class Window(Policy):
    """Keep the first entries and the latest ones, in every head alike.

    The window is part of the function: prefill masks what lies outside it, so that the tokens alone decide the output.
    At the moment m (a multiple of 16) it holds the sinks and the entries from `start(m)` on, and grows until the next.

    Args:
        ratio: compression ratio; the window grows with the text. Exactly one of ratio and budget is given.
        budget: entries per stream, sinks included; the window is as long at any length of text.
        sinks: first entries that always stay (entries).
    """

    ratio: float | None = None
    budget: int | None = None
    sinks: int = 4

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "keeps the first and the latest entries"
    needs: ClassVar[str] = "nothing"
    guarantees: ClassVar[str] = "allocated <= full / ratio once past the window, or <= budget entries a stream"
    fields: ClassVar[tuple[str, ...]] = ("position",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.budget is None):
            raise OptionError(
                f"Window(ratio={self.ratio}, budget={self.budget}): exactly one of the two says how much to keep. Pass "
                "ratio=4.0 or budget=1024."
            )
        check_ratio(self.ratio)
        check_at_least(sinks=(self.sinks, 0))
        if self.budget is not None:
            check_at_least(budget=(self.budget, self.sinks + MIN_RECENT + INTERVAL))

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        latest = stop // INTERVAL * INTERVAL  # earlier ones are covered by visible_from
        return [latest] if latest > start else []

    def visible_from(self, query_positions: Tensor, shape: KVShape) -> Tensor | None:
        moments = (query_positions // INTERVAL).tolist()
        starts = {m: self._start(m * INTERVAL, shape) for m in set(moments)}
        return torch.tensor([starts[m] for m in moments], device=query_positions.device)

    def expected_entries(self, tokens: int, shape: KVShape) -> float:
        moment = tokens // INTERVAL * INTERVAL
        return min(tokens, self.sinks + tokens - self._start(moment, shape))

    def decide(self, inputs: PolicyInput) -> Decision | None:
        moment = inputs.position // INTERVAL * INTERVAL
        start = self._start(moment, inputs.shape)
        keep = inputs.live & ((inputs.positions < self.sinks) | (inputs.positions >= start))
        reserve = next_multiple(inputs.position, INTERVAL) - inputs.position
        return Decision(keep=keep, reserve=reserve)

    def _start(self, moment: int, shape: KVShape) -> int:
        """First position beside the sinks that is kept at a moment."""
        if self.budget is not None:
            entries = self.budget
        else:
            assert self.ratio is not None
            smallest = pages_for(self.sinks + MIN_RECENT + INTERVAL, shape.page_size) * shape.page_size // INTERVAL
            # In steps of INTERVAL and so that whole pages hold them: a window that grew by a page of 32 at once would
            # reach back to entries that are gone.
            steps = shape.page_size // INTERVAL
            allowed = int(accounting.full_bytes(shape, moment) / self.ratio)
            fitting = steps * allowed // (accounting.page_bytes(shape) * shape.num_streams) - (steps - 1)
            entries = max(fitting, smallest) * INTERVAL
        return max(self.sinks, moment - (entries - self.sinks - INTERVAL))
