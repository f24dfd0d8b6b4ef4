"""Batches to judge with: whole rows of one held-out document each, always the same ones."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kvpleat.errors import OptionError
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.data_store import TokenStore

ROWS = 32


def held_out(store: TokenStore, length: int, batch_rows: int, rows: int = ROWS) -> Callable[[], Iterator[Batch]]:
    """What `retrofit` judges gates on: rows of `length` tokens, each from one document, so that what a cache would
    hold after its last token is known.

    Args:
        store: texts that are not trained on; see `load_tokens`.
        length: tokens of a row (T).
        batch_rows: rows of a batch; the last one may have fewer.
        rows: how many at most. The first row of every document comes before the second of any.

    Returns:
        a function that begins the batches anew each time.

    Raises:
        OptionError: no document is that long.
    """
    pieces = (store.ends - store.starts) // length
    first = np.repeat(store.starts, pieces)
    nth = np.arange(len(first)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (first + nth * length)[np.argsort(nth, kind="stable")][:rows]
    if not len(starts):
        longest = int((store.ends - store.starts).max())
        raise OptionError(
            f"length={length:,}: the longest held-out document has {longest:,} tokens, so there is no whole row to "
            "judge on. Hold out longer texts, or train on shorter rows."
        )

    def batches() -> Iterator[Batch]:
        for some in np.array_split(starts, range(batch_rows, len(starts), batch_rows)):
            tokens = torch.from_numpy(np.stack([store.tokens[s : s + length] for s in some]).astype(np.int64))
            weight = torch.ones(tokens.shape)
            weight[:, 0] = 0.0
            yield Batch(tokens, torch.zeros(tokens.shape, dtype=torch.int32), weight)

    return batches
