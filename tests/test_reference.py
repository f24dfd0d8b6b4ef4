"""The reference itself: with everything visible it is the model, and its masks bite."""

import pytest
import torch

from tests import models, reference


@pytest.mark.parametrize("family", models.FAMILIES)
def test_with_everything_visible_it_is_the_model(family: str) -> None:
    """Causal and sliding masks of the reference are transformers' own."""
    model, tokens = models.tiny(family), models.prompt(70)
    with torch.no_grad():
        theirs = model(tokens).logits[0]
    # Gemma 2's eager attention takes its softmax in float32, so the comparison cannot be closer than that.
    torch.testing.assert_close(reference.forward(model, tokens[0]), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_window_changes_the_logits(family: str) -> None:
    """The tiny models feel what they cannot see: a comparison with the reference can fail."""
    model, tokens = models.tiny(family), models.prompt(120)[0]
    visible = reference.window_of(model, 120, budget=40)
    change = (reference.forward(model, tokens, visible) - reference.forward(model, tokens)).abs()
    assert change[:32].max() == 0
    assert change[60:].max(dim=1).values.min() > 1e-3


def test_window_by_hand() -> None:
    """budget 40, 4 sinks: at t = 75 the last moment is 64, room for 20 entries beside sinks and growth."""
    visible = reference.window_visible(80, streams=6, head_dim=16, itemsize=4, budget=40)
    assert visible[75].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(44, 76)]
    assert visible[30].nonzero().flatten().tolist() == list(range(31))


def test_window_with_a_ratio_by_hand() -> None:
    """ratio 2: at moment 192, 192 * 6 * 128 bytes / 2 buy 34 pages of 2,112 bytes, 5 a stream: 80 entries."""
    visible = reference.window_visible(200, streams=6, head_dim=16, itemsize=4, ratio=2.0)
    assert visible[199].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(192 - 60, 200)]
