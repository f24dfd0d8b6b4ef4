"""What a decode step does to a cache that lives on a device: pages taken, tokens written, entries that leave.

Nothing here reads a tensor from the host where Triton runs, so that a step can be captured in a CUDA graph. A step is
(n: rows of the batch; row i is row i of the pool or, where `seats` are given, row seats[i], and n may be any number):

    reserve_token(pool, positions, active)      once: the pages that this step can need, of all layers together
    step(pool, layer, ...) or append(...)       each layer: the new token goes in, what is due leaves or merges
    evict(pool, layer, keep, active)            each layer, at moments of policies that have them
    give_back(pool)                             once, after `evict`: pages that are no longer needed

Pages are handed out by a prefix sum over the streams, in the batch's order, so the same calls give the same pages.

**Running out of pages loses nothing.** `reserve_token` takes all pages of a step or none. If there are too few it sets
`failed`, and from then on all of the above but `give_back` do nothing until somebody clears it: not in this step, nor
in those that were launched before the host looked. The host reads the flag one step late, frees pages (`release`),
clears it and repeats the step; the cache is as it was before. While `free_count` is at least the number of streams no
step can fail.

This file holds the functions, and below them the torch that says what they compute; update_triton.py computes the same.
What leaves and what merges: kvpleat.policies.learned. Shapes: kvpleat.types, and M: pages that a stream may have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.kernels.device_pool import EMPTY, FREE, DevicePool, Ring
from kvpleat.kernels.pooling import Newest, groups
from kvpleat.kernels.reference import Turn
from kvpleat.types import Delay, Marks


def reserve_token(pool: DevicePool, positions: Tensor, active: Tensor, seats: Tensor | None = None) -> None:
    """Take the pages that one more token of each active row can need, in all layers, or none and set `failed`.

    With a delay above 0 it is known who grows, and no page more is taken. Without, the gates have not spoken yet: a
    stream that is full gets a page, which it keeps for later if the token merges.

    Args:
        positions: [n] int32 of the new tokens. active: [n] bool, rows that have one.
        seats: [n] int32 or int64, on the pool's device: the row of the pool that each row of the batch is, of active
            rows each once, of the others any number. None: row i is row i.
    """
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.reserve_token(pool, positions, active, seats)
    else:
        rows = torch.nonzero(active).flatten()
        at = _seats(rows, seats)
        _take(pool, _growth(pool, positions[rows], at), at)


def reserve(pool: DevicePool, counts: Tensor) -> None:
    """Take the pages that counts [R, L, H] int32 more entries of each stream need, or none and set `failed`."""
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.reserve(pool, counts)
    else:
        _take(pool, counts, torch.arange(counts.shape[0], device=counts.device))


def append(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    seats: Tensor | None = None,
) -> None:
    """Put one token of each active row behind the entries of its streams, whose pages were reserved: without a page a
    kernel writes nothing and sets `failed`.

    Args:
        positions: [n] int32 of the tokens. active: [n] bool. keys, values: [n, H, D], rotated.
        seats: as in `reserve_token`.
    """
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.append(pool, layer, positions, active, keys, values, seats)
    else:
        _append(pool, layer, positions, active, keys, values, seats)


def step(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    said: Marks | Tensor,
    turn: Turn | None = None,
    seats: Tensor | None = None,
) -> None:
    """Take in one token of each active row where entries leave one by one: `cache.delayed.step` for all rows at once.

    Args:
        positions, active, keys, values, seats: as in `append`.
        said: marks [n, H] each, or what the gates put out, [outputs, n, H] float32: see `read_logits`.
        turn: how keys are rotated at positions - W, [n, r / 2] float32 (`reference.turn`, once for all layers); None:
            they are not, or nothing merges.
    """
    assert pool.ring is not None, "the pool was made without a delay"
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.step(pool, layer, positions, active, keys, values, said, turn, seats)
    else:
        _step(pool, layer, positions, active, keys, values, said, turn, seats)


def evict(pool: DevicePool, layer: int, keep: Tensor, active: Tensor) -> None:
    """Drop entries of one layer at a moment: the last entries move into the holes. Pages come back with `give_back`.

    Args:
        keep: [R, H, N] bool in the order of the streams; entries from number N on stay.
        active: [R] bool, rows that are at a moment; the others stay as they are.
    """
    assert pool.ring is None, "entries leave one by one: the ring would not know where they went"
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.evict(pool, layer, keep, active)
    else:
        _evict(pool, layer, keep, active)


def give_back(pool: DevicePool) -> None:
    """Free the pages of all streams that their entries do not reach."""
    if _on_gpu(pool):
        from kvpleat.kernels import update_triton

        update_triton.give_back(pool)
    else:
        _give_back(pool)


def release(pool: DevicePool, rows: Tensor) -> None:
    """Empty rows, whose seats others can have then, and free the pages that nobody else has.

    Args:
        rows: [n] their numbers, each once.
    """
    if _on_gpu(pool):
        from kvpleat.kernels import fork_triton

        fork_triton.leave(pool, rows)
    else:
        _leave(pool, rows)
    pool.lengths.index_fill_(0, rows.long(), 0)
    if pool.ring is not None:
        pool.ring.slots.index_fill_(0, rows.long(), EMPTY)
        pool.ring.marked.index_fill_(0, rows.long(), False)
    give_back(pool)


def read_logits(logits: Tensor, delay: Delay) -> Marks:
    """What gates decide: logits [outputs, ...] float32. The same as `judge` of the policy with this delay says."""
    if not delay.merges:
        return Marks(logits[0] > 0)
    if not delay.weighs:
        return Marks(logits[0] > 0, F.logsigmoid(logits[1]))
    return Marks(logits[0] > 0, torch.zeros_like(logits[0]), torch.sigmoid(logits[1]))


def _on_gpu(pool: DevicePool) -> bool:
    return pool.key.device.type == "cuda"


# ---- what they compute


def _growth(pool: DevicePool, positions: Tensor, at: Tensor) -> Tensor:
    """[r, L, H] entries that one more token of each of the pool's rows `at` [r] can add; positions: [r]."""
    if pool.ring is not None and pool.delay is not None and pool.delay.tokens:
        return (~pool.ring.marked[at, :, :, _ages(pool.ring, positions)[1]]).int()
    return torch.ones_like(pool.lengths[at])


def _take(pool: DevicePool, counts: Tensor, at: Tensor) -> None:
    """Pages for counts [r, L, H] more entries of the pool's rows `at` [r], in their order."""
    have = pool.num_pages[at]
    missing = (_pages(pool, pool.lengths[at] + counts) - have).clamp(min=0)
    limit = pool.page_table.shape[-1]
    too_long = (have + missing > limit).flatten(1).any(1)
    # A stream that outgrows its line of the table asks for more than there is.
    wanted = int(torch.where(too_long, pool.holders.numel() + 1, missing.flatten(1).sum(1)).sum())
    free = int(pool.free_count)
    if int(pool.failed):
        return
    if wanted > free:
        pool.failed.fill_(wanted - free)
        return
    number = torch.arange(limit, device=missing.device) - have[..., None]
    new = (number >= 0) & (number < missing[..., None])
    pages = pool.free_pages[(free - 1 - _before(missing)[..., None] - number)[new]]
    row, *place = torch.nonzero(new, as_tuple=True)
    pool.page_table[(at[row], *place)] = pages
    pool.holders[pages.long()] = 1
    pool.num_pages[at] += missing
    pool.free_count.sub_(wanted)


def _give_back(pool: DevicePool) -> None:
    extra = pool.num_pages - _pages(pool, pool.lengths)
    number = pool.num_pages[..., None] - 1 - torch.arange(pool.page_table.shape[-1], device=extra.device)
    old = (number >= 0) & (number < extra[..., None])
    pages = pool.page_table[old]
    pool.free_pages[(pool.free_count + _before(extra)[..., None] + number)[old]] = pages
    pool.holders[pages.long()] = 0
    pool.page_table[old] = FREE
    pool.num_pages.sub_(extra)
    pool.free_count.add_(extra.sum())


def _leave(pool: DevicePool, rows: Tensor) -> None:
    """Rows hold their pages no more: those that others go on with leave their tables, and the others are ready to be
    given back."""
    for row in rows.tolist():
        line = pool.page_table[row]
        held = line != FREE
        pool.holders[line[held].long()] -= 1
        last = held & (pool.holders[line.clamp(min=0).long()] == 0)
        order = torch.argsort((~last).to(torch.int8), dim=-1, stable=True)
        pool.page_table[row] = torch.where(last, line, FREE).gather(-1, order)
        pool.num_pages[row] = last.sum(-1, dtype=torch.int32)


def _append(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    seats: Tensor | None,
) -> None:
    rows = _acting(pool, active)
    at = _seats(rows, seats)
    new = {"position": positions[rows, None], "log_weight": 0.0, "score": float("nan")}
    slots = _slots(pool, layer, at, pool.lengths[at, layer])
    _write(pool, slots, keys[rows], values[rows])
    for name in pool.shape.fields:
        _flat(pool.arrays[name])[slots] = new[name]  # type: ignore[assignment]  # tensor or number, both are allowed
    pool.lengths[at, layer] += 1


def _step(
    pool: DevicePool,
    layer: int,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    said: Marks | Tensor,
    turn: Turn | None,
    seats: Tensor | None,
) -> None:
    ring, delay, rows = pool.ring, pool.delay, _acting(pool, active)
    assert ring is not None
    assert delay is not None
    at = _seats(rows, seats)
    marks = (read_logits(said, delay) if isinstance(said, Tensor) else said).each(lambda x: x[rows])
    marks = marks._replace(marked=marks.marked & (positions[rows] > delay.sinks)[:, None])
    keys, values = keys[rows], values[rows]
    newest, oldest = (age[rows] for age in _ages(ring, positions))
    due = marks  # of the token that is W tokens old now
    if delay.tokens:
        stored = Marks(ring.marked, ring.log_carry, ring.weight)
        due = stored.each(lambda x: x[at, layer, :, oldest])
    leaving = ring.slots[at, layer, :, newest]
    index = torch.where(due.marked, leaving, pool.lengths[at, layer])
    for name, new in {"slots": index, **marks._asdict()}.items():
        if getattr(ring, name) is not None:
            getattr(ring, name)[at, layer, :, newest] = new
    pool.lengths[at, layer] += (~due.marked).int()
    slots = _slots(pool, layer, at, index)
    if delay.tokens or not delay.merges:
        _write(pool, slots, keys, values)
    if not delay.merges:
        return
    joins = torch.ones_like(due.marked)
    if delay.tokens:
        if delay.log_size:
            _flat(pool.arrays["log_weight"])[slots] = 0.0
        joined = ring.slots[at, layer, :, oldest]
        joins = joined != EMPTY
        slots = _slots(pool, layer, at, joined.clamp(min=0))
        keys, values = _flat(pool.key)[slots], _flat(pool.value)[slots]
    its = None if turn is None else Turn(*(x[rows, None, None] for x in turn))
    _join(pool, layer, at, joins, slots, keys, values, due, its)


def _join(
    pool: DevicePool,
    layer: int,
    rows: Tensor,
    joins: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    due: Marks,
    turn: Turn | None,
) -> None:
    """Each token [r, H] that `joins` says takes over what is left of the group before it.

    rows: [r] of the pool. turn: of these, [r, 1, 1, channels / 2].
    """
    ring, delay = pool.ring, pool.delay
    assert ring is not None
    assert delay is not None
    assert ring.members is not None
    assert ring.member_carry is not None
    assert due.log_carry is not None
    goes_on = due.marked[..., None]  # else what was there does not count: 0 times NaN of another sequence would
    before = Newest(
        torch.where(goes_on[..., None], ring.members[rows, layer], 0.0),
        torch.where(goes_on, ring.member_carry[rows, layer], 0.0),
    )
    carry = torch.where(due.marked, due.log_carry, -torch.inf)[..., None]
    weight = None if due.weight is None else due.weight[..., None]
    tokens = keys[..., None, :], values[..., None, :]
    new_keys, new_values, log_size, after = groups(*tokens, turn, carry, weight, before, delay.look_back)
    changed = due.marked[..., None] & joins[..., None]
    keys = torch.where(changed, new_keys[..., 0, :].to(keys.dtype), keys)
    values = torch.where(changed, new_values[..., 0, :].to(values.dtype), values)
    _write(pool, slots[joins], keys[joins], values[joins])
    if delay.log_size:
        _flat(pool.arrays["log_weight"])[slots[joins]] = log_size[..., 0][joins]
    ring.members[rows, layer] = torch.where(joins[..., None, None], after.members, before.members)
    ring.member_carry[rows, layer] = torch.where(joins[..., None], after.log_carry, before.log_carry)


def _evict(pool: DevicePool, layer: int, keep: Tensor, active: Tensor) -> None:
    rows = _acting(pool, active)
    lengths, size = pool.lengths[rows, layer], pool.shape.page_size
    index = torch.arange(pool.page_table.shape[-1] * size, device=keep.device).expand(*lengths.shape, -1)
    live = index < lengths[..., None]
    stays = live & F.pad(keep[rows], (0, index.shape[-1] - keep.shape[-1]), value=True)
    counts = stays.sum(-1, dtype=torch.int32)
    hole = live & ~stays & (index < counts[..., None])
    last = stays & (index >= counts[..., None])  # as many as there are holes, in every stream
    slots = pool.page_table[rows, layer].long().repeat_interleave(size, -1) * size + index % size
    for array in pool.arrays.values():
        _flat(array)[slots[hole]] = _flat(array)[slots[last]]
    pool.lengths[rows, layer] = counts


def _acting(pool: DevicePool, active: Tensor) -> Tensor:
    """[r] rows that something happens to."""
    return torch.nonzero(active & (pool.failed == 0)).flatten()


def _seats(rows: Tensor, seats: Tensor | None) -> Tensor:
    """[r] the pool's rows that rows of the batch are."""
    return rows if seats is None else seats[rows].long()


def _ages(ring: Ring, positions: Tensor) -> tuple[Tensor, Tensor]:
    """[n] each: where in the ring new tokens go, and where those W tokens before them stand."""
    size = ring.slots.shape[-1]
    return positions.long() % size, (positions.long() + 1) % size


def _slots(pool: DevicePool, layer: int, rows: Tensor, index: Tensor) -> Tensor:
    """[r, H] the pool's slots of entries number `index` of their streams."""
    size = pool.shape.page_size
    pages = pool.page_table[rows, layer].gather(-1, index.long()[..., None] // size)[..., 0]
    assert bool((pages != FREE).all()), "no page was reserved"
    return pages.long() * size + index % size


def _write(pool: DevicePool, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    _flat(pool.key)[slots], _flat(pool.value)[slots] = keys, values


def _flat(array: Tensor) -> Tensor:
    """[P * S, ...] one array, entry by entry."""
    return array.view(-1, *array.shape[2:])


def _pages(pool: DevicePool, lengths: Tensor) -> Tensor:
    return -(-lengths // pool.shape.page_size)


def _before(counts: Tensor) -> Tensor:
    """[R, L, H] how many the streams before each one have together."""
    return counts.flatten().cumsum(0).view_as(counts) - counts
