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


Kind = tuple[int, int, int]  # of a row: its tokens, those of them that may merge, and how many are to stay


def run(tokens: Merged, rows: list[Kind], plans: dict[Kind, tuple[int, ...]], distance: float, compared: int) -> Merged:
    """Merge round after round.

    Args:
        tokens: as they are; states with channels side by side.
        rows: of which kind each row is. plans: how many tokens of such a row join in each round.
        distance: see EncoderMerge.
        compared: first channels of the states that tell how alike tokens are.
    """
    from kvpleat.kernels import grouping_triton as triton

    kinds = {kind: i for i, kind in enumerate(plans)}
    amounts = _amounts(plans)  # [kinds, rounds, 3]
    # Not amounts[...]: on a host of many cores that took 4 ms, in which the device had nothing to do.
    kind_of = torch.tensor([kinds[kind] for kind in rows])
    table = sent(amounts.index_select(0, kind_of).permute(1, 2, 0), tokens.states.device)
    norms = triton.squares(tokens.states, compared)
    index = triton.numbered(tokens.free)
    for number, (most, width, most_free) in enumerate(amounts.amax(0).tolist()):
        joins, kept, free = table[number].unbind(0)
        cost, best = triton.costs(
            tokens.states, norms, tokens.mass, tokens.position, index, free, most_free, distance, compared
        )
        members, towards, leaders, still, index, position, place = triton.choose(
            cost, best, joins, most, tokens.free, tokens.sizes, tokens.position, tokens.place, width
        )
        states, sizes, mass, norms = triton.merge_round(
            tokens.states, tokens.sizes, tokens.mass, leaders, kept, joins, members, towards, compared
        )
        tokens = Merged(states, sizes, mass, still, position, place)
    return tokens


def _amounts(plans: dict[Kind, tuple[int, ...]]) -> Tensor:
    """[kinds, rounds, 3] int32: how many join, how many tokens are left then, and free ones before."""
    rounds = max(map(len, plans.values()))
    found: list[list[tuple[int, int, int]]] = []
    for (count, free, _), plan in plans.items():
        found.append([])
        for joins in (*plan, *[0] * (rounds - len(plan))):
            found[-1].append((joins, count - joins, free))
            count, free = count - joins, free - joins
    return torch.tensor(found, dtype=torch.int32)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without a wait for what it does now."""
    dense = numbers.contiguous()
    return (dense.pin_memory() if device.type == "cuda" else dense).to(device, non_blocking=True)
