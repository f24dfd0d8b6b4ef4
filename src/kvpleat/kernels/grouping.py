"""Groups of tokens that share one state: the maps that merge a row of tokens and undo it, order kept.

A row of T tokens is cut into groups; each has one token that stays, and stands where that token stood. `place` says
for every token the group it is in. A merged state is the mean of its members' states, weighted by their sizes (tokens
of the text that a state stands for; 0 for padding), so a mean over the text is the same before and after.

In torch this is the specification. On a GPU Triton kernels take over (grouping_triton.py), where `runs_on_triton` says.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # wheels of torch for some systems come without
MAX_TOKENS = 16384  # of a row: one program holds all of them
MAX_CHANNELS = 8192


def runs_on_triton(states: Tensor) -> bool:
    """On a GPU, where Triton is installed and nothing is learned: the kernels have no gradient."""
    learned = torch.is_grad_enabled() and states.requires_grad
    return states.device.type == "cuda" and HAS_TRITON and not learned and _fits(states)


def _fits(states: Tensor) -> bool:
    tokens, channels = states.shape[1:]
    return states.dtype != torch.float64 and 0 < tokens <= MAX_TOKENS and 0 < channels <= MAX_CHANNELS


@dataclass(frozen=True)
class Groups:
    """How T tokens of each row become W.

    Args:
        place: [B, T] int64, the group of each token; of padding: 0, with size 0.
        stays: [B, W] int64, the token that stands for each group, one of it; of groups beyond a row's own: 0.
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
    counts = stays.sum(1, keepdim=True)
    return Groups(place, one_of_each(order, stays, width), torch.arange(width, device=target.device) < counts)


def one_of_each(place: Tensor, real: Tensor, width: int) -> Tensor:
    """[B, W] a token of each group, 0 where there is none: place [B, T] of tokens, of which real [B, T] count."""
    index = torch.arange(place.shape[1], device=place.device).expand_as(place)
    found = torch.zeros(place.shape[0], width + 1, dtype=torch.int64, device=place.device)
    return found.scatter_(1, torch.where(real, place, width), index)[:, :width]


def total(groups: Groups, values: Tensor) -> Tensor:
    """[B, T] -> [B, W]: the sum of each group's values; padding must be 0."""
    rows, width = groups.stays.shape
    return values.new_zeros(rows * width).index_add_(0, _flat(groups), values.flatten()).view(rows, width)


def merge(groups: Groups, states: Tensor, sizes: Tensor) -> Tensor:
    """[B, T, C] -> [B, W, C]: the mean of each group's states, weighted by sizes [B, T].

    On a CPU an indexed sum; with gradients on a GPU, where that would add in another order each time, a product.
    """
    if runs_on_triton(states):
        from kvpleat.kernels import grouping_triton

        return grouping_triton.merge(groups.place, groups.stays.shape[1], _dense(states), sizes)
    summed = _indexed(groups, states, sizes) if states.device.type == "cpu" else _product(groups, states, sizes)
    return summed.div_(total(groups, sizes).clamp_(min=1.0)[..., None].to(states.dtype))


def _flat(groups: Groups) -> Tensor:
    """[B * T] the group of each token among those of all rows."""
    rows, width = groups.stays.shape
    return (groups.place + torch.arange(rows, device=groups.place.device)[:, None] * width).flatten()


def _indexed(groups: Groups, states: Tensor, sizes: Tensor) -> Tensor:
    """[B, W, C] sums: the states that stay, and to them those that join, which are few. In place, as fresh memory is
    what takes time here."""
    own = torch.where(groups.real, sizes.gather(1, groups.stays), 0).to(states.dtype)
    out = picked(states, groups.stays).mul_(own[..., None]).flatten(0, 1)
    column = torch.arange(states.shape[1], device=states.device)
    joins = ((groups.stays.gather(1, groups.place) != column) & (sizes > 0)).flatten().nonzero()[:, 0]
    joined = states.flatten(0, 1).index_select(0, joins).mul_(sizes.flatten()[joins, None].to(states.dtype))
    return out.index_add_(0, _flat(groups)[joins], joined).view(*groups.stays.shape, -1)


def _product(groups: Groups, states: Tensor, sizes: Tensor) -> Tensor:
    rows, tokens, _ = states.shape
    sums = states.new_zeros(rows, groups.stays.shape[1], tokens)
    return sums.scatter_(1, groups.place[:, None], sizes[:, None].to(states.dtype)) @ states


def unmerge(place: Tensor, real: Tensor, states: Tensor) -> Tensor:
    """[B, W, C] -> [B, T, C]: each token has its group's state; padding is 0.

    Args:
        place: [B, T] int64 group of each token. real: [B, T] bool, no padding.
    """
    if runs_on_triton(states):
        from kvpleat.kernels import grouping_triton

        return grouping_triton.unmerge(place, real, states)
    return picked(states, place).masked_fill_(~real[..., None], 0)


def squares(states: Tensor) -> Tensor:
    """[B, T, C] -> [B, T] in float32 or wider: squared norms."""
    if runs_on_triton(states):
        from kvpleat.kernels import grouping_triton

        return grouping_triton.squares(_dense(states), states.shape[2])
    wide = torch.promote_types(states.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(states, dim=-1, dtype=wide)
    return norms.square()


def _dense(states: Tensor) -> Tensor:
    """With channels side by side."""
    return states if states.stride(-1) == 1 else states.contiguous()


def picked(states: Tensor, index: Tensor) -> Tensor:
    """[B, T, C] at [B, A] -> [B, A, C]: whole rows are copied, ten times as fast as `gather` on a CPU."""
    rows, tokens, channels = states.shape
    flat = index + torch.arange(rows, device=index.device)[:, None] * tokens
    return states.flatten(0, 1).index_select(0, flat.flatten()).view(rows, index.shape[1], channels)


def taken(groups: Groups, values: Tensor) -> Tensor:
    """[B, T] -> [B, W]: of each group the value of the token that stays."""
    return values.gather(1, groups.stays)
