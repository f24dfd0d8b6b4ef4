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

    On a CPU an indexed sum; with gradients on a GPU, where that would add in another order each time, a product.
    """
    if runs_on_triton(states):
        from kvpleat.kernels import grouping_triton

        return grouping_triton.merge(groups.place, groups.stays.shape[1], _dense(states), sizes)
    summed = _indexed(groups, states, sizes) if states.device.type == "cpu" else _product(groups, states, sizes)
    return summed / total(groups, sizes).clamp(min=1.0)[..., None].to(states.dtype)


def _indexed(groups: Groups, states: Tensor, sizes: Tensor) -> Tensor:
    rows, width = groups.stays.shape
    index = groups.place + torch.arange(rows, device=states.device)[:, None] * width
    weighted = (states * sizes[..., None].to(states.dtype)).flatten(0, 1)
    out = states.new_zeros(rows * width, states.shape[-1]).index_add(0, index.flatten(), weighted)
    return out.view(rows, width, -1)


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
    return torch.where(real[..., None], picked(states, place), 0)


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
