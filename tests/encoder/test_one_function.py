"""EncoderMerge on tiny models of every family against a reference without kvpleat: ragged, padded, and alone."""

import math
from typing import Any

import pytest
import torch

from kvpleat import compress
from kvpleat.kernels import grouping, sized
from kvpleat.policies import EncoderMerge
from tests.encoder import reference
from tests.encoder.models import FAMILIES, FIRST, LAST, PAD, texts, tiny

LENGTHS = [37, 9, 24, 61]
SPECIAL = {FIRST, LAST, PAD}


def same(got: torch.Tensor, want: torch.Tensor, family: str) -> None:
    """Equal up to rounding; transformers rotates in float32 whatever the model's dtype."""
    tolerance = 2e-6 if family == "modernbert" else 1e-9
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def output(model: Any, policy: EncoderMerge, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    with torch.no_grad(), compress(model, policy) as merged:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state, merged.trace


def kept(policy: EncoderMerge, length: int, layers: int = 3) -> list[int]:
    return [max(math.ceil(length * share - 1e-9), min(length, policy.floor)) for share in policy.shares(layers)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ratio", "steps", "whole"), [(2.0, 1, True), (3.7, 1, True), (2.6, 2, True), (5.0, 3, True), (2.6, 2, False)]
)
def test_like_the_reference(family: str, ratio: float, steps: int, whole: bool) -> None:
    """Ragged rows in one padded batch: states and groups of each row are those of the row alone, in loops."""
    model, policy = tiny(family), EncoderMerge(ratio=ratio, steps=steps, floor=4, whole_keys=whole)
    ids, mask = texts(LENGTHS, seed=steps)
    states, trace = output(model, policy, ids, mask)
    for row, length in enumerate(LENGTHS):
        of_row = ids[row, :length], kept(policy, length), SPECIAL, policy.distance
        want, seen = reference.forward(model, family, *of_row, whole_keys=whole)
        same(states[row, :length], want, family)
        for layer, groups in enumerate(seen):
            place = trace.places[layer][row]
            assert [sorted(g) for g in groups] == [
                (place == i).nonzero()[:, 0].tolist() for i in range(int(place.max()) + 1)
            ]
            assert trace.counts[layer][row] == len(groups) == kept(policy, length)[layer]
        assert (states[row, length:] == 0).all()


@pytest.mark.parametrize(
    ("family", "options"),
    [("bert", {}), ("bert", {"whole_keys": False, "steps": 2}), ("modernbert", {}), ("distilbert", {"what": "kv"})],
)
def test_kernels_give_the_same(family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton where it merges on a GPU (interpreted where there is none), and torch."""
    pytest.importorskip("triton")
    model, policy = tiny(family).float(), EncoderMerge(ratio=2.6, floor=4, **options)
    ids, mask = texts([19, 9])
    monkeypatch.setattr(grouping, "runs_on_triton", lambda *tensors: False)
    want, slow = output(model, policy, ids, mask)
    monkeypatch.setattr(grouping, "runs_on_triton", lambda *tensors: True)
    monkeypatch.setattr(sized, "runs_on_triton", lambda *tensors: True)
    got, fast = output(model, policy, ids, mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert fast.counts == slow.counts
    assert all(map(torch.equal, fast.places, slow.places))


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_like_the_reference(family: str) -> None:
    """Rows shrink by what they can lose, and no further."""
    model, policy = tiny(family, seed=1), EncoderMerge(coverage=0.8, floor=4)
    ids, mask = texts(LENGTHS, seed=5)
    states, trace = output(model, policy, ids, mask)
    for row, length in enumerate(LENGTHS):
        want, seen = reference.forward(model, family, ids[row, :length], None, SPECIAL, policy.distance, 0.8)
        assert trace.counts[0][row] == len(seen[0]) < length
        same(states[row, :length], want, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family: str) -> None:
    """Padding before a text changes nothing where positions do not count it (they do in BERT and DistilBERT)."""
    model, policy = tiny(family), EncoderMerge(ratio=2.5, floor=4)
    ids, mask = texts(LENGTHS, seed=7, left=True)
    if family in ("bert", "distilbert"):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), compress(model, policy):
            states = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    else:
        states, _ = output(model, policy, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone, _ = output(model, policy, ids[row : row + 1, -length:], None)
        same(states[row, -length:], alone[0], family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_1_is_the_full_model(family: str) -> None:
    """The same bits, and nothing attached to the model."""
    model = tiny(family).float()
    ids, mask = texts(LENGTHS)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with compress(model, EncoderMerge(ratio=1.0)):
            got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_rows_are_the_full_model(family: str) -> None:
    """Below the floor nothing merges: our attention without sizes is the model's own."""
    model = tiny(family)
    ids, mask = texts([40, 12, 16])
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
    states, trace = output(model, EncoderMerge(ratio=2.0, floor=16), ids, mask)
    assert trace.counts[0] == [20, 12, 16]
    for row, length in ((1, 12), (2, 16)):
        same(states[row, :length], want[row, :length], family)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("ratio", [1.0000001, 2.5])
def test_keys_and_values_only(family: str, ratio: float) -> None:
    """All tokens stay; a row is the same alone; at a ratio that merges none it is the full model."""
    model, policy = tiny(family), EncoderMerge(ratio=ratio, what="kv", floor=4)
    ids, mask = texts(LENGTHS)
    states, trace = output(model, policy, ids, mask)
    assert trace.counts == [LENGTHS] * 3
    full = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone, _ = output(model, policy, ids[row : row + 1, :length], None)
        same(states[row, :length], alone[0], family)
        error = (states[row, :length] - full[row, :length]).abs().max()
        assert error < 1e-9 if ratio < 2 else error > 1e-3


def test_special_tokens_stay() -> None:
    """The frame of a text, the same tokens inside it, and what the caller protects are groups of one in every layer."""
    model, policy = tiny("bert"), EncoderMerge(ratio=6.0, floor=2, protect=(11,))
    ids, mask = texts([50, 33])
    ids[0, 20], ids[0, 5], ids[1, 8] = LAST, 11, FIRST
    _, trace = output(model, policy, ids, mask)
    fixed = [(0, 0), (0, 20), (0, 5), (0, 49), (1, 0), (1, 8), (1, 32)]
    for place in trace.places:
        for row, column in fixed:
            assert (place[row] == place[row, column]).sum() == 1
        assert (place[1, 33:] == -1).all()
    assert trace.ratio == pytest.approx(3 * 83 / (3 * sum(trace.counts[0])))


def test_all_hidden_states_keep_their_shape() -> None:
    """output_hidden_states, and tuples in place of an output object; the last one is the output."""
    model = tiny("bert")
    ids, mask = texts(LENGTHS)
    with torch.no_grad(), compress(model, EncoderMerge(ratio=3.0, steps=2, floor=4)) as merged:
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        last, pooled, hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=False)
    assert [h.shape for h in out.hidden_states] == [(4, 61, 32)] * 4
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(last, out.last_hidden_state)
    assert torch.equal(pooled, out.pooler_output)
    assert all(map(torch.equal, hidden, out.hidden_states))
    for place, states in zip((merged.trace.places[0], *merged.trace.places), hidden, strict=True):
        one = place[0] == place[0, 3]
        assert (states[0, one] == states[0, 3]).all()
