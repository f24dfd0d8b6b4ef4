"""Rows that begin as others are: what was computed for one is the beginning of the other, and pages are shared.

    told = fork(pool, sources, targets)     rows `targets`, which are empty, become copies of rows `sources`
    move(pool, sources, targets)            rows `sources` go on as rows `targets`, which are empty
    update.release(pool, rows)              a page is free when the last of its holders has left it

**Copy on write, of writes that are known beforehand.** From the state of a row follows which of its pages may still be
written to (`device_pool.settled`). These are copied at once, and the others are shared for good: no kernel of a step
has to ask who else holds a page. How many are copied does not grow with the text: those with the last W + 1 tokens of a
stream, and the last one. In layers where any entry may move, since some leave at moments, all pages are copied.

Nothing here reads a tensor from the host where Triton runs. A fork takes all of its pages or none, as in
`kernels.update`. This file holds the function, and the torch that copies pages; fork_triton.py copies the same. Shapes:
kvpleat.types; F: forks, and M: pages that a stream may have.
"""

import torch
from torch import Tensor

from kvpleat.kernels import update
from kvpleat.kernels.device_pool import EMPTY, FREE, DevicePool, Ring, settled


def fork(
    pool: DevicePool,
    sources: Tensor,
    targets: Tensor,
    moves: Tensor,
    whole: bool = False,
    spare: int | None = None,
    beside: Ring | None = None,
) -> Tensor:
    """Make rows that are as others are.

    Args:
        sources: [F] int64 rows, any number of times. targets: [F] int64 rows that are empty, each once.
        moves: [L] bool layers in which any entry may move.
        whole: all pages are shared: the sources are released before anything else happens to them.
        spare: pages that have to be left: if there are too few nothing happens. None: then `failed` is set.
        beside: another ring of the same rows.

    Returns:
        [2, F] int32 pages that are shared, or would be but for `whole`, and -1 where there was no fork; and pages that
        the target has.
    """
    lines, lengths = (x.index_select(0, sources) for x in (pool.page_table, pool.lengths))
    ring, other = _select(pool.ring, sources), _select(beside, sources)
    needed, limit = -(-lengths // pool.shape.page_size), lines.shape[-1]
    held = torch.arange(limit, device=lines.device) < needed[..., None]
    still = settled(lengths, ring, pool.shape.page_size, limit) & ~moves[:, None, None]
    copied = held & ~still & (not whole)
    counts, done = copied.sum(-1, dtype=torch.int32), pool.failed == 0
    if spare is not None:
        done = done & (counts.sum() + spare <= pool.free_count)
        counts = counts * done
    if not whole:
        update.reserve(pool, torch.zeros_like(pool.lengths).index_copy_(0, targets, counts * pool.shape.page_size))
        done = done & (pool.failed == 0)
    before = pool.page_table.index_select(0, targets)  # the pages of the copies, one behind the other
    places = (copied.cumsum(-1) - 1).clamp(min=0)
    after = torch.where(copied, before.gather(-1, places), torch.where(held, lines, FREE))
    after = torch.where(done, after, before)
    _copy(pool, torch.where(copied & done, lines, FREE), after)
    pool.holders.index_add_(0, after.clamp(min=0).flatten(), (held & ~copied & done).flatten().int())
    pool.page_table.index_copy_(0, targets, after)
    state: list[tuple[Tensor | None, Tensor | None]] = [(pool.num_pages, needed), (pool.lengths, lengths)]
    state += [*zip(pool.ring or (), ring or (), strict=True), *zip(beside or (), other or (), strict=True)]
    for held_by_all, new in state:
        if held_by_all is not None and new is not None:
            held_by_all.index_copy_(0, targets, torch.where(done, new, held_by_all.index_select(0, targets)))
    shared = still.sum((1, 2, 3), dtype=torch.int32)
    return torch.stack([torch.where(done, shared, -1), needed.sum((1, 2), dtype=torch.int32)])


def move(pool: DevicePool, sources: Tensor, targets: Tensor, beside: Ring | None = None) -> None:
    """Make rows change their places. No page is copied, and a step that has failed, which changed nothing, hinders
    nothing.

    Args:
        sources: [n] int64 rows, which are empty then. targets: [n] int64 rows that are empty; none is a source.
        beside: another ring of the same rows.
    """
    for state in (pool.page_table, pool.num_pages, pool.lengths, *(pool.ring or ()), *(beside or ())):
        if state is not None:
            state.index_copy_(0, targets, state.index_select(0, sources))
    pool.page_table.index_fill_(0, sources, FREE)
    for counts in (pool.num_pages, pool.lengths):
        counts.index_fill_(0, sources, 0)
    for ring in (pool.ring, beside):
        if ring is not None:
            ring.slots.index_fill_(0, sources, EMPTY)
            ring.marked.index_fill_(0, sources, False)


def _on_gpu(pool: DevicePool) -> bool:
    return pool.key.device.type == "cuda"


def _select(ring: Ring | None, rows: Tensor) -> Ring | None:
    """That of some rows."""
    if ring is None:
        return None
    return Ring(*(x if x is None else x.index_select(0, rows) for x in ring))  # type: ignore[arg-type]  # None as there


def _copy(pool: DevicePool, sources: Tensor, targets: Tensor) -> None:
    """Copy pages to others: both [...] int32, FREE where nothing is copied, of the sources at least."""
    if _on_gpu(pool):
        from kvpleat.kernels import fork_triton

        fork_triton.copy(pool, sources, targets)
    else:
        there = sources != FREE
        for array in pool.arrays.values():
            array[targets[there].long()] = array[sources[there].long()]
