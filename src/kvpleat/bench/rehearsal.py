"""The untimed run before speeds are taken: it warms everything up, follows memory, and checks the outputs.

No speed counts that comes from a wrong answer. kvpleat's `full` must give DynamicCache's logits on the very prompt and
steps that are timed afterwards, and each method of kvpleat must give the same logits token by token as in one go on a
fork of its cache: one function, however it is fed. Other libraries' methods have no such twin and are taken as they
are (their `check` is None).

What decides is the token whose two distributions are farthest apart, in nats, because that tells rounding from mistakes
in 16 bits too. On SmolLM2-135M with 700 tokens and 48 steps, rounding alone made 0.009 in bfloat16 (DynamicCache
against itself: 0.007) and less than 1e-6 in float32, and evicting three quarters of the entries 0.37.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kvpleat.bench.methods import REFERENCE, Session, parse
from kvpleat.bench.metrics import kl_divergence
from kvpleat.errors import JudgeError
from kvpleat.hf.models import LoadedModel

PIECE = 32  # known tokens fed in one go: a moment of compression falls into every piece
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 6e-2}  # nats of the worst token, by dtype


@dataclass
class Gap:
    """How far two sessions are apart at the worst token: in nats, and in a logit. NaN once either was NaN."""

    nats: float = 0.0
    difference: float = 0.0

    def widen(self, ours: Tensor, known: Tensor) -> Self:
        """Take in the logits [..., V] of one more token."""
        nats, difference = kl_divergence(known, ours).max(), (ours.double() - known.double()).abs().max()
        self.nats = float(torch.maximum(torch.tensor(self.nats), nats.cpu()))  # maximum() keeps NaN, max() may not
        self.difference = float(torch.maximum(torch.tensor(self.difference), difference.cpu()))
        return self


def follow(session: Session, ids: Tensor, known: Session | None = None) -> tuple[Gap, list[list[int]]]:
    """Decode ids [R, T] token by token, beside another session that is fed pieces of them in one go.

    Returns:
        how far the two are apart (nothing where there is no other); and per token [tokens fed here, bytes that the
        session has allocated].
    """
    gap = Gap()
    trace: list[list[int]] = []
    for piece in ids.split(PIECE, dim=1):
        expected = known.decode(piece) if known is not None else None
        for i, token in enumerate(piece.split(1, dim=1)):
            logits = session.decode(token)[:, 0]
            trace.append([len(trace) + 1, session.memory().allocated_bytes])
            if expected is not None:
                gap.widen(logits, expected[:, i])
    return gap, trace


def check_pages(reference: LoadedModel, paged: LoadedModel, prompt: Tensor, rest: Tensor, chunk: int) -> Gap:
    """How far kvpleat's full cache is from DynamicCache, each on a model object of its own.

    Compared at the end of prompt [R, T], fed in chunks of so many tokens, and while `rest` [R, N] is decoded.
    """
    with parse(REFERENCE).open(reference) as known, parse("full").open(paged) as session:
        known.chunk = session.chunk = chunk
        expected = known.prefill(prompt)
        first = session.prefill(prompt)
        return follow(session, rest, known)[0].widen(first, expected)


def verdict(records: Sequence[dict[str, Any]], gap: Gap, dtype: torch.dtype, what: str) -> None:
    """Write a check into these records. Raises JudgeError where it failed."""
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    passed = gap.nats <= tolerance  # never true of NaN
    figures = {"max_difference": gap.difference, "max_nats": gap.nats}
    shown = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    for record in records:
        record["check"] = {"passed": passed, **shown, "tolerance_nats": tolerance, "what": what}
    if not passed:
        raise JudgeError(
            f"{what}: at one token the outputs are {gap.nats:.2g} nats apart (a logit by {gap.difference:.2g}), and "
            f"rounding explains {tolerance:g} in {dtype}. The answers are wrong, so their speed is not given."
        )
