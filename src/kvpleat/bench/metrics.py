"""Metric definitions, each in one place and with no dependency beyond torch.

Distributions are compared in nats, in the direction KL(full || method): what is lost where the uncompressed model puts
its probability. Text is compared as SQuAD does (arXiv 1606.05250), word lists as RULER does (arXiv 2404.06654).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- tokens


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: logits [..., V], targets [...] -> [...] float64 nats."""
    return F.cross_entropy(logits.double().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def perplexity(total_loss: float, tokens: float) -> float:
    """exp of the mean loss: total loss in nats over the number of tokens."""
    return math.exp(total_loss / tokens)


def kl_divergence(full: Tensor, method: Tensor) -> Tensor:
    """KL(full || method) of next-token distributions: logits [..., V] twice -> [...] nats, never below 0."""
    p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (full, method))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def agreement(full: Tensor, method: Tensor) -> Tensor:
    """1.0 where both have the same likeliest token: logits [..., V] twice -> [...] float32."""
    return (full.argmax(-1) == method.argmax(-1)).float()


# ---- answers


def normalize(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(" " if ch in string.whitespace else ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalised answer equals any normalised reference."""
    return float(any(normalize(answer) == normalize(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall of words over the references, 0 to 1."""

    def one(reference: str) -> float:
        ours, theirs = normalize(answer).split(), normalize(reference).split()
        if not ours or not theirs:
            return float(ours == theirs)
        common = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * common / (len(ours) + len(theirs))

    return max(one(reference) for reference in references)


def starts_with(answer: str, reference: str) -> float:
    """1.0 if the answer begins with the reference, leading blanks aside, and no letter or digit follows at once."""
    text = answer.lstrip()
    after = text[len(reference) : len(reference) + 1]
    return float(text.startswith(reference) and not after.isalnum())


def found(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer as words, case aside: RULER's string match over all of them."""
    text = answer.lower()
    hits = [re.search(rf"(?<!\w){re.escape(reference.lower())}(?!\w)", text) is not None for reference in references]
    return sum(hits) / len(hits)


# ---- generated text


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that occurred before in the same text, 0 (all new) to 1."""
    grams = _ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_ngrams(tokens: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams over all n-grams (arXiv 1510.03055), 0 to 1; 1 for a text shorter than n."""
    grams = _ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


# ---- certainty


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


@lru_cache(maxsize=8)  # every figure of a report resamples the same few numbers of items
def _picks(count: int, samples: int, seed: int) -> Tensor:
    """[samples, count] items drawn with replacement."""
    return torch.randint(count, (samples, count), generator=torch.Generator().manual_seed(seed))


def _interval(value: float, draws: Tensor) -> Interval:
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(value, low, high)


def bootstrap_mean(
    sums: Sequence[float], counts: Sequence[float] | None = None, *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Ratio of sums over items, with a percentile bootstrap over items.

    Args:
        sums: one number per item.
        counts: what each item's number is a sum over (its tokens, say); None: 1 each, so that the figure is a mean.
    """
    total = torch.tensor(sums, dtype=torch.float64)
    weight = torch.ones_like(total) if counts is None else torch.tensor(counts, dtype=torch.float64)
    picks = _picks(len(total), samples, seed)
    return _interval(float(total.sum() / weight.sum()), total[picks].sum(1) / weight[picks].sum(1))


def paired_bootstrap(
    ours: Sequence[float],
    base: Sequence[float],
    counts: Sequence[float] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Difference ours - base of two ratios of sums over the same items, resampling items as pairs.

    Items that are hard for both then cancel, which is why the interval is far narrower than that of either figure.

    Args:
        ours, base: one number per item, the same items in the same order.
        counts: as in `bootstrap_mean`.
    """
    if len(ours) != len(base):
        raise ValueError(f"{len(ours)} items of one method and {len(base)} of the other cannot be paired")
    return bootstrap_mean([a - b for a, b in zip(ours, base, strict=True)], counts, samples=samples, seed=seed)


def perplexity_increase(difference: Interval) -> Interval:
    """A difference of mean losses (nats) as a relative change of perplexity: 0.01 is one percent more."""
    return Interval(*(math.expm1(x) for x in (difference.value, difference.low, difference.high)))


# ---- speed, by vLLM's definitions: TTFT is the time to the first token, ITL the times between two tokens


def time_per_output_token(intervals: Sequence[float]) -> float:
    """TPOT of one request in seconds: (end - first token) / (tokens - 1), the mean of its inter-token latencies.

    A mean, so that what happens at few tokens (a moment of compression) is in it.
    """
    return sum(intervals) / len(intervals)


def output_throughput(rows: int, first: float, intervals: Sequence[float]) -> float:
    """Output tokens per second of a batch from the start of its prompt to its last token.

    Args:
        rows: requests in the batch. first: TTFT in seconds. intervals: its inter-token latencies.
    """
    return rows * (1 + len(intervals)) / (first + sum(intervals))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated linearly, as numpy and vLLM do it."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100))
