"""Pages that rows are reckoned to need: what a policy is expected to hold, corrected by what rows were seen to hold."""

import numpy as np
from numpy.typing import NDArray

from kvpleat.engine.rows import Decoding, Limits, Row, whole

AHEAD = 64  # tokens that every row should be able to go on for when another one is admitted
SCALES = (0.125, 8.0)  # how far from what is expected rows are believed to be


class Reckoned:
    """See the module."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scale = 1.0  # pages that rows were seen to hold, over what was expected

    def correct(self, tokens: Decoding, held: list[int]) -> None:
        """Rows were seen to hold so many pages, by seat, after tokens of theirs."""
        seen = sum(map(held.__getitem__, tokens.seats))
        expected = int(self._limits.pages_of(tokens.starts + 1).sum())
        if seen and expected:
            self._scale = min(max(seen / expected, SCALES[0]), SCALES[1])

    def needs(self, rows: list[Row]) -> NDArray[np.int64]:
        """Pages with which each row should be able to go on a while."""
        limits = self._limits
        tokens = whole([max(row.goal, row.fed) for row in rows]) + AHEAD
        expected = self._scale * limits.pages_of(np.minimum(tokens, whole([row.limit for row in rows])))
        needs: NDArray[np.int64] = np.maximum(np.rint(expected).astype(np.int64), whole([row.needs for row in rows]))
        if limits.peak is not None:
            peaks = [limits.peak_pages(row.prompt_size) if row.fed < row.prompt_size else 0 for row in rows]
            needs = np.maximum(needs, whole(peaks))
        return needs

    def owed(self, rows: list[Row]) -> int:
        """Pages that rows lack for that."""
        return int((self.needs(rows) - whole([row.held for row in rows])).clip(min=0).sum())

    def growth(self, fed: NDArray[np.int64], cautious: bool) -> int:
        """Pages that the next tokens of rows are reckoned to take. fed: tokens of each."""
        if cautious:
            return self._limits.streams * len(fed)
        return int(np.rint(self._scale * (self._limits.pages_of(fed + 1) - self._limits.pages_of(fed))).sum())
