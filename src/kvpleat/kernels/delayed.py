"""Prefill attention where entries leave `delay` tokens after their own, in blocks of queries: no T x T tensor.

A block of B queries reads the entries that stay for good (each KV head its own number of them), and around the block
what each query alone sees: the last `delay` tokens as they were, and the group of the token before those as it was
then.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.kernels.sdpa import QUERY_BLOCK, attend_block


class Seen(NamedTuple):
    """What some new tokens of one row see. Raw tokens and groups both start at position `first`, and n groups are
    known: those of tokens that some query has left `delay` tokens behind.

    past: keys and values [H, N, D] of entries before `first`; holes hold anything finite. past_live: [H, N].
    raw: keys and values [H, M, D] of tokens up to the newest, as they are while they are young.
    groups: keys and values [H, n, D] of each token's group right after it joined; None: the raw ones.
    stays: [H, n] bool, whether that is what stays for good, since the next token does not take it over.
    past_bias, groups_bias: [H, N] and [H, n] float32 log-weights; None: none.
    """

    first: int
    past: tuple[Tensor, Tensor]
    past_live: Tensor
    raw: tuple[Tensor, Tensor]
    groups: tuple[Tensor, Tensor] | None
    stays: Tensor
    past_bias: Tensor | None
    groups_bias: Tensor | None


class _Part(NamedTuple):
    """Some of the entries that a block reads: keys, values [H, N, D]; visible [H or 1, B or 1, N]; bias [H, N]."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    bias: Tensor | None


def attend(q: Tensor, seen: Seen, start: int, delay: int, scale: float, softcap: float | None) -> Tensor:
    """New tokens of one row: q [Q, T, D], the first at position `start` -> [Q, T, D].

    Args:
        seen: keys, values and what becomes of them. delay: tokens. scale, softcap: as in `reference.attend`.
    """
    num_heads, num_new, head_dim = seen.stays.shape[0], q.shape[1], q.shape[2]
    q = q.reshape(num_heads, -1, num_new, head_dim)
    out = torch.empty_like(q)
    past = _Part(*seen.past, seen.past_live[:, None], seen.past_bias)
    keys, values = seen.raw if seen.groups is None else seen.groups
    order = torch.argsort((~seen.stays).to(torch.int8), dim=1, stable=True)
    index = order[..., None].expand(-1, -1, head_dim)
    bias = None if seen.groups_bias is None else seen.groups_bias.gather(1, order)
    kept = _Part(keys.gather(1, index), values.gather(1, index), seen.stays, bias)
    counts = F.pad(seen.stays.cumsum(1), (1, 0))
    places = torch.arange(1, past.keys.shape[1] + 1, device=q.device)
    reach = F.pad(seen.past_live * places, (1, 0)).amax(1)  # behind each head's last entry of the past
    # Heads keep very different numbers. Together each costs what the longest does; one after the other, its own.
    groups = [slice(h, h + 1) for h in range(num_heads)] if q.device.type == "cpu" else [slice(None)]
    for begin in range(0, num_new, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, num_new)
        queries = torch.arange(start + begin, start + end, device=q.device)[:, None] - seen.first
        done = min(max(0, start + begin - delay - seen.first), seen.stays.shape[1])
        around = _around(seen, queries, done, delay)
        for heads in groups:
            parts = [_of_heads(past, heads, int(reach[heads].max())), _first(kept, counts[heads, done], heads)]
            parts += [_of_heads(part, heads) for part in around]
            out[heads, :, begin:end] = _attend_parts(q[heads, :, begin:end], parts, scale, softcap)
    return out.view(-1, num_new, head_dim)


def _first(part: _Part, counts: Tensor, heads: slice) -> _Part:
    """The first counts[h] entries of some heads, which every query sees: counts [h]."""
    longest = int(counts.max())
    live = torch.arange(longest, device=counts.device) < counts[:, None]
    bias = None if part.bias is None else part.bias[heads, :longest]
    return _Part(part.keys[heads, :longest], part.values[heads, :longest], live[:, None], bias)


def _of_heads(part: _Part, heads: slice, stop: int | None = None) -> _Part:
    """The first `stop` entries of some heads."""
    visible = (part.visible if part.visible.shape[0] == 1 else part.visible[heads])[..., :stop]
    bias = None if part.bias is None else part.bias[heads, :stop]
    return _Part(part.keys[heads, :stop], part.values[heads, :stop], visible, bias)


def _around(seen: Seen, queries: Tensor, done: int, delay: int) -> list[_Part]:
    """Groups from number `done` on and raw tokens, as far as some query sees them. queries: [B, 1], counted from
    `seen.first`."""
    first, last = int(queries[0]), int(queries[-1])
    oldest = max(0, first - delay + 1) if seen.groups is not None else done
    index = torch.arange(oldest, last + 1 if delay or seen.groups is None else oldest, device=queries.device)
    age = queries - index
    keys, values = (x[:, oldest : oldest + index.numel()] for x in seen.raw)
    if seen.groups is None:
        stays = F.pad(seen.stays, (0, seen.raw[0].shape[1] - seen.stays.shape[1]))[:, None, oldest : last + 1]
        return [_Part(keys, values, (age >= 0) & ((age <= delay) | stays), None)]
    raw = _Part(keys, values, ((age >= 0) & (age < delay))[None], None)
    until = min(max(0, last + 1 - delay), seen.stays.shape[1])
    age = queries - torch.arange(done, until, device=queries.device)
    visible = (age == delay) | ((age > delay) & seen.stays[:, None, done:until])
    bias = None if seen.groups_bias is None else seen.groups_bias[:, done:until]
    return [_Part(seen.groups[0][:, done:until], seen.groups[1][:, done:until], visible, bias), raw]


def _attend_parts(q: Tensor, parts: list[_Part], scale: float, softcap: float | None) -> Tensor:
    """q [H, G, B, D] over all parts: [H, G, B, D]."""
    num_heads, size = q.shape[0], q.shape[2]
    keys, values = (torch.cat(x, dim=1) for x in ([p.keys for p in parts], [p.values for p in parts]))
    visible = torch.cat([part.visible.expand(num_heads, size, -1) for part in parts], dim=-1)
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([_bias(part) for part in parts], dim=1)
    return attend_block(q, keys, values, bias, visible, scale, softcap)


def _bias(part: _Part) -> Tensor:
    return torch.zeros(part.keys.shape[:2], device=part.keys.device) if part.bias is None else part.bias
