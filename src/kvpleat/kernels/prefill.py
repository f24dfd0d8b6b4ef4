"""Prefill attention over the paged cache: chunks of several rows in one call, each query over what its row's pages hold
and over its chunk under the policy's own mask. Here are the interface and the specification in plain torch; on a GPU a
Triton kernel computes the same (prefill_triton.py).

Shapes beside those of kvpleat.types: T counts the new tokens of all rows, one row after the other, and M the tokens of
which keys are passed: for each row those that are still young as its chunk starts, then its new ones.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.kernels import reference

QUERY_BLOCK = 64  # of the plain version: float32 logits of a block and all that it may see are in memory at once
MAX_HEAD_DIM = 256


class Rows(NamedTuple):
    """Where rows lie: new, keys: [R + 1] int32, the first of each row's T new tokens and the first of its M keys, and
    what follows the last row. A row without new tokens is idle. Queries are the last tokens of their row's keys."""

    new: Tensor
    keys: Tensor


class Past(NamedTuple):
    """What pages hold of the rows, from before the keys that are passed: what stays for good.

    keys, values: [P, S, D], the pool. page_table: [R, H, pages] int32. lengths: [R, H] int32, entries of each stream.
    log_weight: [P, S] float32, added to logits; None: 0. position: [P, S] int32, needed under `Recent`.
    """

    keys: Tensor
    values: Tensor
    page_table: Tensor
    lengths: Tensor
    log_weight: Tensor | None = None
    position: Tensor | None = None


class Recent(NamedTuple):
    """Each query sees the first tokens of its row, and those from some position on.

    starts: [T] int32, that position for each new token. first: [R] int32, position of each row's first key.
    num_sinks: first tokens that are always seen.
    """

    starts: Tensor
    first: Tensor
    num_sinks: int


class Leaving(NamedTuple):
    """Entries leave `delay` tokens after their own, as in `kernels.delayed`.

    stays: [H, M] bool, whether the next token leaves a token's entry where it is; False for the last `delay` tokens of
    a row, about which nothing is decided yet. groups: keys and values [H, M, D] of each token's group right after it
    joined, never read for the last `delay` tokens of a row (so a single row's may be shorter); None: nothing merges.
    log_size: [H, M] float32 added to the logits of groups; None: 0.
    """

    delay: int
    stays: Tensor
    groups: tuple[Tensor, Tensor] | None = None
    log_size: Tensor | None = None


Rule = Recent | Leaving | None


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    past: Past | None,
    rule: Rule,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the new tokens of several rows.

    Args:
        q: [Q, T, D] rotated queries.
        keys, values: [H, M, D] of tokens as they are while they are young, rotated.
        rows: where each row's tokens lie. past: what pages hold; None: nothing.
        rule: what a query sees of the keys; None: all up to its own. Of the past it sees all, under `Recent` what it
            reaches.
        scale: factor on q.k, positive. softcap: as in `reference.attend`.

    Returns:
        [Q, T, D] in q's dtype; zeros for a query that sees nothing. Tokens behind the last row are left undefined.

    Raises:
        OptionError: arguments that do not fit together. UnsupportedError: more than 256 channels.
    """
    _check(q, keys, values, past, rule, scale)
    if q.device.type == "cuda":
        from kvpleat.kernels import prefill_triton

        return prefill_triton.attend(q, keys, values, rows, past, rule, scale, softcap)
    return attend_plain(q, keys, values, rows, past, rule, scale, softcap)


def attend_plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    past: Past | None,
    rule: Rule,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The specification: as `attend`, row by row in blocks of queries. Reads sizes on the host."""
    grouped = q.unflatten(0, (keys.shape[0], -1))
    out = torch.zeros_like(grouped)
    new, seen = rows.new.tolist(), rows.keys.tolist()
    for row in range(len(new) - 1):
        of_row = slice(seen[row], seen[row + 1])
        young = seen[row + 1] - seen[row] - (new[row + 1] - new[row])  # keys before the first query's
        for begin in range(new[row], new[row + 1], QUERY_BLOCK):
            block = slice(begin, min(begin + QUERY_BLOCK, new[row + 1]))
            places = torch.arange(block.start, block.stop, device=q.device) - new[row] + young
            parts = [*_past_parts(past, rule, row, block), *_new_parts(keys, values, of_row, rule, row, block, places)]
            out[:, :, block] = _attend_parts(grouped[:, :, block], parts, scale, softcap)
    return out.flatten(0, 1)


class _Part(NamedTuple):
    """Some of the entries that a block reads: keys, values [H, n, D]; visible [H or 1, B or 1, n]; bias [H, n]."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    bias: Tensor | None = None


def _past_parts(past: Past | None, rule: Rule, row: int, block: slice) -> Iterator[_Part]:
    """What the pages of one row hold."""
    if past is None:
        return
    size, lengths = past.keys.shape[1], past.lengths[row]
    index = torch.arange(int(lengths.max()), device=lengths.device)
    live = index < lengths[:, None]
    pages = past.page_table[row].long()[:, index // size].masked_fill(~live, 0)
    slots = torch.where(live, pages * size + index % size, 0)
    visible = live[:, None]
    if isinstance(rule, Recent):
        assert past.position is not None
        position = past.position.flatten()[slots][:, None]
        visible = visible & ((position >= rule.starts[block, None]) | (position < rule.num_sinks))
    bias = None if past.log_weight is None else past.log_weight.flatten()[slots].masked_fill(~live, 0.0)
    yield _Part(past.keys.flatten(0, 1)[slots], past.values.flatten(0, 1)[slots], visible, bias)


def _new_parts(
    keys: Tensor, values: Tensor, of_row: slice, rule: Rule, row: int, block: slice, places: Tensor
) -> Iterator[_Part]:
    """What queries at `places` [B] among their row's keys see of these."""
    index = torch.arange(of_row.stop - of_row.start, device=keys.device)
    age = (places[:, None] - index)[None]
    visible = age >= 0
    if isinstance(rule, Recent):
        position = rule.first[row] + index
        visible = visible & ((position >= rule.starts[block, None]) | (position < rule.num_sinks))
    if isinstance(rule, Leaving) and rule.groups is None:
        visible = visible & ((age <= rule.delay) | rule.stays[:, None, of_row])
    if isinstance(rule, Leaving) and rule.groups is not None:
        visible = visible & (age < rule.delay)
        old = slice(of_row.start, max(of_row.start, of_row.stop - rule.delay))
        age = age[:, :, : old.stop - old.start]
        formed = (age == rule.delay) | ((age > rule.delay) & rule.stays[:, None, old])
        bias = None if rule.log_size is None else rule.log_size[:, old]
        yield _Part(rule.groups[0][:, old], rule.groups[1][:, old], formed, bias)
    yield _Part(keys[:, of_row], values[:, of_row], visible)


def _attend_parts(q: Tensor, parts: list[_Part], scale: float, softcap: float | None) -> Tensor:
    """q [H, G, B, D] over all parts: [H, G, B, D]."""
    num_heads, size = q.shape[0], q.shape[2]
    keys, values = torch.cat([part.keys for part in parts], 1), torch.cat([part.values for part in parts], 1)
    visible = torch.cat([part.visible.expand(num_heads, size, -1) for part in parts], -1)
    biases = [keys.new_zeros(p.keys.shape[:2], dtype=torch.float32) if p.bias is None else p.bias for p in parts]
    return reference.attend(q, keys, values, torch.cat(biases, 1), visible, scale, softcap)


def _check(q: Tensor, keys: Tensor, values: Tensor, past: Past | None, rule: Rule, scale: float) -> None:
    """Refuse what would be computed wrongly or not at all."""
    head_dim, groups = q.shape[-1], rule.groups if isinstance(rule, Leaving) else None
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"Heads of {head_dim} channels: a block of queries would not fit into a GPU's registers beyond "
            f"{MAX_HEAD_DIM}. Attach with a policy for layers of smaller heads, or leave these layers out."
        )
    if q.shape[0] % keys.shape[0]:
        raise OptionError(
            f"{q.shape[0]} query heads do not divide into groups over {keys.shape[0]} KV heads. Pass q as [Q, T, D], "
            "keys as [H, M, D]."
        )
    entries = (keys, values, *(() if past is None else (past.keys, past.values)), *(groups or ()))
    if any(x.dtype != q.dtype or x.shape[-1] != head_dim for x in entries):
        kinds = sorted({f"{x.dtype} x {x.shape[-1]}" for x in (q, *entries)})
        raise OptionError(
            f"Queries, keys and values of different kinds ({', '.join(kinds)}): products of them are not what a model "
            "computes. Pass all in one dtype with the same channels."
        )
    if scale <= 0:
        raise OptionError(
            f"scale={scale}: the largest logit is found before scaling, which needs a positive factor. Move the sign "
            "into the queries."
        )
    if isinstance(rule, Recent) and past is not None and past.position is None:
        raise OptionError("A window cuts the past by position, and this past has none. Pass its `position` array.")
    if isinstance(rule, Leaving) and rule.stays.shape != keys.shape[:2]:
        raise OptionError(
            f"stays has the shape {tuple(rule.stays.shape)} for keys of {tuple(keys.shape[:2])}: which entries leave "
            "would be read from beside it. Pass one bool for each key, False for the last `delay` tokens of a row."
        )
