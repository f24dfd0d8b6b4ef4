"""`kernels.update` in Triton: what is launched. The kernels are in update_kernels_triton.py, those that hand out pages
in update_pages_triton.py.

Every launch follows from sizes alone, so that a CUDA graph can hold it. Tensors of a pool are laid out as `new_pool`
made them; keys and values of new tokens may be views with any strides over rows and heads.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kvpleat.kernels import update_kernels_triton as kernels
from kvpleat.kernels import update_pages_triton as pages
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.kernels.reference import Turn
from kvpleat.types import Marks

STREAMS, MERGED = 4, 1  # that one program takes a token into; MERGED: where entries merge, which is more work
WARPS = 1  # of such a program: a vector of 128 channels is half a warp's load
COUNTED = 1024  # streams of a row whose pages one program looks at, at a time
PLANNED = 1024  # entries that one program looks at, at a time
MOVED = 16  # entries that one program moves at a time
MOVERS = 4  # programs that move entries of one stream


def reserve_token(pool: DevicePool, positions: Tensor, active: Tensor, seats: Tensor | None = None) -> None:
    """`update.reserve_token`; arguments as there."""
    _change_pages(pool, pages.TOKEN.value, positions=positions, active=_bytes(active), seats=seats)


def reserve(pool: DevicePool, counts: Tensor) -> None:
    """`update.reserve`; arguments as there."""
    _change_pages(pool, pages.COUNTS.value, counts.contiguous())


def give_back(pool: DevicePool) -> None:
    """`update.give_back`; arguments as there."""
    _change_pages(pool, pages.GIVE.value)


def append(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    seats: Tensor | None = None,
) -> None:
    """`update.append`; arguments as there."""
    rows = active.shape[0]
    _, layers, heads, limit = pool.page_table.shape
    keys, values = _readable(keys), _readable(values)
    kernels.append[(triton.cdiv(rows * heads, STREAMS),)](
        *_arrays(pool), pool.page_table, pool.lengths, pool.failed, keys, values, positions, _bytes(active), seats,
        layer, rows, layers, limit, *keys.stride()[:2], *values.stride()[:2], H=heads, **_channels(pool), B=STREAMS,
        num_warps=WARPS)  # fmt: skip


def step(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    said: Marks | Tensor,
    turn: Turn | None,
    seats: Tensor | None = None,
) -> None:
    """`update.step`; arguments as there."""
    ring, delay = pool.ring, pool.delay
    assert ring is not None
    assert delay is not None
    rows = active.shape[0]
    _, layers, heads, limit = pool.page_table.shape
    keys, values = _readable(keys), _readable(values)
    logits = isinstance(said, Tensor)
    told = (said.contiguous(), None, None) if isinstance(said, Tensor) else _contiguous(_bytes(said.marked), *said[1:])
    cos, sin = (keys, keys) if turn is None else _contiguous(*turn)  # a pointer that nobody follows, if there is none
    half = 0 if turn is None else cos.shape[-1]
    rest = pool.shape.head_dim - 2 * half
    known, width = (0, 0) if ring.members is None else (ring.members.shape[-2], ring.members.stride(-2))
    streams = MERGED if delay.merges else STREAMS
    kernels.step[(triton.cdiv(rows * heads, streams),)](
        pool.key, pool.value, pool.arrays["log_weight"] if delay.log_size else None, pool.page_table, pool.lengths,
        pool.failed, ring.slots, _bytes(ring.marked), *ring[2:], keys, values, cos, sin, *told, positions,
        _bytes(active), seats, layer, rows, layers, limit, *keys.stride()[:2], *values.stride()[:2], H=heads,
        **_channels(pool), HALF=half, PAIRS=_power(half), REST=_power(rest),
        RING=delay.tokens + 1, SINKS=delay.sinks, WIDTH=width, KNOWN=known, SUMS=delay.look_back is None,
        MERGES=delay.merges, WEIGHS=delay.weighs, LOGITS=logits, B=streams, num_warps=WARPS)  # fmt: skip


def evict(pool: DevicePool, layer: int, keep: Tensor, active: Tensor) -> None:
    """`update.evict`; arguments as there."""
    rows, layers, heads, limit = pool.page_table.shape
    keep = _bytes(keep.contiguous())
    room = (limit * pool.shape.page_size + 1) // 2  # no more entries can move
    moves = torch.empty(rows, heads, 2, room, dtype=torch.int32, device=keep.device)
    counts = torch.empty(rows, heads, dtype=torch.int32, device=keep.device)
    kernels.plan[(rows * heads,)](
        keep, _bytes(active), pool.failed, pool.lengths, moves, counts, layer, layers, heads, keep.shape[-1], room,
        BLOCK=PLANNED)  # fmt: skip
    kernels.move[rows * heads, MOVERS](
        *_arrays(pool), pool.page_table, pool.failed, moves, counts, layer, layers, heads, limit, room,
        **_channels(pool), B=MOVED)  # fmt: skip


def _change_pages(
    pool: DevicePool,
    mode: int,
    counts: Tensor | None = None,
    positions: Tensor | None = None,
    active: Tensor | None = None,
    seats: Tensor | None = None,
) -> None:
    """Three launches: what each row takes or gives back, where its share of the free pages lies, and the exchange."""
    rows, layers, heads, limit = pool.page_table.shape
    streams, row_pages = layers * heads, pool.row_pages
    if seats is not None:  # a batch may have more rows than the pool
        rows = seats.shape[0]
        row_pages = torch.empty(rows, dtype=torch.int32, device=seats.device)
    block = min(COUNTED, triton.next_power_of_2(streams))
    marked = None if pool.ring is None else _bytes(pool.ring.marked)
    ring = 1 if pool.ring is None or mode != pages.TOKEN.value else pool.ring.slots.shape[-1]
    looked_at = (pool.lengths, pool.num_pages, marked, counts, positions, active, seats, row_pages)
    options = {"RING": ring, "S": pool.shape.page_size, "MODE": mode, "BLOCK": block}
    pages.count[(rows,)](*looked_at, streams, limit, pool.holders.numel(), **options)
    pages.share[(1,)](
        row_pages, pool.free_count, pool.failed, rows, ROWS=triton.next_power_of_2(rows), MODE=mode)  # fmt: skip
    pages.settle[(rows,)](
        *looked_at, pool.free_pages, pool.page_table, pool.holders, pool.failed, streams, limit, **options,
        J=1 if mode == pages.TOKEN.value else 16)  # fmt: skip


def _arrays(pool: DevicePool) -> tuple[Tensor | None, ...]:
    """Key, value, position, log_weight and score."""
    return tuple(pool.arrays.get(name) for name in ("key", "value", "position", "log_weight", "score"))


def _channels(pool: DevicePool) -> dict[str, int]:
    size = pool.shape.head_dim
    return {"S": pool.shape.page_size, "D": size, "CHANNELS": _power(size)}


def _power(size: int) -> int:
    """The size of a block that holds so many."""
    return int(triton.next_power_of_2(max(1, size)))


def _bytes(flags: Tensor) -> Tensor:
    """The same bools, as kernels read them."""
    return flags.view(torch.uint8)


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def _readable(x: Tensor) -> Tensor:
    """[R, H, D] with the channels of a vector side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
