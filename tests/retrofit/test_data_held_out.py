"""Held-out rows: whole, of one document each, first ones first, and the same each time."""

import numpy as np
import pytest
import torch

from kvpleat.errors import OptionError
from kvpleat.retrofit.data_held_out import held_out
from tests.retrofit.texts import numbered_store

SIZES = [25, 7, 9, 31, 8]  # with rows of 8: 3, 0, 1, 3, 1 rows


def rows(batch_rows: int, count: int) -> tuple[list[int], list[list[int]]]:
    """(sizes of the batches, rows as lists of tokens)."""
    batches = list(held_out(numbered_store(SIZES), 8, batch_rows, count)())
    return [len(b.tokens) for b in batches], [row.tolist() for b in batches for row in b.tokens]


@pytest.mark.parametrize(("batch_rows", "sizes"), [(1, [1] * 8), (3, [3, 3, 2]), (8, [8]), (9, [8])])
def test_first_rows_of_all_documents_come_first(batch_rows: int, sizes: list[int]) -> None:
    found, got = rows(batch_rows, 32)
    starts = np.cumsum([0, *SIZES])
    pieces = [(nth, int(starts[i]) + 8 * nth) for i, size in enumerate(SIZES) for nth in range(size // 8)]
    assert found == sizes
    assert got == [list(range(start, start + 8)) for _, start in sorted(pieces)]


def test_no_more_rows_than_asked_for() -> None:
    assert rows(2, 3) == ([2, 1], rows(2, 32)[1][:3])


def test_batches_begin_anew_and_are_one_document_each() -> None:
    batches = held_out(numbered_store(SIZES), 8, 3, 5)
    first, second = list(batches()), list(batches())
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.tokens.dtype, a.doc_start.dtype, a.loss_weight.dtype) == (torch.int64, torch.int32, torch.float32)
        assert not a.doc_start.any()
        assert a.loss_weight[:, 1:].eq(1).all()
        assert a.loss_weight[:, 0].eq(0).all()


def test_documents_that_are_too_short() -> None:
    with pytest.raises(OptionError, match="longest held-out document has 31 tokens"):
        held_out(numbered_store(SIZES), 32, 2)
