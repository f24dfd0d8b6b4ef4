"""The tokens of a batch on their way through an encoder, and how they become fewer: round after round of pairs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpleat.kernels import grouping, rounds
from kvpleat.kernels.grouping import Groups, group, merge, taken, total
from kvpleat.policies.encoder import EncoderMerge, Row, schedule

WIDTH_STEP = 8  # on a GPU rows are padded to a multiple of this, as fast attention kernels want their masks


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of a batch, beside their states.

    Args:
        sizes: [B, T] float, tokens of the text that each one stands for; 0 for padding.
        mass: [B, T] importance, of a merged token the sum over its members.
        free: [B, T] bool, may merge: neither special nor padding.
        position: [B, T] int64, column of the input where the token (of a merged one: the one that stays) stood.
        counts, free_counts: tokens and free tokens of each row.
        budget: [B] importance that each row may still lose, for coverage; else None.
        plain: nothing has merged so far.
    """

    sizes: Tensor
    mass: Tensor
    free: Tensor
    position: Tensor
    counts: list[int]
    free_counts: list[int]
    budget: Tensor | None = None
    plain: bool = True

    @property
    def real(self) -> Tensor:
        """[B, T] bool, no padding."""
        return self.sizes > 0

    @property
    def bias_needed(self) -> bool:
        """Whether any key's bias is not zero."""
        return not self.plain or min(self.counts) < self.sizes.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """[B, 1, 1, T] what is added to attention's logits of each key: log size, and the lowest number for padding;
        None for zeros."""
        if not self.bias_needed:
            return None
        lowest = torch.finfo(self.sizes.dtype).min  # finite: a row of nothing but padding must not become NaN
        return self.sizes.clamp(min=1.0).log().masked_fill(~self.real, lowest)[:, None, None]


def shorten(
    tokens: Tokens, states: Tensor, policy: EncoderMerge, kept: list[int], compared: int | None = None
) -> tuple[Tokens, Tensor, Tensor]:
    """Merge until each row is as short as asked, or for coverage as short as it may be.

    Args:
        tokens: as they are.
        states: [B, T, C] their states.
        policy: decides who joins whom.
        kept: tokens that each row is to keep; rows with too few free tokens keep more.
        compared: first channels of the states that tell how alike tokens are; None: all.

    Returns:
        the tokens as they are then, their states [B, W, C], and [B, T] the place of each token among them.
    """
    if policy.coverage is None and grouping.runs_on_triton(states):
        return _on_device(tokens, states, policy, kept, compared)
    rows, width = tokens.sizes.shape
    place = torch.arange(width, device=states.device).expand(rows, width)
    while True:
        wanted = [max(0, count - keep) for count, keep in zip(tokens.counts, kept, strict=True)]
        row = Row(
            states.detach()[..., :compared],
            tokens.mass,
            tokens.free,
            tokens.position,
            tokens.free_counts,
            tokens.budget,
        )
        with torch.no_grad():
            target, joined, lost = policy.pairs(row, wanted)
        if max(joined) == 0:
            return tokens, states, place
        counts = [count - joins for count, joins in zip(tokens.counts, joined, strict=True)]
        groups = group(target, tokens.real, _padded(max(counts), states.device))
        states = merge(groups, states, tokens.sizes)
        tokens = _fewer(tokens, groups, counts, joined, lost)
        place = groups.place.gather(1, place)


@torch.no_grad()
def _on_device(
    tokens: Tokens, states: Tensor, policy: EncoderMerge, kept: list[int], compared: int | None
) -> tuple[Tokens, Tensor, Tensor]:
    """`shorten` where numbers of joins follow from lengths, and nothing is learned."""
    place = torch.arange(states.shape[1], device=states.device).repeat(states.shape[0], 1)
    rows = list(zip(tokens.counts, tokens.free_counts, kept, strict=True))
    plans = {row: schedule(*row) for row in rows}  # rows of one length share theirs
    if not any(plans.values()):
        return tokens, states, place
    sizes, mass, free, position = (x.contiguous() for x in (tokens.sizes, tokens.mass, tokens.free, tokens.position))
    before = rounds.Merged(states.contiguous(), sizes, mass, free, position, place)
    merged = rounds.run(before, rows, plans, policy.distance, compared or states.shape[2])
    joined = {row: sum(plan) for row, plan in plans.items()}
    fewer = replace(
        tokens,
        sizes=merged.sizes,
        mass=merged.mass,
        free=merged.free,
        position=merged.position,
        counts=[row[0] - joined[row] for row in rows],
        free_counts=[row[1] - joined[row] for row in rows],
        plain=False,
    )
    return fewer, merged.states, merged.place


def _fewer(tokens: Tokens, groups: Groups, counts: list[int], joined: list[int], lost: Tensor | None) -> Tokens:
    budget = tokens.budget
    return replace(
        tokens,
        sizes=total(groups, tokens.sizes),
        mass=total(groups, tokens.mass),
        free=taken(groups, tokens.free) & groups.real,
        position=taken(groups, tokens.position),
        counts=counts,
        free_counts=[count - joins for count, joins in zip(tokens.free_counts, joined, strict=True)],
        budget=None if budget is None or lost is None else budget - lost,
        plain=False,
    )


def _padded(width: int, device: torch.device) -> int:
    return width if device.type == "cpu" else -(-width // WIDTH_STEP) * WIDTH_STEP
