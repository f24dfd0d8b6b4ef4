"""Packed rows and their order: nothing lost, nothing doubled, the same after a resume, whoever shares the work."""

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpleat.errors import OptionError
from kvpleat.retrofit.data import Batch, Mixture, Packing, mixture
from tests.retrofit import texts

PADDING = 2**40  # no token of a numbered store


def make(store: Any = None, **changes: Any) -> Mixture:
    """A mixture of short rows of prose and recall tasks."""
    store = texts.prose_store() if store is None else store
    options: dict[str, Any] = {"length": 301, "batch_rows": 3, "recall_share": 0.4, "seed": 5}
    return mixture(store, texts.tokenizer(), **{**options, **changes})


def same(one: Batch, other: Batch) -> bool:
    """Bit for bit."""
    names = ("tokens", "doc_start", "loss_weight")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=30),
    length=st.integers(2, 70),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_packing_loses_and_doubles_nothing(sizes: list[int], length: int, seed: int, epoch: int) -> None:
    """Every token of every document once an epoch; runs of one document_start are runs of one document."""
    store = texts.numbered_store(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    packing = Packing(store, length, seed, padding=PADDING)
    seen: list[int] = []
    for i in range(packing.num_rows):
        tokens, doc_start, weight = packing.row(epoch * packing.num_rows + i)
        assert tokens.shape == doc_start.shape == weight.shape == (length,)
        for place, token in enumerate(tokens.tolist()):
            first = place == doc_start[place]
            if token == PADDING:
                assert weight[place] == 0
                assert doc_start[place] == place or doc_start[place] == doc_start[place - 1]
                continue
            seen.append(token)
            assert weight[place] == (0 if first else 1)
            if not first:
                assert doc_start[place] == doc_start[place - 1]
                assert token == tokens[place - 1] + 1
                assert owner[token] == owner[token - 1]
    assert sorted(seen) == list(range(sum(sizes)))


def test_long_documents_make_rows_of_their_own() -> None:
    """Whatever is longer than a row gives full rows of one document, and they do not follow each other."""
    packing = Packing(texts.numbered_store([40 * 50 + 7] + [30] * 70), 50, 1, padding=PADDING)
    rows = [packing.row(i) for i in range(packing.num_rows)]
    whole = [len(set(doc_start.tolist())) == 1 and tokens[0] < 2000 for tokens, doc_start, _ in rows]
    assert sum(whole) == 40
    longest = max(len(run) for run in "".join("x" if one else " " for one in whole).split())
    assert longest < 12, f"{longest} rows of one document in a row"


def test_without_boundaries_a_row_is_one_document() -> None:
    """doc_start is 0 throughout, and all but the first token and padding count."""
    packing = Packing(texts.numbered_store([10] * 7), 32, boundaries=False, padding=PADDING)
    for i in range(packing.num_rows):
        tokens, doc_start, weight = packing.row(i)
        assert not doc_start.any()
        assert weight.tolist() == [float(j > 0 and token != PADDING) for j, token in enumerate(tokens.tolist())]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """The same rows of short documents never come again in the next epoch, nor with another seed."""
    store = texts.numbered_store([13] * 40)

    def order(seed: int, epoch: int) -> list[int]:
        packing = Packing(store, 64, seed, padding=PADDING)
        return np.concatenate([packing.row(epoch * packing.num_rows + i)[0] for i in range(packing.num_rows)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_batch() -> None:
    """Shapes, dtypes, and positions that begin again with each document."""
    batch = next(make(recall_share=0.0))
    assert batch.tokens.shape == batch.doc_start.shape == batch.loss_weight.shape == (3, 301)
    assert (batch.tokens.dtype, batch.doc_start.dtype) == (torch.int64, torch.int32)
    assert batch.loss_weight.dtype == torch.float32
    for row in range(3):
        start = 0
        for place in range(301):
            start = place if batch.doc_start[row, place] == place else start
            assert batch.positions[row, place] == place - start


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("after", [0, 1, 4, 11, 40])
def test_resumed_batches_are_the_same(after: int, prefetch: int) -> None:
    """From any place on, across epochs, and whatever was made ahead; the state is plain JSON."""
    wanted = list(islice(make(), after + 6))
    first = make(prefetch=prefetch)
    for batch in wanted[:after]:
        assert same(next(first), batch)
    state = json.loads(json.dumps(first.state()))
    next(first)
    second = make(prefetch=prefetch)
    next(second)
    for resumed in (first, second):
        resumed.load_state(state)
        for batch in wanted[after:]:
            assert same(next(resumed), batch)
        resumed.close()


def test_state_of_other_data_is_refused() -> None:
    """A place means nothing where rows are others."""
    state = make().state()
    with pytest.raises(OptionError, match="seed: 5 when the state was saved, now 6"):
        make(seed=6).load_state(state)
    with pytest.raises(OptionError, match="Resume with the same settings"):
        make(recall_share=0.5).load_state(state)
    with pytest.raises(OptionError, match="tokens: "):
        make(store=texts.numbered_store([500] * 4)).load_state(state)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_rows(world_size: int) -> None:
    """However six rows are dealt to ranks, together they are the six rows of one rank."""
    alone = make(batch_rows=6)
    ranks = [make(batch_rows=6 // world_size, rank=i, world_size=world_size) for i in range(world_size)]
    for _ in range(8):
        parts = [next(rank) for rank in ranks]
        joined = Batch(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.doc_start for part in parts]),
            torch.cat([part.loss_weight for part in parts]),
        )
        assert same(joined, next(alone))


def test_ranks_see_different_tokens() -> None:
    """Within an epoch no token comes to two ranks."""
    store = texts.numbered_store([97] * 50)
    ranks = [make(store, recall_share=0.0, length=20, rank=i, world_size=3, batch_rows=2) for i in range(3)]
    seen: list[set[int]] = [set(), set(), set()]
    for _ in range(30):
        for i, rank in enumerate(ranks):
            seen[i] |= set(next(rank).tokens[:, 1:].flatten().tolist())
    assert all(len(tokens) > 500 for tokens in seen)
    padding = {texts.tokenizer().eos_token_id}
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]) - padding


def test_the_share_of_recall_rows_holds_everywhere() -> None:
    """After any number of rows, and each of them comes once."""
    for share in (0.4, 0.25, 1.0, 0.07):
        made = make(recall_share=share, batch_rows=1, answer_weight=7.0, length=256)
        found = 0
        for number in range(1, 41):
            found += bool((next(made).loss_weight == 7).any())
            assert found == int(number * share + 1e-9), (share, number)


def test_a_failure_in_the_thread_comes_out() -> None:
    """What goes wrong in a batch made ahead is raised where the batch is asked for."""
    made = make(prefetch=2, recall_share=0.0)

    def fail(index: int) -> Any:
        raise RuntimeError("no disk")

    made.packing.row = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no disk"):
        next(made)
    made.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall_share": 1.2}, "recall_share=1.2: a share of the rows lies between 0 and 1"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"length": 1, "recall_share": 0.0}, "length=1, seed=5: a row needs at least 2 tokens"),
        ({"seed": -1}, "no seed is negative"),
        ({"length": 100}, "at least 256 tokens.*recall_share=0"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    """The value, the consequence, the remedy."""
    with pytest.raises(OptionError, match=message):
        make(**changes)


def test_an_empty_store_is_refused() -> None:
    """Nothing to pack."""
    with pytest.raises(OptionError, match="no tokens"):
        Packing(texts.numbered_store([]), 10)
