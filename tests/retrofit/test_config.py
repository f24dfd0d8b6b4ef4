"""How ratio and learning rate move over a run."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpleat.errors import OptionError
from kvpleat.retrofit.config import LAST_RATE, Recipe

ratios = st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]), min_size=1, max_size=5, unique=True)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    chosen = tuple(sorted(draw(ratios)))
    return Recipe(
        ratios=chosen,
        steps=draw(st.integers(len(chosen), 200)),
        delay=draw(st.integers(1, 64)),
        ramp=draw(st.sampled_from([0.3, 0.7, 1.0])),
        margin=draw(st.sampled_from([0.9, 1.0, 1.03])),
        length=1024,
    )


@given(recipes())
@settings(deadline=None)
def test_stages_end_one_after_the_other(recipe: Recipe) -> None:
    """One end for each ratio, each after a step of its own, the last one with the run."""
    ends = recipe.stage_ends()
    assert len(ends) == len(recipe.ratios)
    assert all(b > a for a, b in zip([0, *ends], ends, strict=False))
    assert ends[-1] == recipe.steps


@given(recipes())
@settings(deadline=None)
def test_ratio_never_falls_and_arrives(recipe: Recipe) -> None:
    """From 1 upwards; the last step of a stage asks for its ratio, at the lowest rate unless all of it was a ramp."""
    asked = [recipe.at(step) for step in range(recipe.steps)]
    values = [ratio for ratio, _ in asked]
    assert all(b >= a - 1e-9 for a, b in zip([1.0, *values], values, strict=False))
    assert all(LAST_RATE <= rate <= 1 for _, rate in asked)
    for ratio, end in zip(recipe.ratios, recipe.stage_ends(), strict=True):
        assert asked[end - 1][0] == pytest.approx(ratio)
        assert asked[end - 1][1] == pytest.approx(1.0 if recipe.ramp == 1.0 else LAST_RATE)
    targets = [recipe.target(step) for step in range(recipe.steps)]
    assert all(0 <= a <= b + 1e-9 < 1 for a, b in itertools.pairwise(targets))


def test_stages_are_as_long_as_their_octaves() -> None:
    assert Recipe(ratios=(2.0, 4.0, 8.0), steps=90, delay=16).stage_ends() == [30, 60, 90]
    assert Recipe(ratios=(4.0, 8.0), steps=90, delay=16).stage_ends() == [60, 90]


def test_ramp_then_cosine() -> None:
    """Half way up the ramp half of the way is asked for; half way down the cosine the rate is in the middle."""
    recipe = Recipe(ratios=(3.0,), steps=100, ramp=0.6, delay=16)
    assert recipe.at(29) == (pytest.approx(2.0), 1.0)
    assert recipe.at(59) == (pytest.approx(3.0), 1.0)
    middle = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi / 2))
    assert recipe.at(79) == (pytest.approx(3.0), pytest.approx(middle))


@pytest.mark.parametrize(
    ("options", "rate"),
    [({"train": "lora"}, 1.5e-3), ({"train": "full"}, 5e-5), ({"train": "full", "model_rate": 0.25}, 0.25)],
)
def test_rate_of_what_is_trained(options: dict[str, Any], rate: float) -> None:
    """All weights take a smaller one than adapters, unless it is named."""
    assert Recipe(**options).weights_rate == rate


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train": "all"}, "train='all'"),
        ({"adapt": "mlp"}, "adapt='mlp'"),
        ({"ratios": ()}, r"ratios=\(\)"),
        ({"ratios": (4.0, 2.0)}, r"ratios=\(4.0, 2.0\)"),
        ({"ratios": (2.0, 2.0)}, r"ratios=\(2.0, 2.0\)"),
        ({"ratios": (0.5,)}, "ratio=0.5"),
        ({"ratios": (2.0, 4.0), "steps": 1}, "steps=1 for 2 ratios"),
        ({"ratios": (8.0,), "length": 256}, "ratio=7.6 with delay=256 at length=256"),
        ({"ratios": (8.0,), "length": 1024}, "ratio=7.6 with delay=256 at length=1024"),
        ({"method": "dmc"}, "delay=256 for dmc"),
        ({"rows": 0}, "rows=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"margin": 0.4}, "margin=0.4"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Recipe(**options)  # type: ignore[arg-type]
