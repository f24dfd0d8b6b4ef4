"""Groups of tokens that share one state: the maps that merge a row of tokens and undo it, order kept.

A row of T tokens is cut into groups; each has one token that stays, and stands where that token stood. `place` says
for every token the group it is in. A merged state is the mean of its members' states, weighted by their sizes (tokens
of the text that a state stands for; 0 for padding), so a mean over the text is the same before and after.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How T tokens of each row become W.

    Args:
        place: [B, T] int64, the group of each token; of padding: 0, with size 0.
        stays: [B, W] int64, the token that stands for each group; of groups beyond a row's own: 0.
        real: [B, W] bool, which groups a row has; they come first.
    """

    place: Tensor
    stays: Tensor
    real: Tensor


def group(target: Tensor, real: Tensor, width: int) -> Groups:
    """The groups in which each token joins the one it names.

    Args:
        target: [B, T] int64, the token that each one merges into, which stays; itself for those that stay.
        real: [B, T] bool, no padding.
        width: W, at least the number of tokens that stay in any row.
    """
    rows, tokens = target.shape
    index = torch.arange(tokens, device=target.device).expand(rows, tokens)
    stays = real & (target == index)
    order = stays.cumsum(1) - 1
    place = torch.where(real, order.gather(1, target), 0)
    slot = torch.where(stays, order, width)
    first = torch.zeros(rows, width + 1, dtype=torch.int64, device=target.device).scatter_(1, slot, index)
    counts = stays.sum(1, keepdim=True)
    return Groups(place, first[:, :width], torch.arange(width, device=target.device) < counts)


def total(groups: Groups, values: Tensor) -> Tensor:
    """[B, T] -> [B, W]: the sum of each group's values; padding must be 0."""
    out = values.new_zeros(groups.stays.shape)
    return out.scatter_add_(1, groups.place, values)


def merge(groups: Groups, states: Tensor, sizes: Tensor) -> Tensor:
    """[B, T, C] -> [B, W, C]: the mean of each group's states, weighted by sizes [B, T].

    A product with a sparse 0-1 matrix rather than an indexed sum: the same bits every time on a GPU, and forward and
    backward cost less than a hundredth of a layer.
    """
    rows, tokens, _ = states.shape
    sums = states.new_zeros(rows, groups.stays.shape[1], tokens)
    sums.scatter_(1, groups.place[:, None], sizes[:, None].to(states.dtype))
    size = total(groups, sizes).clamp(min=1.0)[..., None]
    return (sums @ states) / size.to(states.dtype)


def unmerge(place: Tensor, real: Tensor, states: Tensor) -> Tensor:
    """[B, W, C] -> [B, T, C]: each token has its group's state; padding is 0.

    Args:
        place: [B, T] int64 group of each token. real: [B, T] bool, no padding.
    """
    out = states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))
    return torch.where(real[..., None], out, 0)


def taken(groups: Groups, values: Tensor) -> Tensor:
    """[B, T, ...] -> [B, W, ...]: of each group the value of the token that stays."""
    index = groups.stays.view(*groups.stays.shape, *(1 for _ in values.shape[2:]))
    return values.gather(1, index.expand(*groups.stays.shape, *values.shape[2:]))
