"""From a compression ratio to pages: the arithmetic that all budgeted policies share."""

import math

from kvpleat import accounting
from kvpleat.errors import OptionError
from kvpleat.types import KVShape

MAX_RATIO = 256.0


def check_ratio(ratio: float | None) -> None:
    """Refuse what is not a compression ratio: full over compressed bytes, at least 1."""
    if ratio is None or (math.isfinite(ratio) and 1.0 <= ratio <= MAX_RATIO):
        return
    if 0.0 <= ratio < 1.0:
        raise OptionError(
            f"ratio={ratio}: a compression ratio is full over compressed size, at least 1; below 1 the cache would "
            f"grow. If you mean the fraction removed, as some libraries do, pass 1/(1-r): ratio={1 / (1 - ratio):.4g}."
        )
    raise OptionError(
        f"ratio={ratio}: outside 1 to {MAX_RATIO:.0f}; nothing useful would be left. Pass for example ratio=4.0, or "
        "policies.Full() for no compression."
    )


def check_at_least(**options: tuple[float, float]) -> None:
    """Refuse options below their minimum: name=(value, minimum)."""
    for name, (value, minimum) in options.items():
        if not value >= minimum:
            raise OptionError(f"{name}={value}: must be at least {minimum}. Leave it out for the default.")


def allowed_pages(shape: KVShape, tokens: int, ratio: float, beside: int = 0) -> int:
    """Pages that all streams of one row may hold together so that full / allocated bytes >= ratio at `tokens` tokens.

    Args:
        beside: bytes that the policy holds beside its pages. They are taken from the budget, a quarter of it at most:
            a short text would have nothing left.
    """
    budget = int(accounting.full_bytes(shape, tokens) / ratio)
    return (budget - min(beside, budget // 4)) // (accounting.page_bytes(shape) + accounting.PAGE_OVERHEAD)


def pages_for(entries: int, page_size: int) -> int:
    """Pages that `entries` entries of one stream occupy."""
    return -(-entries // page_size)


def next_multiple(position: int, interval: int) -> int:
    """The first multiple of `interval` above `position`."""
    return (position // interval + 1) * interval
