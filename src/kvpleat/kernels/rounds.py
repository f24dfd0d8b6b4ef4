"""Rounds of merging on a GPU, whose numbers of joins are known beforehand: the host launches all, and waits for none.

What is computed is `EncoderMerge.pairs` and `grouping`, in Triton (grouping_triton.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """Rows of tokens, beside what is known of them; see `encoder.tokens.Tokens`.

    Args:
        states: [B, T, C]. sizes, mass: [B, T] float32. free: [B, T] bool. position: [B, T] int64.
        place: [B, S] int64, the token that each column of the input is.
    """

    states: Tensor
    sizes: Tensor
    mass: Tensor
    free: Tensor
    position: Tensor
    place: Tensor


def run(
    tokens: Merged, counts: list[int], free_counts: list[int], joins: list[list[int]], distance: float, compared: int
) -> Merged:
    """Merge round after round.

    Args:
        tokens: as they are; states with channels side by side.
        counts, free_counts: tokens and free tokens of each row.
        joins: of each round, of each row.
        distance: see EncoderMerge.
        compared: first channels of the states that tell how alike tokens are.
    """
    from kvpleat.kernels import grouping_triton as triton

    table = _table(counts, free_counts, joins, tokens.states.device)
    norms = triton.squares(tokens.states, compared)
    index = triton.numbered(tokens.free)
    for number, now in enumerate(joins):
        joining, kept, free = table[number].unbind(0)
        most_free = max(free_counts)
        cost, best = triton.costs(
            tokens.states, norms, tokens.mass, tokens.position, index, free, most_free, distance, compared
        )
        counts = [n - k for n, k in zip(counts, now, strict=True)]
        free_counts = [n - k for n, k in zip(free_counts, now, strict=True)]
        members, towards, leaders, still, index, position, place = triton.choose(
            cost, best, joining, max(now), tokens.free, tokens.sizes, tokens.position, tokens.place, max(counts)
        )
        states, sizes, mass, norms = triton.merge_round(
            tokens.states, tokens.sizes, tokens.mass, leaders, kept, joining, members, towards, compared
        )
        tokens = Merged(states, sizes, mass, still, position, place)
    return tokens


def _table(counts: list[int], free_counts: list[int], joins: list[list[int]], device: torch.device) -> Tensor:
    """[rounds, 3, B] int32: how many join, how many tokens are left then, and free ones before."""
    rounds = []
    for now in joins:
        counts = [n - k for n, k in zip(counts, now, strict=True)]
        rounds.append([now, counts, free_counts])
        free_counts = [n - k for n, k in zip(free_counts, now, strict=True)]
    return sent(rounds, device)


def sent(numbers: list[list[list[int]]], device: torch.device) -> Tensor:
    """int32 numbers on a device, without a wait for what it does now."""
    table = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
