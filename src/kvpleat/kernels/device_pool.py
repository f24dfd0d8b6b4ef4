"""The cache of all rows and layers on a device: pages, and the streams over them, in tensors of fixed sizes.

`kernels.update` changes it without a host read. Words and names are those of `cache.paged` and `cache.delayed`; shapes:
kvpleat.types, and M: pages that a stream may have.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpleat.errors import UnsupportedError
from kvpleat.types import Delay, KVShape

FREE = -1  # what stands in a page table where no page is
EMPTY = -1  # no token was here yet
ALIGNED = 8  # float32 numbers that memory gives out together: sums begin at multiples of them


class Ring(NamedTuple):
    """The last W + 1 tokens of each stream (W: the delay), and the newest groups: see `cache.delayed.DelayedState`.

    slots [R, L, H, W + 1] int32, marked (bool), and where entries merge log_carry, weight (float32). members
    [R, L, H, K, 2 D + 1], member_carry [R, L, H, K] float32. In memory a row's tokens of one age lie side by side, and
    members begin at multiples of 32 bytes.
    """

    slots: Tensor
    marked: Tensor
    log_carry: Tensor | None
    weight: Tensor | None
    members: Tensor | None
    member_carry: Tensor | None


@dataclass(frozen=True)
class DevicePool:
    """Pages and streams of all rows and layers, in tensors of fixed sizes: see `new_pool`.

    Args:
        shape: of the model. delay: what becomes of marked entries; None: entries leave at moments.
        arrays: by name of `shape.arrays`: "key" and "value" [P, S, D], side arrays [P, S].
        holders: [P] int32 rows that have a page in their tables, several where it is shared; 0: it is free.
        free_pages: [P] int32 of which the first free_count are the free pages; the last of them is taken first.
        free_count: [1] int32.
        failed: [1] int32 pages that were missing when they ran out; 0: they did not.
        page_table: [R, L, H, M] int32. num_pages, lengths: [R, L, H] int32.
        row_pages: [R] int32, where each row's share of the free pages lies during a change.
        ring: where entries leave one by one.
    """

    shape: KVShape
    delay: Delay | None
    arrays: dict[str, Tensor]
    holders: Tensor
    free_pages: Tensor
    free_count: Tensor
    failed: Tensor
    page_table: Tensor
    num_pages: Tensor
    lengths: Tensor
    row_pages: Tensor
    ring: Ring | None

    @property
    def key(self) -> Tensor:
        """[P, S, D]."""
        return self.arrays["key"]

    @property
    def value(self) -> Tensor:
        """[P, S, D]."""
        return self.arrays["value"]

    @property
    def log_weight(self) -> Tensor | None:
        """[P, S] float32; None: entries have none."""
        return self.arrays.get("log_weight")


@torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
def new_pool(
    shape: KVShape, delay: Delay | None, num_rows: int, num_pages: int, max_entries: int, device: torch.device
) -> DevicePool:
    """An empty pool.

    Args:
        num_rows: seats (R). num_pages: pages of the pool (P). max_entries: that a stream may ever have, for M.

    Raises:
        UnsupportedError: entries of fewer bits, or of a dtype that the kernels do not know.
    """
    if shape.bits is not None:
        raise UnsupportedError(
            f"bits={shape.bits}: the kernels that update a cache on a device know entries of the model's dtype only. "
            "Pass bits=None."
        )
    if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(
            f"Entries of {shape.dtype}: the kernels that update a cache on a device know bfloat16, float16 and "
            "float32. Load the model in one of them."
        )
    streams = (num_rows, shape.num_layers, shape.num_kv_heads)
    table = (*streams, -(-max_entries // shape.page_size))

    def ints(*size: int, fill: int = 0) -> Tensor:
        return torch.full(size, fill, dtype=torch.int32, device=device)

    return DevicePool(
        shape=shape,
        delay=delay,
        arrays={
            name: torch.empty(num_pages, shape.page_size, *item, dtype=dtype, device=device)
            for name, (item, dtype) in shape.arrays.items()
        },
        holders=ints(num_pages),
        free_pages=torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device),
        free_count=ints(1, fill=num_pages),
        failed=ints(1),
        page_table=ints(*table, fill=FREE),
        num_pages=ints(*streams),
        lengths=ints(*streams),
        row_pages=ints(num_rows),
        ring=None if delay is None else new_ring(shape, delay, num_rows, device),
    )


def pool_bytes(
    shape: KVShape, delay: Delay | None, num_rows: int, num_pages: int, max_entries: int
) -> tuple[int, dict[str, int]]:
    """Bytes of a pool, exactly: one is made of tensors without memory.

    Args:
        As those of `new_pool`.

    Returns:
        of the pages and what belongs to each; and of what is there for the rows, by what it is.
    """
    pool = new_pool(shape, delay, num_rows, num_pages, max_entries, torch.device("meta"))
    found: dict[str, Any] = {f.name: getattr(pool, f.name) for f in fields(pool)}
    paged = _bytes(*found.pop("arrays").values(), found.pop("holders"), found.pop("free_pages"))
    ring, table = _bytes(*(found.pop("ring") or ())), _bytes(found.pop("page_table"))
    counts = _bytes(*(x for x in found.values() if isinstance(x, Tensor)))
    return paged, {"page tables": table, "last tokens and groups": ring, "counts": counts}


def _bytes(*tensors: Tensor | None) -> int:
    """Of all that stands behind tensors, which may be views."""
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def ring_bytes(shape: KVShape, delay: Delay, num_rows: int) -> int:
    """Bytes of a ring, exactly."""
    return _bytes(*new_ring(shape, delay, num_rows, torch.device("meta")))


def new_ring(shape: KVShape, delay: Delay, num_rows: int, device: torch.device) -> Ring:
    """An empty ring for so many rows."""
    streams = (shape.num_layers, shape.num_kv_heads)

    def ring(fill: float, dtype: torch.dtype) -> Tensor:
        size = num_rows, delay.tokens + 1, *streams
        return torch.full(size, fill, dtype=dtype, device=device).permute(0, 2, 3, 1)

    slots, marked = ring(EMPTY, torch.int32), ring(False, torch.bool)
    if not delay.merges:
        return Ring(slots, marked, None, None, None, None)
    known = 1 if delay.look_back is None else delay.look_back - 1
    width = 2 * shape.head_dim + 1
    room = -(-width // ALIGNED) * ALIGNED
    return Ring(
        slots,
        marked,
        ring(0.0, torch.float32),
        ring(0.0, torch.float32) if delay.weighs else None,
        torch.zeros(num_rows, *streams, known, room, device=device)[..., :width],
        torch.zeros(num_rows, *streams, 0 if delay.look_back is None else known, device=device),
    )


def first_rows(pool: DevicePool, n: int) -> DevicePool:
    """The first n rows of a pool, of which they are a part."""
    ring: Any = None if pool.ring is None else Ring(*(x if x is None else x[:n] for x in pool.ring))  # type: ignore[arg-type]
    return replace(
        pool, page_table=pool.page_table[:n], num_pages=pool.num_pages[:n], lengths=pool.lengths[:n],
        row_pages=pool.row_pages[:n], ring=ring,
    )  # fmt: skip


def check_integrity(pool: DevicePool) -> None:
    """Raise AssertionError unless every page is free or as often in the page table as it has holders, only pages that
    nothing is written to are shared, and all counts add up. Reads from the host."""
    size, free, limit = pool.shape.page_size, int(pool.free_count), pool.page_table.shape[-1]
    held = torch.arange(limit, device=pool.key.device) < pool.num_pages[..., None]
    assert torch.equal(held, pool.page_table != FREE), "page table and counts differ"
    count = pool.holders.numel()
    counted = pool.page_table[held].long().bincount(minlength=count)
    assert torch.equal(counted.int(), pool.holders), "the page table and the holders of pages differ"
    loose = pool.free_pages[:free].sort().values
    assert torch.equal(loose, torch.nonzero(pool.holders == 0).flatten().int()), "the list of free pages is wrong"
    assert bool((pool.lengths <= pool.num_pages * size).all()), "a stream is longer than its pages"
    assert bool((pool.lengths >= 0).all()), "a stream is shorter than nothing"
    places = torch.arange(held[0].numel(), device=held.device).view(held.shape[1:]).expand_as(held)[held]
    place = torch.zeros_like(counted).scatter_(0, pool.page_table[held].long(), places)
    assert torch.equal(place[pool.page_table[held].long()], places), "a page is shared by different streams"
    shared = held & (pool.holders[pool.page_table.clamp(min=0).long()] > 1)
    assert not bool((shared & ~settled(pool.lengths, pool.ring, size, limit)).any()), "a shared page may be written to"


def settled(lengths: Tensor, ring: Ring | None, page_size: int, limit: int) -> Tensor:
    """[R, L, H, M] pages of streams that nothing is written to any more, where entries leave one by one or never.

    A token goes behind the entries or in the place of one of the last W + 1 tokens, and joins the newest of these. A
    chunk takes the last W + 1 tokens out, moves the last entries to where they were, and goes on behind what is left.
    So what is not among the last W + 1 tokens, nor among the last W + 1 entries, stays where it is for good.
    """
    recent = 0 if ring is None else ring.slots.shape[-1]
    full = (lengths - recent).clamp(min=0) // page_size
    still = torch.arange(limit, device=lengths.device) < full[..., None]
    return still if ring is None else still.scatter(-1, ring.slots.clamp(min=0).long() // page_size, False)
