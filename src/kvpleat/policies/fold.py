"""Folding: entries that are not worth a slot of their own share one with their neighbours, at a rate that follows the
score.

Below the entries that stay exact come, in order of score, those that merge 2 to 1, then 4 to 1, then 8 to 1; the rest
leaves.
"""

import torch
from torch import Tensor

RATES = ((2, 0.5), (4, 0.25), (8, 0.25))  # (members per slot, share of the slots for folded entries)
MAX_DISTANCE = 16  # positions a member may lie from the entry it merges into; farther ones leave


def fold(
    rank: Tensor, exact: Tensor, slots: Tensor, scores: Tensor, positions: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups for the entries below the exact ones.

    Args:
        rank: [H, N] rank by score among the unprotected entries, N for others.
        exact: [H] how many of them stay exact.
        slots: [H] slots for folded entries.
        scores: [H, N] attention mass of each entry. positions: [H, N]. log_weights: [H, N].

    Returns:
        keep [H, N]: the entry of each group that the others merge into, its most important one;
        merge_into [H, N] int64: for every entry the one it merges into, or itself;
        log_weights [H, N]: of the kept ones, such that a group keeps its attention mass: the sum over its members of
        weight times score, relative to the score of the entry they merge into, at most the sum of their weights.
    """
    num_entries = rank.shape[1]
    part = torch.zeros_like(scores)  # slots that an entry takes up: 1/2, 1/4, 1/8, or 0 for those that leave
    start = exact
    for members, share in RATES:
        end = start + members * (slots * share).long()
        part = torch.where((rank >= start[:, None]) & (rank < end[:, None]) & (rank < num_entries), 1 / members, part)
        start = end
    member = part > 0
    group = torch.where(member, (part.cumsum(1) - part).long(), num_entries)  # consecutive members fill a slot together
    index = torch.arange(num_entries, device=rank.device).expand_as(group)
    best = torch.full((rank.shape[0], num_entries + 1), -1.0, device=rank.device)
    best.scatter_reduce_(1, group, scores, "amax")
    leads = member & (scores >= best.gather(1, group))
    leader = torch.full((rank.shape[0], num_entries + 1), num_entries, device=rank.device)
    leader.scatter_reduce_(1, group, torch.where(leads, index, num_entries), "amin")
    target = torch.where(member, leader.gather(1, group).clamp(max=num_entries - 1), index)
    near = (positions.gather(1, target) - positions).abs() <= MAX_DISTANCE
    target = torch.where(near, target, index)
    keep = member & (leader.gather(1, group) == index)
    joined = member & (keep.gather(1, target))
    weight = log_weights.exp()
    floor = torch.finfo(torch.float32).tiny
    mass = torch.zeros_like(scores).scatter_add_(1, target, torch.where(joined, weight * scores, 0.0))
    total = torch.zeros_like(scores).scatter_add_(1, target, torch.where(joined, weight, 0.0))
    merged = torch.minimum(mass / scores.clamp(min=floor), total).clamp(min=floor).log()
    return keep, torch.where(joined, target, index), torch.where(keep, merged, log_weights)
