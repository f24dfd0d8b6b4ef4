"""Batches to train on: rows of packed documents, and rows of recall tasks among them.

Every row is a pure function of the store, the settings and its number: an epoch's rows are laid out from (seed, epoch),
and row numbers are dealt to batches and ranks in turn. So the place in the data is one number, resuming gives the same
bits, and two ranks of four rows see what one rank of eight sees.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.retrofit.data_store import TokenStore, end_tokens, load_tokens
from kvpleat.retrofit.recall import RecallRows, Row

__all__ = ["Batch", "Mixture", "Packing", "TokenStore", "load_tokens", "mixture"]


@dataclass(frozen=True)
class Batch:
    """Rows to train on: B rows of T tokens, on the CPU.

    Args:
        tokens: [B, T] int64.
        doc_start: [B, T] int32 index within the row of the first token of this token's document. Attention and
            positions never cross it.
        loss_weight: [B, T] float32 what the prediction of this token, made at the one before, counts: 1, more for
            answers of recall tasks, 0 for the first token of a document and for padding. Not normalised.
    """

    tokens: Tensor
    doc_start: Tensor
    loss_weight: Tensor

    @property
    def positions(self) -> Tensor:
        """[B, T] int32 position of each token in its document."""
        return torch.arange(self.tokens.shape[1], dtype=torch.int32) - self.doc_start


class Packing:
    """A store's documents in rows of exactly `length` tokens.

    Documents are cut into pieces of `length` tokens. A full piece is a row; the shorter rests and short documents are
    laid one after the other, and one that does not fit goes on in the next row as a new document. The order of the
    short ones and that of all rows are drawn for each epoch, so the rows of a long document are spread. The last row of
    short ones is filled up with padding. Nothing is lost or doubled within an epoch.

    Args:
        store: the documents.
        length: tokens of a row (T).
        seed: of both orders.
        boundaries: documents of a row are kept apart; False: a row is one document.
        padding: the token to fill up with.
    """

    def __init__(
        self, store: TokenStore, length: int, seed: int = 0, *, boundaries: bool = True, padding: int = 0
    ) -> None:
        if length < 2 or seed < 0:
            raise OptionError(
                f"length={length}, seed={seed}: a row needs at least 2 tokens to predict one of them, and no seed is "
                "negative. Choose others."
            )
        if not store.num_tokens:
            raise OptionError("The store holds no tokens, so there is nothing to pack. Pass sources with text.")
        self.store, self.length, self.seed, self.boundaries, self.padding = store, length, seed, boundaries, padding
        sizes = store.ends - store.starts
        full, self._rest_sizes = np.divmod(sizes, length)
        first = np.repeat(store.starts, full)
        nth = np.arange(len(first)) - np.repeat(np.cumsum(full) - full, full)
        self._full = first + nth * length  # where each full piece begins
        some = self._rest_sizes > 0
        self._rests, self._rest_sizes = (store.starts + full * length)[some], self._rest_sizes[some]
        self.num_rows = len(self._full) + -(-int(self._rest_sizes.sum()) // length)
        self._epoch = -1  # whose layout is held
        self._order = self._starts = self._ends = np.zeros(0, np.int64)

    def row(self, index: int) -> Row:
        """Row `index`, counted on through the epochs of `num_rows` rows."""
        epoch, place = divmod(index, self.num_rows)
        if epoch != self._epoch:
            self._lay_out(epoch)
        place = int(self._order[place])
        if place < len(self._full):
            start = int(self._full[place])
            segments = [(0, start, self.length)]
        else:
            segments = self._segments(place - len(self._full))
        return self._fill(segments)

    def _lay_out(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self._rests))
        self._order = random.permutation(self.num_rows)
        self._starts, self._ends = self._rests[order], np.cumsum(self._rest_sizes[order])
        self._epoch = epoch

    def _segments(self, row: int) -> list[tuple[int, int, int]]:
        """(place in the row, place in the store, tokens) of every piece or part of one in a row of short ones."""
        begin, end = row * self.length, (row + 1) * self.length
        found = []
        piece = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end and piece < len(self._ends):
            stop = int(self._ends[piece])
            offset = begin - (int(self._ends[piece - 1]) if piece else 0)
            size = min(stop, end) - begin
            found.append((begin - row * self.length, int(self._starts[piece]) + offset, size))
            begin, piece = begin + size, piece + 1
        return found

    def _fill(self, segments: list[tuple[int, int, int]]) -> Row:
        tokens = np.full(self.length, self.padding, np.int64)
        doc_start = np.zeros(self.length, np.int32)
        weight = np.ones(self.length, np.float32)
        filled = 0
        for place, start, size in segments:
            tokens[place : place + size] = self.store.tokens[start : start + size]
            doc_start[place : place + size] = place
            weight[place] = 0
            filled = place + size
        doc_start[filled:], weight[filled:] = filled, 0
        if not self.boundaries:
            doc_start[:], weight[1:filled] = 0, 1
        return tokens, doc_start, weight


class Mixture:
    """Batches without end: iterate over it. See `mixture`."""

    def __init__(
        self,
        packing: Packing,
        recall: RecallRows | None,
        *,
        batch_rows: int,
        recall_share: float,
        rank: int,
        world_size: int,
        prefetch: int,
    ) -> None:
        self.packing, self.recall = packing, recall
        self._batch_rows, self._rank, self._world_size = batch_rows, rank, world_size
        self._share = Fraction(recall_share).limit_denominator(10**6)
        self._next_row = 0  # of all ranks together
        self._prefetch = prefetch
        self._worker = ThreadPoolExecutor(1, "batches") if prefetch else None
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self._batch_rows * self._world_size
        if self._worker is None:
            batch = self._batch(self._next_row)
        else:
            while len(self._ahead) <= self._prefetch:
                row = self._next_row + len(self._ahead) * step
                self._ahead.append(self._worker.submit(self._batch, row))
            batch = self._ahead.popleft().result()
        self._next_row += step
        return batch

    def state(self) -> dict[str, Any]:
        """The place in the data, and what it is a place in. Plain numbers, the same on every rank."""
        return {"next_row": self._next_row, "settings": self._settings()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a place. Raises OptionError where it is a place in other data."""
        mine, theirs = self._settings(), state["settings"]
        for name in mine:
            if mine[name] != theirs.get(name):
                raise OptionError(
                    f"{name}: {theirs.get(name)} when the state was saved, now {mine[name]}, so the batches that "
                    "follow would be others. Resume with the same settings and texts, or start afresh."
                )
        self._drop_ahead()
        self._next_row = int(state["next_row"])

    def close(self) -> None:
        """Stop the thread that makes batches ahead, if there is one."""
        self._drop_ahead()
        if self._worker is not None:
            self._worker.shutdown()

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _settings(self) -> dict[str, Any]:
        packing = self.packing
        return {
            "length": packing.length,
            "seed": packing.seed,
            "boundaries": packing.boundaries,
            "tokens": packing.store.num_tokens,
            "documents": packing.store.num_documents,
            "recall_share": str(self._share),
            "answer_weight": self.recall.answer_weight if self.recall else None,
        }

    def _batch(self, first: int) -> Batch:
        first += self._rank * self._batch_rows
        rows = [self._row(first + i) for i in range(self._batch_rows)]
        tokens, doc_start, weight = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
        return Batch(tokens, doc_start, weight)

    def _row(self, number: int) -> Row:
        """Of n rows, the share of recall rows times n are recall rows, rounded down: for every n."""
        before = int(number * self._share)
        if self.recall is not None and int((number + 1) * self._share) > before:
            return self.recall.row(before)
        return self.packing.row(number - before)


def mixture(
    store: TokenStore,
    tokenizer: Any,
    *,
    length: int,
    batch_rows: int,
    recall_share: float = 0.4,
    answer_weight: float = 5.0,
    boundaries: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 0,
) -> Mixture:
    """Batches of packed documents and recall tasks, without end.

    Args:
        store: see `load_tokens`.
        tokenizer: the one the store was made with; a fast one if there are recall rows.
        length: tokens of a row (T).
        batch_rows: rows of a batch on this rank (B).
        recall_share: of the rows, 0 to 1.
        answer_weight: what a token of an answer counts, where others count 1.
        boundaries: keep the documents of a row apart.
        seed: of everything that is drawn.
        rank, world_size: this process and how many there are; each sees rows of its own.
        prefetch: batches made ahead in a thread; 0: none.

    Raises:
        OptionError: an option is out of range, or there is nothing to train on.
    """
    if not 0 <= recall_share <= 1:
        raise OptionError(f"recall_share={recall_share}: a share of the rows lies between 0 and 1.")
    if batch_rows < 1 or not 0 <= rank < world_size or prefetch < 0:
        raise OptionError(
            f"batch_rows={batch_rows}, rank={rank}, world_size={world_size}, prefetch={prefetch}: a batch has at least "
            "one row, ranks count from 0 to world_size - 1, and no fewer than 0 batches are made ahead."
        )
    padding = (end_tokens(tokenizer) or [0])[0]
    packing = Packing(store, length, seed, boundaries=boundaries, padding=padding)
    recall = RecallRows(tokenizer, store, length, seed, answer_weight=answer_weight) if recall_share else None
    return Mixture(
        packing,
        recall,
        batch_rows=batch_rows,
        recall_share=recall_share,
        rank=rank,
        world_size=world_size,
        prefetch=prefetch,
    )
