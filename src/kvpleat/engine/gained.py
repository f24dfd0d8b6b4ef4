"""What a step of the core brought."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpleat.engine.params import Emitted, TokenLogprobs
from kvpleat.engine.rows import Row


@dataclass
class Gained(Sequence[Emitted]):
    """What rows gained in a step. Each is made as it is read: an object for each of thousands of rows, all there at a
    time, has Python look for garbage, which takes longer than the step.

    Args:
        rows: that gained a token or ended. tokens: of each, below 0 where it ended without one. reasons, logprobs: of
            some of them, by place.
    """

    rows: list[Row] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Emitted]:
        reasons, logprobs, new = self.reasons, self.logprobs, Emitted._make
        for place, (row, token) in enumerate(zip(self.rows, self.tokens, strict=True)):
            told = [logprobs[place]] if place in logprobs and token >= 0 else None
            yield new((row.request.id, [token] if token >= 0 else [], told, reasons.get(place), row.cached))

    def __getitem__(self, place: Any) -> Any:
        return list(self)[place]
