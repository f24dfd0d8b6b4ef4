"""Metric definitions, each in one place and with no dependency beyond torch."""

import math

import torch
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: logits [..., V], targets [...] -> [...] float64 nats."""
    return torch.nn.functional.cross_entropy(logits.double().flatten(0, -2), targets.flatten(), reduction="none").view(
        targets.shape
    )


def perplexity(losses: list[float]) -> float:
    """exp of the mean loss over tokens (nats)."""
    return math.exp(sum(losses) / len(losses))


def paired_interval(
    ours: list[list[float]], full: list[list[float]], *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% bootstrap interval of the perplexity ratio ours / full, resampling items.

    Args:
        ours, full: token losses of each item (nats), the same items in the same order.
    """
    differences = torch.tensor([sum(a) - sum(b) for a, b in zip(ours, full, strict=True)], dtype=torch.float64)
    counts = torch.tensor([len(a) for a in ours], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(ours), (samples, len(ours)), generator=generator)
    ratios = (differences[picks].sum(1) / counts[picks].sum(1)).exp().sort().values
    return float(ratios[int(0.025 * samples)]), float(ratios[int(0.975 * samples) - 1])
