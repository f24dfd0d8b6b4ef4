"""`prefill.attend` in Triton: what is launched. One kernel (prefill_kernels_triton.py), one online softmax
(FlashAttention-2's scheme, arXiv 2307.08691) over two kinds of entries.

Whole to every query of a block: the past in its pages, and those entries of the chunk that stay for good and are older
than the block's delay window. The latter are packed once per chunk, each head its own number of them, so that a block
pays for what is kept. Around the block: a band of keys under masks. The query heads of a KV head share a block
(`Blocks.members`), so that a block spans fewer tokens and its band is short.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvpleat.kernels import prefill_kernels_triton as kernels
from kvpleat.kernels.prefill import Leaving, Past, Recent, Rows, Rule

FEW_ROWS = 64  # what a kernel is compiled for, unless there are more: compiling takes seconds
COUNTED = 4096  # flags that are read at a time where entries are counted
MOST_MEMBERS = 16  # beyond it query heads of a group go one by one: a block would hold too few tokens


class Blocks(NamedTuple):
    """How the work is cut: rows of a block of queries, entries of a step, the same in the band, query heads that share
    a block (a divisor of those of a KV head), and launch options."""

    queries: int
    entries: int
    band: int
    members: int
    warps: int
    stages: int


class Packed(NamedTuple):
    """What stays: keys, values [H, M, D], each head's entries without holes, undefined behind them. kept: [H, M] int32
    how many of a head's entries up to each stay. log_size: [H, M] or None."""

    keys: Tensor
    values: Tensor
    kept: Tensor
    log_size: Tensor | None


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    past: Past | None,
    rule: Rule,
    scale: float,
    softcap: float | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """`prefill.attend`; arguments as there. blocks: None for those that were fastest."""
    (num_heads, num_keys, head_dim), num_rows = keys.shape, rows.new.shape[0] - 1
    q, (keys, values) = _unit_channels(q), _alike(keys, values)
    group_size = q.shape[0] // num_heads
    cut = choose_blocks(group_size, head_dim, q.dtype, q.device) if blocks is None else blocks
    out = torch.empty(q.shape[1], q.shape[0], head_dim, dtype=q.dtype, device=q.device).transpose(0, 1)
    most = q.shape[1] // (cut.queries // cut.members) + num_rows  # blocks there can be, whatever the rows' lengths are
    room = max(FEW_ROWS, int(triton.next_power_of_2(num_rows)))
    factor = scale * kernels.LOG2_E.value
    kernels.forward[(most * (q.shape[0] // cut.members),)](
        q=q, keys=keys, values=values, new=rows.new, seen=rows.keys, out=out, num_rows=num_rows, num_keys=num_keys,
        factor=factor if softcap is None else 2 * factor / softcap,
        cap=0.0 if softcap is None else softcap * kernels.LOG2_E.value,
        q_head=q.stride(0), q_token=q.stride(1), key_head=keys.stride(0), key_token=keys.stride(1),
        out_head=out.stride(0), out_token=out.stride(1), Q=q.shape[0], G=group_size, MEMBERS=cut.members, D=head_dim,
        DP=_padded(head_dim), M=cut.queries, N=cut.entries, BAND=cut.band, ROWS=room,
        CAPPED=softcap is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=cut.warps,
        num_stages=cut.stages, **_of_rule(rule, keys, values), **_of_past(past))  # fmt: skip
    return out


def _of_rule(rule: Rule, keys: Tensor, values: Tensor) -> dict[str, Any]:
    """What `forward` needs to know of a rule, with the entries that stay packed."""
    known: dict[str, Any] = dict.fromkeys(("log_size", "stays", "kept", "packed_size", "starts", "first"))
    known |= dict.fromkeys(("group_keys", "group_values", "packed_keys", "packed_values"))
    known |= dict.fromkeys(("LEAVES", "POOLED", "YOUNG", "WINDOW", "SIZED"), False)
    known |= dict.fromkeys(("delay", "num_sinks", "group_head", "group_token"), 0)
    if isinstance(rule, Recent):
        known |= rule._asdict() | {"WINDOW": True}
    if isinstance(rule, Leaving):
        pooled, sized = rule.groups is not None, rule.log_size is not None
        keys, values = (keys, values) if rule.groups is None else _alike(*rule.groups)
        packed = pack_kept(keys, values, rule.stays, rule.log_size)
        known |= {"LEAVES": True, "POOLED": pooled, "SIZED": sized, "YOUNG": rule.delay > 0}
        known |= {"delay": rule.delay, "stays": _bytes(rule.stays)}
        known |= {"group_keys": keys, "group_values": values, "kept": packed.kept}
        known |= {"group_head": keys.stride(0), "group_token": keys.stride(1)}
        known |= {"packed_keys": packed.keys, "packed_values": packed.values}
        unread = packed.kept  # in the place of sizes that nothing has
        known["log_size"] = unread if rule.log_size is None else rule.log_size.contiguous()
        known["packed_size"] = unread if packed.log_size is None else packed.log_size
    return known


def _of_past(past: Past | None) -> dict[str, Any]:
    """What `forward` needs to know of the past."""
    known: dict[str, Any] = dict.fromkeys(("past_keys", "past_values", "log_weight", "position"))
    known |= dict.fromkeys(("table", "lengths"))
    known |= dict.fromkeys(("table_row", "table_head", "length_row", "length_head"), 0)
    if past is None:
        return known | {"PAST": False, "WEIGHED": False, "S": 1}
    assert all(x.is_contiguous() for x in (past.keys, past.values)), "the pool is one piece of memory"
    table, lengths = _unit_channels(past.page_table), past.lengths
    known |= {"past_keys": past.keys, "past_values": past.values, "table": table, "lengths": lengths}
    known |= {"log_weight": past.log_weight, "position": past.position, "WEIGHED": past.log_weight is not None}
    known |= {"table_row": table.stride(0), "table_head": table.stride(1)}
    known |= {"length_row": lengths.stride(0), "length_head": lengths.stride(1)}
    return known | {"PAST": True, "S": past.keys.shape[1]}


def pack_kept(keys: Tensor, values: Tensor, stays: Tensor, log_size: Tensor | None) -> Packed:
    """The entries that stay, without holes: keys, values [H, M, D] (or fewer of them where the rest does not stay),
    stays [H, M] bool."""
    keys, values = _alike(keys, values)
    (num_heads, num_keys), head_dim = stays.shape, keys.shape[-1]
    flags, kept = _bytes(stays), torch.empty(stays.shape, dtype=torch.int32, device=stays.device)
    kernels.count[(num_heads,)](flags, kept, num_keys, COUNTED, num_warps=8)
    out_keys, out_values = (keys.new_empty(num_heads, num_keys, head_dim) for _ in range(2))
    log_size = None if log_size is None else log_size.contiguous()
    out_size = None if log_size is None else torch.empty_like(log_size)
    size = 64 if head_dim <= 128 else 32
    kernels.pack[triton.cdiv(num_keys, size), num_heads](
        keys, values, log_size, flags, kept, out_keys, out_values, out_size, num_keys, *keys.stride()[:2],
        head_dim, _padded(head_dim), size, log_size is not None)  # fmt: skip
    return Packed(out_keys, out_values, kept, out_size)


def choose_blocks(group_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """What is launched for heads of `head_dim` channels, `group_size` query heads to a KV head."""
    members = group_size if group_size <= MOST_MEMBERS else 1
    if dtype == torch.float32:
        size = 32 if head_dim <= 128 else 16
        return Blocks(32, size, size, members, 4, 1)
    hopper = device.type == "cuda" and _capability(device) == 9
    if head_dim <= 64:
        return Blocks(128, 64, 32, members, 8, 3) if hopper else Blocks(64, 64, 32, members, 4, 3)
    if head_dim <= 128:  # on Hopper two fit on a multiprocessor: one multiplies while the other does its softmax
        return Blocks(64, 64, 32, members, 4, 3) if hopper else Blocks(64, 32, 32, members, 4, 3)
    return Blocks(64, 32, 32, members, 4, 2) if hopper else Blocks(32, 32, 32, members, 4, 2)


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _padded(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def _unit_channels(x: Tensor) -> Tensor:
    """The same with the numbers of the last dimension side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(*pair: Tensor) -> Any:
    """Keys and values with the same strides."""
    keys, values = (_unit_channels(x) for x in pair)
    return (keys, values) if keys.stride() == values.stride() else (keys.contiguous(), values.contiguous())


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)
