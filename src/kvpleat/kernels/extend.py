"""What a chunk of a prompt does to a cache that lives on a device, for several rows at once: keys and values written,
entries that leave or merge, and what each new token sees of all that.

Nothing here reads a tensor from the host where Triton runs. A forward over chunks is:

    chunks = plan(pool, seats, starts, counts, rotary)      once
    reserve(pool, chunks)                                   once: the pages that it can need, of all layers together
    past = append(pool, layer, chunks, keys, values)        each layer, where entries leave at moments or never
    prefill.attend(q, keys, values, chunks.rows, past, rule, scale)
    seen = extend(pool, layer, chunks, keys, values, said)  each layer, where they leave one by one
    prefill.attend(q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, scale)
    update.give_back(pool)                                  once, after the last layer: pages that were not needed

All of a layer is written before its attention runs: new entries lie behind those that the past consists of, which has
lengths of its own. Afterwards `update.step` and `update.append` go on from there, and so does the next chunk.

**Running out of pages loses nothing**, as in `kernels.update`. Only `reserve` can fail: gates have not spoken yet, so
it takes pages for all new tokens, `most_pages` at most. From then on `failed` is set, nothing changes the cache, and
what `append` and `extend` return may be read but means nothing.

This file holds the functions, and below them the torch that says what they compute; extend_triton.py computes the same.
What leaves and what merges: kvpleat.policies.learned. Shapes: kvpleat.types, C: chunks, and M: tokens of which keys are
passed to attention, as in `kernels.prefill`.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.kernels import update
from kvpleat.kernels.device_pool import FREE, DevicePool
from kvpleat.kernels.pooling import Newest, groups
from kvpleat.kernels.prefill import Leaving, Past, Rows
from kvpleat.kernels.reference import Turn, turn
from kvpleat.types import KVShape, Marks, Rotary


class Chunks(NamedTuple):
    """The next tokens of some rows, the same in all layers of a forward: see `plan`.

    seats: [C] int32, which row of the pool each belongs to. starts: [C] int32, position of each one's first new token.
    rows: where each one's tokens lie among the T new ones and the M keys; of these first the young ones of the past.
    num_keys: M; keys behind the last row are left undefined.
    turn: how keys are rotated at the positions of the M keys, [M, r / 2]; None: they are not, or nothing merges.
    """

    seats: Tensor
    starts: Tensor
    rows: Rows
    num_keys: int
    turn: Turn | None


class Lie(NamedTuple):
    """The same on the host. firsts: positions of the chunks' first keys. new, keys: [C + 1] where each one's tokens
    begin among the new ones and the keys."""

    firsts: list[int]
    new: list[int]
    keys: list[int]


class Seen(NamedTuple):
    """What new tokens see, for `prefill.attend`: keys, values [H, M, D] of tokens as they are while they are young."""

    keys: Tensor
    values: Tensor
    past: Past
    rule: Leaving


def plan(
    pool: DevicePool,
    seats: Sequence[int] | Tensor,
    starts: Sequence[int],
    counts: Sequence[int],
    rotary: Rotary | None = None,
) -> Chunks:
    """Say where the new tokens of some rows lie: one chunk after the other, counts[i] tokens each.

    Args:
        seats: rows of the pool, each once; those of idle chunks are rows of the pool as well. A tensor [C] of integers
            on the pool's device is copied, and not read from the host: nobody sees then if one is there twice.
        starts: positions of their first new tokens. Rows that start at 0 were released before. counts: of new tokens; a
            chunk without any is idle.
        rotary: how the model rotates keys, where entries merge.

    Raises:
        OptionError: two chunks of one row.
    """
    known: Sequence[int] = [] if isinstance(seats, Tensor) else seats
    if len(set(known)) < len(known):
        raise OptionError(
            f"seats={list(known)}: two chunks of one row would be written over each other. Pass one chunk a row."
        )
    device, delay = pool.key.device, 0 if pool.delay is None else pool.delay.tokens
    where = lie(starts, counts, delay)
    room = -(-len(where.keys) // 4) * 4  # all four begin at multiples of 16 bytes
    table = torch.tensor(
        [[*x, *[0] * (room - len(x))] for x in (known, starts, where.new, where.keys)], dtype=torch.int32
    )
    of_seats, of_starts, of_new, of_keys = _sent(table, device)
    if isinstance(seats, Tensor):
        of_seats[: len(starts)] = seats
    angles = None
    if rotary is not None and pool.delay is not None and pool.delay.merges:
        stops = (start + count for start, count in zip(starts, counts, strict=True))
        spans = [torch.arange(first, stop) for first, stop in zip(where.firsts, stops, strict=True)]
        angles = turn(_sent(torch.cat(spans), device), rotary, torch.float32)
    size, rows = len(starts), Rows(of_new[: len(where.new)], of_keys[: len(where.keys)])
    return Chunks(of_seats[:size], of_starts[:size], rows, where.keys[-1], angles)


def lie(starts: Sequence[int], counts: Sequence[int], delay: int) -> Lie:
    """Where chunks lie, one after the other. delay: tokens for which keys are young."""
    firsts = [max(0, start - delay) if count else start for start, count in zip(starts, counts, strict=True)]
    sizes = (start + count - first for start, count, first in zip(starts, counts, firsts, strict=True))
    return Lie(firsts, list(accumulate(counts, initial=0)), list(accumulate(sizes, initial=0)))


def most_pages(shape: KVShape, count: int) -> int:
    """Pages that `reserve` takes at most for a chunk of so many tokens."""
    return shape.num_streams * -(-count // shape.page_size)


def reserve(pool: DevicePool, chunks: Chunks) -> None:
    """Take the pages that all new tokens need in all layers, whatever gates will say, or none and set `failed`."""
    counts = torch.zeros_like(pool.lengths)
    tokens = chunks.rows.new.diff()[:, None, None]
    counts.index_add_(0, chunks.seats, tokens.expand(-1, *counts.shape[1:]))
    update.reserve(pool, counts)


def append(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor) -> Past:
    """Put new tokens behind the entries of their streams, whose pages were reserved.

    Args:
        keys, values: [H, T, D] rotated.

    Returns:
        what the streams held before.
    """
    if _on_gpu(pool):
        from kvpleat.kernels import extend_triton

        return extend_triton.append(pool, layer, chunks, keys, values)
    return _append(pool, layer, chunks, keys, values)


def extend(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor, said: Marks | Tensor) -> Seen:
    """Take in new tokens where entries leave one by one: `cache.delayed.extend` for several rows at once. The pages of
    all new tokens were reserved.

    Args:
        keys, values: [H, T, D] rotated.
        said: marks [H, T] each, or what the gates put out, [outputs, H, T] float32: see `update.read_logits`.

    Returns:
        what each of the tokens sees. `seen.past` is what stays for good of the streams as they were.
    """
    assert pool.ring is not None, "the pool was made without a delay"
    if _on_gpu(pool):
        from kvpleat.kernels import extend_triton

        return extend_triton.extend(pool, layer, chunks, keys, values, said)
    return _extend(pool, layer, chunks, keys, values, said)


def past_of(pool: DevicePool, layer: int, chunks: Chunks, lengths: Tensor) -> Past:
    """The streams of the chunks' rows in one layer, cut to lengths [C, H]."""
    table = pool.page_table[:, layer].index_select(0, chunks.seats)
    return Past(pool.key, pool.value, table, lengths, pool.log_weight, pool.arrays.get("position"))


def _on_gpu(pool: DevicePool) -> bool:
    return pool.key.device.type == "cuda"


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- what they compute


class _Chunk(NamedTuple):
    """One chunk, on the host: number, the row it belongs to, position of its first key, of its first new token and
    behind its last one; where it lies among the new tokens and the keys."""

    number: int
    seat: int
    first: int
    start: int
    stop: int
    new: slice
    keys: slice


def _each(chunks: Chunks) -> Iterator[_Chunk]:
    """Chunks that have tokens."""
    new, keys = (x.tolist() for x in chunks.rows)
    for i, (seat, start) in enumerate(zip(chunks.seats.tolist(), chunks.starts.tolist(), strict=True)):
        stop, at = start + new[i + 1] - new[i], slice(keys[i], keys[i + 1])
        if stop > start:
            yield _Chunk(i, seat, stop - (at.stop - at.start), start, stop, slice(new[i], new[i + 1]), at)


def _append(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor) -> Past:
    lengths = pool.lengths[:, layer].index_select(0, chunks.seats)
    for chunk in _each(chunks) if not int(pool.failed) else ():
        position = torch.arange(chunk.start, chunk.stop, dtype=torch.int32)
        side = {"position": position, "log_weight": 0.0, "score": torch.nan}
        slots = _slots(pool, layer, chunk.seat, lengths[chunk.number, :, None] + position - chunk.start)
        for name, new in {"key": keys[:, chunk.new], "value": values[:, chunk.new], **side}.items():
            if name in pool.arrays:
                _flat(pool.arrays[name])[slots] = new  # type: ignore[assignment]  # tensor or number, both are allowed
        pool.lengths[chunk.seat, layer] += chunk.stop - chunk.start
    return past_of(pool, layer, chunks, lengths)


def _extend(pool: DevicePool, layer: int, chunks: Chunks, keys: Tensor, values: Tensor, said: Marks | Tensor) -> Seen:
    delay, size = pool.delay, (keys.shape[0], chunks.num_keys)
    assert delay is not None
    marks = update.read_logits(said, delay) if isinstance(said, Tensor) else said
    raw_keys, raw_values, group_keys, group_values = (keys.new_zeros(*size, keys.shape[-1]) for _ in range(4))
    stays, log_size = torch.zeros(size, dtype=torch.bool), torch.zeros(size)
    lengths = pool.lengths[:, layer].index_select(0, chunks.seats)
    for chunk in _each(chunks) if not int(pool.failed) else ():
        at, old = chunk.keys, slice(chunk.keys.start, max(chunk.keys.start, chunk.keys.stop - delay.tokens))
        known = _known(pool, layer, chunk, marks)
        raw_keys[:, at], raw_values[:, at] = _raw(pool, layer, chunk, keys, values)
        lengths[chunk.number] = _take(pool, layer, chunk, known)
        formed: tuple[Tensor, Tensor, Tensor, Newest | None] = (
            raw_keys[:, old], raw_values[:, old], log_size[:, old], None)  # fmt: skip
        if delay.merges and old.stop > old.start:
            formed = _groups(pool, layer, chunk, known, *formed[:2], chunks.turn)
        group_keys[:, old], group_values[:, old], log_size[:, old], newest = formed
        stays[:, old] = F.pad(~known.marked, (0, 1), value=True)[:, 1 : old.stop - old.start + 1]
        young = slice(old.stop, at.stop)
        group_keys[:, young], group_values[:, young] = raw_keys[:, young], raw_values[:, young]
        content = {"key": group_keys[:, at], "value": group_values[:, at], "log_weight": log_size[:, at]}
        _settle(pool, layer, chunk, known, stays[:, at], lengths[chunk.number], content, newest)
    merged = (group_keys, group_values) if delay.merges else None
    rule = Leaving(delay.tokens, stays, merged, log_size if delay.log_size else None)
    return Seen(raw_keys, raw_values, past_of(pool, layer, chunks, lengths), rule)


def _known(pool: DevicePool, layer: int, chunk: _Chunk, marks: Marks) -> Marks:
    """What was decided about the chunk's keys: [H, n] each."""
    ring, delay, places = pool.ring, pool.delay, _places(pool, chunk.first, chunk.start)
    assert ring is not None
    assert delay is not None

    def both(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        return None if old is None or new is None else torch.cat([old[chunk.seat, layer, :, places], new], 1)

    new = marks.each(lambda x: x[:, chunk.new])
    marked = torch.cat([ring.marked[chunk.seat, layer, :, places], new.marked], 1)
    marked[:, : max(0, delay.sinks + 1 - chunk.first)] = False  # the first entries stay
    return Marks(marked, both(ring.log_carry, new.log_carry), both(ring.weight, new.weight))


def _raw(pool: DevicePool, layer: int, chunk: _Chunk, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk's keys and values [H, n, D], young and new ones."""
    assert pool.ring is not None
    waiting = pool.ring.slots[chunk.seat, layer, :, _places(pool, chunk.first, chunk.start)]
    slots = _slots(pool, layer, chunk.seat, waiting)
    pairs = (pool.key, keys), (pool.value, values)
    raw_keys, raw_values = (torch.cat([_flat(held)[slots], new[:, chunk.new]], 1) for held, new in pairs)
    return raw_keys, raw_values


def _take(pool: DevicePool, layer: int, chunk: _Chunk, known: Marks) -> Tensor:
    """Take young tokens out of the streams, and the newest group where it goes into the next token's; the last entries
    go where these were. Returns [H] how many stay, for good."""
    ring, lengths = pool.ring, pool.lengths[chunk.seat, layer]
    assert ring is not None
    places = _places(pool, chunk.first, chunk.start)
    index = torch.arange(pool.page_table.shape[-1] * pool.shape.page_size).expand(lengths.shape[0], -1)
    stays = index < lengths[:, None]
    stays = stays.scatter(1, ring.slots[chunk.seat, layer, :, places].long(), False)
    if chunk.first > 0:
        newest = ring.slots[chunk.seat, layer, :, _places(pool, chunk.first - 1, chunk.first)]
        stays = stays.scatter(1, newest.long(), ~known.marked[:, :1])
    counts = stays.sum(1, dtype=torch.int32)
    hole = ~stays & (index < counts[:, None])
    last = stays & (index >= counts[:, None])  # as many as there are holes, in every stream
    pages = pool.page_table[chunk.seat, layer].long().repeat_interleave(pool.shape.page_size, -1)
    slots = pages * pool.shape.page_size + index % pool.shape.page_size
    for array in pool.arrays.values():
        _flat(array)[slots[hole]] = _flat(array)[slots[last]]
    return counts


def _groups(
    pool: DevicePool, layer: int, chunk: _Chunk, known: Marks, keys: Tensor, values: Tensor, by: Turn | None
) -> tuple[Tensor, Tensor, Tensor, Newest]:
    """The group of each of the chunk's first keys [H, n, D] right after it joined: keys, values, log of its size, and
    what later tokens need."""
    ring, delay, count = pool.ring, pool.delay, keys.shape[1]
    assert ring is not None
    assert delay is not None
    assert known.log_carry is not None
    due = known.each(lambda x: x[:, :count])
    carry = torch.where(due.marked, due.log_carry, -torch.inf)  # type: ignore[arg-type]  # both are tensors
    at = slice(chunk.keys.start, chunk.keys.start + count)
    by = None if by is None else Turn(*(x[at] for x in by))
    before = Newest(*(x[chunk.seat, layer] for x in (ring.members, ring.member_carry) if x is not None))
    if chunk.first == 0:  # those of another sequence, which had the seat before
        before = Newest(*(torch.zeros_like(x) for x in before))
    new_keys, new_values, log_size, newest = groups(keys, values, by, carry, due.weight, before, delay.look_back)
    joined = due.marked[..., None]
    new_keys = torch.where(joined, new_keys.to(keys.dtype), keys)
    return new_keys, torch.where(joined, new_values.to(keys.dtype), values), log_size, newest


def _settle(
    pool: DevicePool,
    layer: int,
    chunk: _Chunk,
    known: Marks,
    stays: Tensor,
    length: Tensor,
    content: dict[str, Tensor],
    newest: Newest | None,
) -> None:
    """Write what is kept of the chunk's keys [H, n, ...] behind the entries that stay, and remember its end."""
    ring, delay = pool.ring, pool.delay
    assert ring is not None
    assert delay is not None
    kept = stays.clone()
    kept[:, max(0, kept.shape[1] - delay.tokens - 1) :] = True  # young ones, and the newest group
    index = length[:, None] + kept.cumsum(1, dtype=torch.int32) - 1
    for head in range(kept.shape[0]):
        its = kept[head]
        slots = _slots(pool, layer, chunk.seat, index[head : head + 1, its], head)
        for name, array in pool.arrays.items():
            _flat(array)[slots[0]] = content[name][head, its]
    pool.lengths[chunk.seat, layer] = index[:, -1] + 1
    first = max(0, chunk.stop - delay.tokens - 1)
    places = _places(pool, first, chunk.stop)
    for name, new in {"slots": index, **known._asdict()}.items():
        if getattr(ring, name) is not None:
            getattr(ring, name)[chunk.seat, layer, :, places] = new[:, first - chunk.first :]
    for held, now in zip((ring.members, ring.member_carry), newest or (None, None), strict=True):
        if held is not None and (now is not None or chunk.first == 0):
            held[chunk.seat, layer] = 0.0 if now is None else now  # 0: not what another sequence left


def _places(pool: DevicePool, start: int, stop: int) -> Tensor:
    """[stop - start] where positions stand in the ring."""
    assert pool.ring is not None
    return torch.arange(start, stop) % pool.ring.slots.shape[-1]


def _slots(pool: DevicePool, layer: int, seat: int, index: Tensor, head: int | None = None) -> Tensor:
    """[H, n] the pool's slots of entries number `index` of their streams, or [1, n] of one head's."""
    size, heads = pool.shape.page_size, slice(None) if head is None else slice(head, head + 1)
    pages = pool.page_table[seat, layer, heads].gather(-1, index.long() // size)
    assert bool((pages != FREE).all()), "no page was reserved"
    return pages.long() * size + index % size


def _flat(array: Tensor) -> Tensor:
    """[P * S, ...] one array, entry by entry."""
    return array.view(-1, *array.shape[2:])
