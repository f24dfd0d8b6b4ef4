"""Methods that encode the same texts in turns, a batch each: times that can be compared on a machine that does more.

Every method runs on a model object of its own, all on the same weights. Whatever else the machine does falls on all,
and speed-ups are those of pairs. Tokens are made before.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.bench.encoder.methods import Method, share_weights
from kvpleat.bench.floor import now
from kvpleat.hf.embed import batch_of, batches, pad_of, pool
from kvpleat.hf.models import LoadedModel

CLOSE = 0.02  # times that differ by less are equal


@dataclass(frozen=True)
class Entrant:
    """A method on a model object of its own."""

    method: Method
    model: Any


@dataclass
class Encoded:
    """What a method made of texts: vectors [N, C] of length 1, and seconds of each batch, pass after pass."""

    vectors: Tensor
    seconds: list[float]


@contextmanager
def entrants(loaded: LoadedModel, methods: Sequence[Method]) -> Iterator[list[Entrant]]:
    """All methods attached, each to a model object of its own."""
    with ExitStack() as stack:
        found = []
        for method in methods:
            model = share_weights(loaded.model)
            stack.enter_context(method.on(model))
            found.append(Entrant(method, model))
        yield found


@torch.inference_mode()
def in_turns(
    loaded: LoadedModel,
    chosen: Sequence[Entrant],
    rows: Sequence[Sequence[int]],
    size: int,
    *,
    pooling: str = "mean",
    passes: int = 1,
    say: Callable[[str], None] = lambda words: None,
) -> list[Encoded]:
    """Encode texts by every method, one batch each in turns, another one first every time.

    Args:
        rows: tokens of each text. size: texts of a batch. passes: how often everything is encoded.
        say: told each tenth of the way.

    Returns:
        One for each of `chosen`. Batches hold the same texts for all; the longest is encoded once more before, untimed.
    """
    device, pad = loaded.model.device, pad_of(loaded)
    groups = [batch.places for batch in batches(rows, size, pad, torch.device("cpu"))]
    fed = [entrant.method.cut(rows) for entrant in chosen]
    found = [Encoded(torch.empty(len(rows), loaded.model.config.hidden_size), []) for _ in chosen]
    plan = [(groups[0], False), *((places, True) for _ in range(passes) for places in groups)]
    for turn, (places, timed) in enumerate(plan):
        for k in range(len(chosen)):
            i = (turn + k) % len(chosen)
            batch = batch_of(fed[i], places, pad, device)
            start = now(device)
            hidden = chosen[i].model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            vectors = F.normalize(pool(hidden, batch.mask, pooling).float(), dim=1)
            seconds = now(device) - start
            if timed:
                found[i].seconds.append(seconds)
                found[i].vectors[places] = vectors.cpu()
        if 10 * turn // len(plan) != 10 * (turn + 1) // len(plan):
            say(f"{(turn + 1) / len(plan):.0%} of the texts")
    return found


# ---- equal time


def matched(
    loaded: LoadedModel,
    target: Method,
    make: Callable[[float], Method],
    bounds: tuple[float, float],
    rows: Sequence[Sequence[int]],
    size: int,
    steps: int = 6,
) -> Method:
    """The method of a kind that takes as long as another, found by false position between two strengths.

    Args:
        make: a method of a strength; stronger is faster. bounds: the weakest and the strongest.
        rows: texts to measure with. size: of a batch. steps: measurements at most.
    """
    weak, strong = bounds
    slower = faster = 0.0  # log of the time over the target's at both ends; 0: not measured
    best, nearest = make(strong), math.inf
    for _ in range(steps):
        share = slower / (slower - faster) if slower and faster else 0.5
        strength = weak + min(max(share, 0.1), 0.9) * (strong - weak)
        method = make(strength)
        with entrants(loaded, [target, method]) as pair:
            wanted, found = in_turns(loaded, pair, rows, size)
        ratio = statistics.median(b / a for a, b in zip(wanted.seconds, found.seconds, strict=True))
        if abs(math.log(ratio)) < nearest:
            best, nearest = method, abs(math.log(ratio))
        if nearest < CLOSE:
            break
        if ratio > 1:
            weak, slower = strength, math.log(ratio)
        else:
            strong, faster = strength, math.log(ratio)
    return best
