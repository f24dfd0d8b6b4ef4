"""Every metric against a value worked out by hand."""

import math

import pytest
import torch

from kvpleat.bench import metrics


def logits(*probabilities: float) -> torch.Tensor:
    """Logits that give these probabilities."""
    return torch.tensor(probabilities).log()


def test_losses_and_perplexity() -> None:
    """Probabilities 1/2 and 1/8 of the targets: 4 bits in two tokens, so perplexity 4."""
    losses = metrics.token_losses(
        torch.stack([logits(0.5, 0.25, 0.25), logits(0.125, 0.375, 0.5)]), torch.tensor([0, 0])
    )
    assert losses.tolist() == pytest.approx([math.log(2), math.log(8)])
    assert metrics.perplexity(float(losses.sum()), 2) == pytest.approx(4.0)


def test_losses_keep_the_shape() -> None:
    """[2, 3] targets give [2, 3] losses; equal logits over 7 words cost log 7 each."""
    losses = metrics.token_losses(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long))
    assert losses.shape == (2, 3)
    assert losses.flatten().tolist() == pytest.approx([math.log(7)] * 6)


def test_kl() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2; the other direction differs; equal ones give 0."""
    full, method = logits(0.5, 0.5), logits(0.25, 0.75)
    assert float(metrics.kl_divergence(full, method)) == pytest.approx(math.log(2) - math.log(3) / 2)
    assert float(metrics.kl_divergence(method, full)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(metrics.kl_divergence(full, full + 3)) == 0.0  # a constant changes no distribution


def test_agreement() -> None:
    """Likeliest tokens 0, 1 against 0, 2."""
    full = torch.stack([logits(0.6, 0.3, 0.1), logits(0.1, 0.8, 0.1)])
    method = torch.stack([logits(0.4, 0.3, 0.3), logits(0.1, 0.2, 0.7)])
    assert metrics.agreement(full, method).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "references", "f1", "exact"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("in the year 1912", ["1912"], 0.5, 0.0),  # precision 1/3, recall 1
        ("red and blue", ["blue, red", "green"], 0.8, 0.0),  # two of three words, two of two
        ("", ["yes"], 0.0, 0.0),
        ("a an the", [""], 1.0, 1.0),  # both empty once the articles are gone
        ("no no", ["no"], 2 / 3, 0.0),  # a word counts as often as both have it
    ],
)
def test_f1_and_exact(answer: str, references: list[str], f1: float, exact: float) -> None:
    """Words by hand."""
    assert metrics.f1(answer, references) == pytest.approx(f1)
    assert metrics.exact_match(answer, references) == exact


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (" 12345.", 1.0),
        ("12345", 1.0),
        ("\n12345 is", 1.0),
        ("123456", 0.0),
        ("1234", 0.0),
        ("is 12345", 0.0),
        ("", 0.0),
    ],
)
def test_starts_with(answer: str, correct: float) -> None:
    """The key itself, and neither a longer nor a later number."""
    assert metrics.starts_with(answer, "12345") == correct


def test_found() -> None:
    """Two of three as whole words, whatever their case."""
    assert metrics.found("ABC, de and xfgh", ["abc", "DE", "fgh"]) == pytest.approx(2 / 3)
    assert metrics.found("", ["abc"]) == 0.0


def test_ngrams() -> None:
    """1 2 1 2 1 has the pairs 12 21 12 21: two of four repeat, two of four are distinct."""
    tokens = [1, 2, 1, 2, 1]
    assert metrics.repeated_ngrams(tokens, 2) == 0.5
    assert metrics.distinct_ngrams(tokens, 2) == 0.5
    assert metrics.repeated_ngrams([1], 4) == 0.0
    assert metrics.distinct_ngrams([1], 2) == 1.0


def test_bootstrap_of_equal_items_is_certain() -> None:
    """Nothing varies, so nothing is uncertain; and the figure is a ratio of sums, not a mean of ratios."""
    got = metrics.bootstrap_mean([2.0, 2.0, 2.0], [4.0, 4.0, 4.0])
    assert (got.value, got.low, got.high) == (0.5, 0.5, 0.5)
    assert metrics.bootstrap_mean([1.0, 9.0], [1.0, 3.0]).value == 2.5


def test_bootstrap_covers_about_95_percent() -> None:
    """Means of 60 coin flips: the interval holds the true one half in about 95 of 100 draws."""
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(200):
        flips = (torch.rand(60, generator=generator) < 0.5).double().tolist()
        interval = metrics.bootstrap_mean(flips, samples=500)
        held += interval.low <= 0.5 <= interval.high
    assert 180 <= held <= 199


def test_pairs_are_narrower_than_singles() -> None:
    """Items differ much, methods by one each: the paired difference is 1 for certain."""
    base = [float(i * i) for i in range(12)]
    ours = [x + 1 for x in base]
    got = metrics.paired_bootstrap(ours, base)
    assert (got.value, got.low, got.high) == (1.0, 1.0, 1.0)
    single = metrics.bootstrap_mean(ours)
    assert single.high - single.low > 20


def test_pairs_must_match() -> None:
    """Two items against one."""
    with pytest.raises(ValueError, match="cannot be paired"):
        metrics.paired_bootstrap([1.0, 2.0], [1.0])


def test_perplexity_increase() -> None:
    """log 1.02 nats a token are two percent."""
    got = metrics.perplexity_increase(metrics.Interval(math.log(1.02), 0.0, math.log(1.5)))
    assert (got.value, got.low, got.high) == pytest.approx((0.02, 0.0, 0.5))
