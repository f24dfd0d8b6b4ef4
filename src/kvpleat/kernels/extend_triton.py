"""`kernels.extend` in Triton: what is launched. The kernels are in extend_kernels_triton.py.

Every launch follows from sizes alone. Tensors of a pool are laid out as `new_pool` made them; keys and values of new
tokens may be views with any strides over heads and tokens.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kvpleat.kernels import extend_kernels_triton as kernels
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.kernels.extend import Chunks, Seen, past_of
from kvpleat.kernels.prefill import Leaving, Past
from kvpleat.types import Marks

COPIED = 32  # tokens that one program appends
SETTLED, MERGED = 32, 16  # keys of a program that writes them, where none merge and where they do
MOVED = 32  # entries that one program moves at a time
COUNTED = 1024  # keys whose marks one program looks at, at a time
LEAVE_WARPS, SETTLE_WARPS, MERGE_WARPS = 4, 4, 4  # of wide heads twice as many


def append(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor) -> Past:
    """`extend.append`; arguments as there."""
    _, layers, heads, limit = pool.page_table.shape
    keys, values = _readable(keys), _readable(values)
    lengths = pool.lengths[:, layer].index_select(0, chunks.seats)
    size = chunks.seats.shape[0]
    arrays = (pool.arrays.get(name) for name in ("key", "value", "position", "log_weight", "score"))
    kernels.append[keys.shape[1] // COPIED + size, heads](
        *arrays, pool.page_table, pool.lengths, pool.failed, keys, values, chunks.seats, chunks.starts,
        chunks.rows.new, lengths, layer, layers, limit, size, *keys.stride()[:2], *values.stride()[:2], H=heads,
        S=pool.shape.page_size, D=pool.shape.head_dim, CHANNELS=_channels(pool), B=COPIED, ROWS=_rows(size),
        num_warps=4)  # fmt: skip
    return past_of(pool, layer, chunks, lengths)


def extend(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor, said: Marks | Tensor) -> Seen:
    """`extend.extend`; arguments as there."""
    ring, delay, shape = pool.ring, pool.delay, pool.shape
    assert ring is not None
    assert delay is not None
    _, layers, heads, limit = pool.page_table.shape
    keys, values = _readable(keys), _readable(values)
    size, num_new, num_keys, device = chunks.seats.shape[0], keys.shape[1], chunks.num_keys, keys.device
    known, width = (0, 0) if ring.members is None else (ring.members.shape[-2], ring.members.stride(-2))
    lanes = _power(delay.tokens + 1)

    def floats(*shape: int) -> Tensor | None:
        return torch.empty(shape, device=device) if delay.merges else None

    raw_keys, raw_values = (keys.new_empty(heads, num_keys, shape.head_dim) for _ in range(2))
    stays = torch.zeros(heads, num_keys, dtype=torch.uint8, device=device)
    places, lengths = _ints(device, heads, num_keys), _ints(device, size, heads)
    carries, log_size = floats(heads, num_keys), floats(heads, num_keys) if delay.log_size else None
    shares = floats(heads, num_keys) if delay.weighs else carries  # these are unread
    before, before_carry = floats(size, heads, known * width), floats(size, heads, known)
    log_weight = pool.arrays["log_weight"] if delay.log_size else None
    told = (said.contiguous(), None, None) if isinstance(said, Tensor) else _contiguous(_bytes(said.marked), *said[1:])
    options = {"H": heads, "S": shape.page_size, "D": shape.head_dim, "CHANNELS": _channels(pool)}
    options |= {"RING": delay.tokens + 1, "WIDTH": width, "KNOWN": known, "SUMS": delay.look_back is None}
    options |= {"MERGES": delay.merges, "WEIGHS": delay.weighs}
    kernels.leave[size, heads](
        pool.key, pool.value, log_weight, pool.page_table, pool.lengths, pool.failed, ring.slots, _bytes(ring.marked),
        *ring[2:], *told, chunks.seats, chunks.starts, *chunks.rows, raw_keys, raw_values, stays, places, carries,
        shares, before, before_carry, lengths, _ints(device, size, heads, 3, lanes), layer, layers, limit, num_new,
        num_keys, **options, SINKS=delay.sinks, LANES=lanes, LOGITS=isinstance(said, Tensor), COUNTED=COUNTED, B=MOVED,
        num_warps=LEAVE_WARPS)  # fmt: skip
    cos, sin = (raw_keys, raw_keys) if chunks.turn is None else _contiguous(*chunks.turn)  # unread, if there are none
    half = 0 if chunks.turn is None else cos.shape[-1]
    group_keys, group_values = (torch.empty_like(x) if delay.merges else None for x in (raw_keys, raw_values))
    block, warps = (MERGED, MERGE_WARPS) if delay.merges else (SETTLED, SETTLE_WARPS)
    kernels.settle[num_keys // block + size, heads](
        pool.key, pool.value, log_weight, pool.page_table, pool.failed, ring.members, ring.member_carry, keys, values,
        cos, sin, chunks.seats, *chunks.rows, raw_keys, raw_values, group_keys, group_values, log_size, places,
        carries, shares, before, before_carry, layer, layers, limit, size, num_keys, *keys.stride()[:2],
        *values.stride()[:2], **options, HALF=half, B=block, ROWS=_rows(size),
        num_warps=min(16, warps * max(1, _channels(pool) // 128)))  # fmt: skip
    groups = None if group_keys is None or group_values is None else (group_keys, group_values)
    rule = Leaving(delay.tokens, stays.view(torch.bool), groups, log_size)
    return Seen(raw_keys, raw_values, past_of(pool, layer, chunks, lengths), rule)


def _ints(device: torch.device, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=device)


def _channels(pool: DevicePool) -> int:
    """Of a block that holds a key: 16 at least, for products."""
    return max(16, _power(pool.shape.head_dim))


def _rows(size: int) -> int:
    """Of a block that holds what there is of each chunk: one size for the usual numbers, since each is compiled."""
    return max(16, _power(size))


def _power(size: int) -> int:
    """The size of a block that holds so many."""
    return int(triton.next_power_of_2(max(1, size)))


def _bytes(flags: Tensor) -> Tensor:
    """The same bools, as kernels read them."""
    return flags.view(torch.uint8)


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def _readable(x: Tensor) -> Tensor:
    """[H, T, D] with the channels of a vector side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
