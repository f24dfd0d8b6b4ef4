"""Entries that leave one by one, a fixed number of tokens after their own, because gates marked them.

Each stream remembers which entries its last tokens wrote and how those were marked. A token that finds the oldest of
them leaving is written over it, so that the stream does not grow; its entries are then in no order. See
kvpleat.policies.learned for what is computed.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat import accounting
from kvpleat.cache.entries import Content, decode, encode, fit, packed, replaced
from kvpleat.kernels.delayed import Seen
from kvpleat.kernels.pooling import Newest, groups
from kvpleat.kernels.reference import Turn, turn
from kvpleat.types import Delay, KVShape, Marks

if TYPE_CHECKING:
    from kvpleat.cache.paged import PagedKVCache

EMPTY = -1  # no token was here yet


class DelayedState:
    """What the streams of some rows remember of their last W + 1 tokens (W: the delay) and of the groups before.

    Args:
        delay: what becomes of marked entries. shape: of the model. num_rows: sequences (R). device: where it lives.

    Attributes:
        tensors: by name. Of the token at position p, at p % (W + 1): "slots" [R, L, H, W + 1] number of its entry in
            the stream, "marked" (m). Where entries merge also "log_carry", "weight", and of the newest group
            "members" [R, L, H, K, 2 D + 1] and "member_carry" [R, L, H, K], see `kernels.pooling.Newest`.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(self, delay: Delay, shape: KVShape, num_rows: int, device: torch.device) -> None:
        self.delay = delay
        self.places: _Places | None = None  # of the last step
        streams = (num_rows, shape.num_layers, shape.num_kv_heads)
        ring = (*streams, delay.tokens + 1)
        self.tensors = {
            "slots": torch.full(ring, EMPTY, dtype=torch.int32, device=device),
            "marked": torch.zeros(ring, dtype=torch.bool, device=device),
        }
        if delay.merges:
            wide = torch.promote_types(shape.dtype, torch.float32)
            known = 1 if delay.look_back is None else delay.look_back - 1
            sums = (*streams, known, 2 * shape.head_dim + 1)
            self.tensors |= {
                "log_carry": torch.zeros(ring, device=device),
                "members": torch.zeros(sums, dtype=wide, device=device),
                "member_carry": torch.zeros(*streams, 0 if delay.look_back is None else known, device=device),
            }
        if delay.weighs:
            self.tensors["weight"] = torch.zeros(ring, device=device)

    def marks(self, layer: int, rows: int | slice, index: Tensor) -> Marks:
        """What was decided about the tokens at `index` of the ring: [r, H, n] or, for one row, [H, n]."""
        found = {name: self.tensors[name][rows, layer] for name in Marks._fields if name in self.tensors}
        return Marks(**{name: tensor.gather(-1, index) for name, tensor in found.items()})

    def note(self, layer: int, rows: int | slice, index: Tensor, slots: Tensor, marks: Marks) -> None:
        """Remember tokens at `index` of the ring, their entries in the streams, and what was decided about them."""
        for name, new in {"slots": slots.int(), **marks._asdict()}.items():
            if name in self.tensors and new is not None:
                self.tensors[name][rows, layer].scatter_(-1, index, new)

    def newest(self, layer: int, rows: int | slice) -> Newest:
        """What is known of the newest groups: views, [r, H, K, ...] or, for one row, [H, K, ...]."""
        return Newest(self.tensors["members"][rows, layer], self.tensors["member_carry"][rows, layer])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors of the same shapes."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is remembered."""
        return accounting.tensor_bytes(*self.tensors.values())

    def check_integrity(self, lengths: Tensor) -> None:
        """Raise AssertionError unless the remembered entries exist, each once: lengths [R, L, H] of the streams."""
        slots = self.tensors["slots"]
        known = slots != EMPTY
        assert bool((slots < lengths[..., None]).all()), "a remembered entry lies beyond its stream"
        assert bool(((slots >= 0) == known).all()), "a remembered entry lies before its stream"
        assert bool((known.sum(-1) == lengths.clamp(max=slots.shape[-1])).all()), "entries and tokens are miscounted"
        ordered = slots.sort(dim=-1).values
        same = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] != EMPTY)
        assert not bool(same.any()), "two tokens remember one entry"


class _Places(NamedTuple):
    """What follows from the positions of one token of each row.

    newest, oldest: [r, H, 1] where in the ring the token goes and where the one W tokens before it stands. later:
    [r, 1, 1] bool, whether the entry before it may leave. turn: how a key at the older one's position is rotated.
    """

    positions: list[int]
    newest: Tensor
    oldest: Tensor
    later: Tensor
    turn: Turn | None


def _places(kv: "PagedKVCache", positions: list[int]) -> _Places:
    delay, heads = _state(kv).delay.tokens, kv.shape.num_kv_heads
    new = torch.tensor(positions, device=kv.pool.device)[:, None, None]
    newest, oldest = (((new + i) % (delay + 1)).expand(-1, heads, 1) for i in range(2))
    return _Places(list(positions), newest, oldest, new > _state(kv).delay.sinks, _turn(kv, new - delay))


def step(
    kv: "PagedKVCache", layer: int, rows: slice, positions: list[int], keys: Tensor, values: Tensor, marks: Marks
) -> None:
    """Take in one token of each row: what leaves with it makes room for it.

    Args:
        rows: which rows of the cache.
        positions: of the tokens. keys, values: [r, H, 1, D] rotated. marks: [r, H, 1] each.
    """
    state = _state(kv)
    if state.places is None or state.places.positions != positions:  # all layers of a forward share them
        state.places = _places(kv, positions)
    at_new, at_old = state.places.newest, state.places.oldest
    marks = marks._replace(marked=marks.marked & state.places.later)
    due = state.marks(layer, rows, at_old) if state.delay.tokens else marks  # of the token that is W tokens old now
    leaving = state.tensors["slots"][rows, layer].gather(-1, at_new).long()
    grows = ~due.marked[..., 0]
    for i, counts in enumerate(grows.int().tolist()):
        kv.ensure_pages(layer, range(kv.num_rows)[rows][i], counts)
    index = torch.where(due.marked, leaving, kv.lengths[rows, layer, :, None].long())
    kv.lengths[rows, layer] += grows
    state.note(layer, rows, at_new, index, marks)
    content, slots = _encode_new(kv, keys, values), kv.slots(layer, rows, index)
    if not state.delay.merges or state.delay.tokens:
        _write(kv, slots, content)
    if not state.delay.merges:
        return
    if state.delay.tokens:
        slots = kv.slots(layer, rows, state.tensors["slots"][rows, layer].gather(-1, at_old).long().clamp(min=0))
        content = {name: kv.pool.slots(name)[slots] for name in kv.shape.arrays}
        keys, values = decode(content, kv.shape)
    joined, after = _join(kv, content, keys, values, state.places.turn, due, state.newest(layer, rows))
    _write(kv, slots, joined)
    _keep(state, layer, rows, after)


def extend(kv: "PagedKVCache", layer: int, row: int, start: int, keys: Tensor, values: Tensor, marks: Marks) -> Seen:
    """Take in T tokens of one row, and give back the pages of what leaves.

    Args:
        start: position of the first one. keys, values: [H, T, D] rotated. marks: [H, T] each.

    Returns:
        what each of the tokens sees.
    """
    state, shape = _state(kv), kv.shape
    delay, stop = state.delay.tokens, start + keys.shape[1]
    later = torch.arange(start, stop, device=keys.device) > state.delay.sinks
    marks = marks._replace(marked=marks.marked & later)  # the first entries stay
    past, past_live, young = _recall(kv, layer, row, start, marks)
    first = stop - young.marks.marked.shape[1]
    raw = _cat(young.content, _encode_new(kv, keys, values))
    count = max(0, stop - delay - first)  # tokens that are `delay` tokens old by the end: each forms a group
    raw_keys, raw_values = decode(raw, shape)
    alone = (raw_keys[:, :count], raw_values[:, :count]) if delay else (keys, values)
    formed, after = {name: x[:, :count] for name, x in raw.items()}, None
    if state.delay.merges and count:
        rotation = _turn(kv, torch.arange(first, first + count, device=keys.device))
        due = young.marks.each(lambda x: x[:, :count])
        formed, after = _join(kv, formed, *alone, rotation, due, state.newest(layer, row))
    stays = F.pad(~young.marks.marked, (0, 1), value=True)[:, 1 : count + 1]
    kept = stays.clone()
    kept[:, -1:] = True  # the newest group is not decided on yet
    kept = torch.cat([past_live, kept, torch.ones_like(young.marks.marked[:, count:])], dim=1)
    kv.rewrite(layer, row, kept, _cat(past, formed, {name: x[:, count:] for name, x in raw.items()}))
    if after is not None:
        _keep(state, layer, row, after)
    _remember(kv, layer, row, stop, young.marks)
    biases = (past["log_weight"], formed["log_weight"]) if state.delay.log_size else (None, None)
    groups_seen = decode(formed, shape) if state.delay.merges else None
    return Seen(first, decode(past, shape), past_live, (raw_keys, raw_values), groups_seen, stays, *biases)


class _Young(NamedTuple):
    """Tokens that are part of no group yet: their entries [H, n, ...], and their marks with those of the new tokens."""

    content: Content
    marks: Marks


def _recall(kv: "PagedKVCache", layer: int, row: int, start: int, marks: Marks) -> tuple[Content, Tensor, _Young]:
    """What the streams of one row hold as tokens come at `start`: entries that stay for good [H, N, ...], which of them
    are live, and the others."""
    state = _state(kv)
    delay = state.delay.tokens
    first = max(0, start - delay)  # the oldest token that is part of no group yet
    slots = state.tensors["slots"][row, layer]
    ring = _ring(first, start, delay, slots)
    waiting = slots.gather(-1, ring).long()
    known = _followed(state.marks(layer, row, ring), marks)
    stored, live = kv.stored(layer, row)
    young = {name: x.gather(1, fit(waiting, x).expand(-1, -1, *x.shape[2:])) for name, x in stored.items()}
    live = live.scatter(1, waiting, False)
    if start > delay:  # the newest group leaves where the next token takes it over
        newest = slots.gather(-1, _ring(first - 1, first, delay, slots)).long()
        live = live.scatter(1, newest, ~known.marked[:, :1])
    past, past_live = packed(stored, live)
    return past, past_live, _Young(young, known)


def _remember(kv: "PagedKVCache", layer: int, row: int, stop: int, marks: Marks) -> None:
    """Note the last W + 1 tokens before position `stop`, whose entries come last in the streams and whose `marks`
    [H, n] are the last of these."""
    state = _state(kv)
    first = max(0, stop - state.delay.tokens - 1)
    slots = kv.lengths[row, layer, :, None] - stop + torch.arange(first, stop, device=kv.pool.device)
    ring = _ring(first, stop, state.delay.tokens, slots)
    state.note(layer, row, ring, slots, marks.each(lambda x: x[:, x.shape[1] - stop + first :]))


# ---- helpers of both


def _state(kv: "PagedKVCache") -> DelayedState:
    assert kv.delayed is not None, "the cache was made without a delay"
    return kv.delayed


def _join(
    kv: "PagedKVCache",
    content: Content,
    keys: Tensor,
    values: Tensor,
    rotation: Turn | None,
    due: Marks,
    before: Newest,
) -> tuple[Content, Newest]:
    """`content` [..., n, ...] of tokens with each one's group in its place.

    Args:
        keys, values: [..., n, D] of the tokens alone. due: [..., n] what was decided about them.
    """
    assert due.log_carry is not None
    delay, dtype = _state(kv).delay, kv.shape.dtype
    carry = torch.where(due.marked, due.log_carry, -torch.inf)
    *means, log_size, after = groups(keys, values, rotation, carry, due.weight, before, delay.look_back)
    content = replaced(content, due.marked, encode(means[0].to(dtype), means[1].to(dtype), kv.shape))
    return content | ({"log_weight": log_size.float()} if delay.log_size else {}), after


def _turn(kv: "PagedKVCache", positions: Tensor) -> Turn | None:
    """How keys at `positions` are rotated, for `groups`; None: they are not, or nothing merges."""
    if kv.rotary is None or not _state(kv).delay.merges:
        return None
    return turn(positions, kv.rotary, torch.promote_types(kv.shape.dtype, torch.float32))


def _keep(state: DelayedState, layer: int, rows: int | slice, after: Newest) -> None:
    for old, new in zip(state.newest(layer, rows), after, strict=True):
        old.copy_(new)


def _encode_new(kv: "PagedKVCache", keys: Tensor, values: Tensor) -> Content:
    """What pages store of new tokens [..., T, D]."""
    content = encode(keys, values, kv.shape)
    none = {"log_weight": torch.zeros(keys.shape[:-1], device=keys.device)} if _state(kv).delay.log_size else {}
    return content | none


def _write(kv: "PagedKVCache", slots: Tensor, content: Content) -> None:
    """Write entries [r, H, 1, ...] into slots [r, H, 1] of the pool."""
    for name, tensor in content.items():
        kv.pool.slots(name).index_copy_(0, slots.flatten(), tensor.flatten(0, 2))


def _followed(old: Marks, new: Marks) -> Marks:
    """The marks of some tokens and those of the next: [H, n] and [H, T] -> [H, n + T]."""
    rest = (None if x is None or y is None else torch.cat([x, y], 1) for x, y in zip(old[1:], new[1:], strict=True))
    return Marks(torch.cat([old.marked, new.marked], 1), *rest)


def _ring(start: int, stop: int, delay: int, like: Tensor) -> Tensor:
    """[H, stop - start] where positions from `start` to `stop` stand in the ring of each head of `like` [H, ...]."""
    index = torch.arange(start, stop, device=like.device) % (delay + 1)
    return index.expand(like.shape[0], -1)


def _cat(*contents: Content) -> Content:
    return {name: torch.cat([content[name] for content in contents], dim=1) for name in contents[0]}
