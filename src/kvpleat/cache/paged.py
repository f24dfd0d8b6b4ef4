"""PagedKVCache: the streams of some rows over the shared page pool. The sole owner of their entries.

Every (row, layer, KV head) is a stream with its own length and pages; the entries of a stream are in order of position,
except where they leave one by one (cache/delayed.py). Policies never come here: callers hand over what to append and
which Decision to apply.
"""

import itertools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.cache.delayed import DelayedState
from kvpleat.cache.entries import Content, Entries, decode, encode, masked, merged, packed
from kvpleat.cache.observed import ObservedQueries
from kvpleat.cache.pages import FREE, PagePool
from kvpleat.errors import CacheError
from kvpleat.types import Decision, Delay, KVShape, Rotary

_owner_ids = itertools.count()


class PagedKVCache:
    """Entries of `num_rows` sequences.

    Args:
        pool: where the pages come from; shared by all caches of a model.
        num_rows: sequences (R).
        observation_window: last queries to remember per row and layer (W), 0 for none.
        rotary: how keys rotate when entries merge; None for models without rotary embedding.
        delay: what becomes of marked entries, where entries leave one by one; None: they leave at moments.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(
        self,
        pool: PagePool,
        num_rows: int,
        observation_window: int = 0,
        rotary: Rotary | None = None,
        delay: Delay | None = None,
    ) -> None:
        self.pool, self.shape, self.num_rows = pool, pool.shape, num_rows
        self.rotary = rotary
        self.owner = next(_owner_ids)
        streams = (num_rows, self.shape.num_layers, self.shape.num_kv_heads)
        device = pool.device
        self.page_table = torch.full((*streams, 0), FREE, dtype=torch.int32, device=device)  # [R, L, H, M]
        self.num_pages = torch.zeros(streams, dtype=torch.int32, device=device)  # [R, L, H] pages of each stream
        self.lengths = torch.zeros(streams, dtype=torch.int32, device=device)  # [R, L, H] entries of each stream
        self.observed = ObservedQueries(self.shape, num_rows, observation_window, device)
        self.delayed = None if delay is None else DelayedState(delay, self.shape, num_rows, device)
        self.pages_in_use = self.peak_pages = 0
        self.closed = False
        self._pieces: dict[tuple[int, int, int], list[list[int]]] = {}  # host copy of the page table, as runs of slots
        self._finalizer = weakref.finalize(self, _free_all, pool, self.owner)

    # ---- reading

    def entries(self, layer: int, row: int) -> Entries:
        """The entries of one layer of one row."""
        stored, live = self.stored(layer, row)
        keys, values = decode(stored, self.shape)
        return Entries(live, keys, values, {name: stored[name] for name in self.shape.fields})

    def fields(self, layer: int, row: int) -> tuple[dict[str, Tensor], Tensor]:
        """All side arrays of one layer of one row, without keys and values: [H, N] each, and [H, N] live."""
        return self.stored(layer, row, self.shape.fields)

    def stored(self, layer: int, row: int, names: Iterable[str] | None = None) -> tuple[Content, Tensor]:
        """Arrays of one layer of one row as pages hold them, all or those of `names`: [H, N, ...] each, zeros in holes;
        and [H, N] live."""
        slots, live = self._slots(layer, row)
        names = self.shape.arrays if names is None else names
        return masked({name: self.pool.slots(name)[slots] for name in names}, live), live

    def pieces(self, layer: int, row: int, head: int) -> list[list[int]]:
        """Runs of slots [first, count] that a stream occupies, in order; the last may reach past its length."""
        return self._pieces.get((row, layer, head), [])

    def _slots(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """[H, N] slot of each entry (0 for holes) and [H, N] live."""
        lengths = self.lengths[row, layer]
        index = torch.arange(int(lengths.max()), device=self.pool.device)
        live = index < lengths[:, None]
        return torch.where(live, self.slots(layer, row, index.expand_as(live)), 0), live

    def slots(self, layer: int, rows: int | slice | list[int], index: Tensor) -> Tensor:
        """The pool's slots of entries number `index` of their streams: [r, H, n] or, for one row, [H, n]."""
        pages = self.page_table[rows, layer].gather(-1, index // self.shape.page_size).long()
        return pages * self.shape.page_size + index % self.shape.page_size

    # ---- writing

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Append T entries to every stream of one layer of one row.

        Args:
            keys, values: [H, T, D] after rotary embedding.
            positions: [T] int32 token positions, ascending and above all positions in the streams.

        Returns:
            keys and values [H, T, D] as they will be read from now on: attention must see these, and not those that
            were passed, or the result would depend on how a prompt is cut into chunks.
        """
        content = self.append_rows(layer, [row], keys[None], values[None], positions[None])
        stored_keys, stored_values = decode(content, self.shape)
        return stored_keys[0], stored_values[0]

    def append_rows(self, layer: int, rows: list[int], keys: Tensor, values: Tensor, positions: Tensor) -> Content:
        """`append` for several rows at once: keys and values [r, H, T, D], positions [r, T]. Returns what was stored of
        keys and values."""
        self._check_open()
        num_new = keys.shape[2]
        for row in rows:
            self.ensure_pages(layer, row, [num_new] * self.shape.num_kv_heads)
        index = self.lengths[rows, layer].long()[..., None] + torch.arange(num_new, device=self.pool.device)
        slots = self.slots(layer, rows, index).flatten()
        content = encode(keys, values, self.shape)
        for name, tensor in content.items():
            self.pool.slots(name).index_copy_(0, slots, tensor.flatten(0, 2))
        new = {"position": positions[:, None].expand(index.shape).flatten(), "log_weight": 0.0, "score": float("nan")}
        for name in self.shape.fields:
            self.pool.slots(name)[slots] = new[name]  # type: ignore[assignment]  # tensor or number, both are allowed
        self.lengths[rows, layer] += num_new
        return content

    def apply(self, layer: int, row: int, decision: Decision) -> None:
        """Carry out a policy's decision on one layer of one row: merge, evict, compact, and return the pages."""
        self._check_open()
        slots, live = self._slots(layer, row)
        if decision.scores is not None:
            self.pool.slots("score")[slots[live]] = decision.scores[live]
        if decision.merge_into is None and bool((decision.keep | ~live).all()):
            return
        content, _ = self.stored(layer, row)
        if decision.merge_into is not None:
            content = merged(content, live, decision, self.shape, self.rotary)
        self.rewrite(layer, row, decision.keep & live, content, decision.reserve)

    def rewrite(self, layer: int, row: int, keep: Tensor, new: Content, reserve: int = 0) -> None:
        """Replace the streams of one layer of one row by the kept entries of `new` [H, N, ...], in order, in fresh
        pages: `keep` is [H, N]."""
        counts = keep.sum(dim=1)
        content, kept = packed(new, keep)
        needed = -(-(counts + reserve) // self.shape.page_size) * (counts + reserve > 0)
        self.pool.require(int(needed.sum()) - int(self.num_pages[row, layer].sum()))  # before anything is given up
        self._release_streams(layer, row)
        self._give_pages(layer, row, needed.tolist())
        self.lengths[row, layer] = counts.int()
        slots, _ = self._slots(layer, row)
        for name, tensor in content.items():
            self.pool.slots(name)[slots[kept]] = tensor[kept]

    def fill(self, layer: int, row: int, counts: list[int], content: Content) -> None:
        """Fill the empty streams of one layer of one row: counts[h] entries each, `content` [sum(counts), ...] by
        array."""
        self._give_pages(layer, row, [-(-count // self.shape.page_size) for count in counts])
        self.lengths[row, layer] = torch.tensor(counts, dtype=torch.int32, device=self.pool.device)
        slots, live = self._slots(layer, row)
        for name, tensor in content.items():
            self.pool.slots(name)[slots[live]] = tensor

    # ---- pages

    def ensure_pages(self, layer: int, row: int, num_new: list[int]) -> None:
        """Take the pages that num_new[h] more entries of each stream of one layer of one row need."""
        lengths, held = self.lengths[row, layer].tolist(), self.num_pages[row, layer].tolist()
        size = self.shape.page_size
        missing = [max(0, -(-(n + new) // size) - h) for n, new, h in zip(lengths, num_new, held, strict=True)]
        if any(missing):
            self._give_pages(layer, row, missing)

    @torch.inference_mode(False)
    def _give_pages(self, layer: int, row: int, counts: list[int]) -> None:
        """Add counts[h] pages to each stream of one layer of one row."""
        runs = self.pool.allocate(counts, self.owner)
        held = self.num_pages[row, layer].tolist()
        longest = max(h + c for h, c in zip(held, counts, strict=True))
        if longest > self.page_table.shape[-1]:
            room = max(longest, 2 * self.page_table.shape[-1]) - self.page_table.shape[-1]
            more = self.page_table.new_full((*self.page_table.shape[:-1], room), FREE)
            self.page_table = torch.cat([self.page_table, more], dim=-1)
        for head, (run, start) in enumerate(zip(runs, held, strict=True)):
            self.page_table[row, layer, head, start : start + len(run)] = run
            self._note_pieces((row, layer, head), run)
        self.num_pages[row, layer] += torch.tensor(counts, dtype=torch.int32, device=self.pool.device)
        self.pages_in_use += sum(counts)
        self.peak_pages = max(self.peak_pages, self.pages_in_use)

    def _note_pieces(self, stream: tuple[int, int, int], run: Tensor) -> None:
        if self.pool.device.type != "cpu":
            return
        size, pieces = self.shape.page_size, self._pieces.setdefault(stream, [])
        for page in run.tolist():
            if pieces and pieces[-1][0] + pieces[-1][1] == page * size:
                pieces[-1][1] += size
            else:
                pieces.append([page * size, size])

    def _release_streams(self, layer: int, row: int) -> None:
        """Free all pages of one layer of one row; its streams are empty afterwards."""
        table = self.page_table[row, layer]
        pages = table[table != FREE]
        self.pool.free(pages)
        self.pages_in_use -= pages.numel()
        table.fill_(FREE)
        self.num_pages[row, layer] = 0
        self.lengths[row, layer] = 0
        for head in range(self.shape.num_kv_heads):
            self._pieces.pop((row, layer, head), None)

    # ---- life

    def fork(self) -> "PagedKVCache":
        """An independent copy on the same pool."""
        self._check_open()
        delay = None if self.delayed is None else self.delayed.delay
        twin = PagedKVCache(self.pool, self.num_rows, self.observed.window, self.rotary, delay)
        twin.observed.copy_from(self.observed)
        if self.delayed is not None and twin.delayed is not None:
            twin.delayed.load(self.delayed.tensors)
        for row, layer in itertools.product(range(self.num_rows), range(self.shape.num_layers)):
            twin._give_pages(layer, row, self.num_pages[row, layer].tolist())
            old, new = (
                table[table != FREE].long() for table in (self.page_table[row, layer], twin.page_table[row, layer])
            )
            for array in self.pool.arrays.values():
                array.tensor[new] = array.tensor[old]
        twin.lengths.copy_(self.lengths)
        return twin

    def release(self) -> None:
        """Return every page to the pool. The cache cannot be used afterwards."""
        if not self.closed:
            self._finalizer()
            self.pages_in_use, self.closed = 0, True
            self.lengths.zero_()
            self.num_pages.zero_()

    def owned_pages(self) -> Tensor:
        """[n] every page this cache holds, for the pool's integrity check."""
        return self.page_table[self.page_table != FREE] if not self.closed else self.page_table[:0].flatten()

    def check_integrity(self) -> None:
        """Raise AssertionError unless lengths, page counts, page table and host copy agree."""
        if self.closed:
            return
        size = self.shape.page_size
        assert bool((self.lengths <= self.num_pages * size).all()), "a stream is longer than its pages"
        assert bool(((self.page_table != FREE).sum(-1) == self.num_pages).all()), "page table and counts differ"
        assert self.owned_pages().numel() == self.pages_in_use, "pages in use are miscounted"
        for (row, layer, head), pieces in self._pieces.items():
            slots = [slot for first, count in pieces for slot in range(first, first + count, size)]
            table = self.page_table[row, layer, head]
            assert slots == (table[table != FREE] * size).tolist(), "the host copy of the page table differs"
        if self.delayed is not None:
            self.delayed.check_integrity(self.lengths)

    def memory(self, seen_tokens: int, untouched_bytes: int = 0) -> accounting.MemoryReport:
        """Memory of this cache for `seen_tokens` tokens summed over rows.

        Args:
            untouched_bytes: bytes of layers that kvpleat leaves as they are; they count as full, live and allocated.
        """
        shape: KVShape = self.shape
        entry, page = accounting.entry_bytes(shape), accounting.page_bytes(shape)
        return accounting.MemoryReport(
            full_bytes=accounting.full_bytes(shape, seen_tokens) + untouched_bytes,
            live_bytes=int(self.lengths.sum()) * entry + untouched_bytes,
            allocated_bytes=self.pages_in_use * page + untouched_bytes,
            peak_allocated_bytes=self.peak_pages * page + untouched_bytes,
            overhead_bytes=accounting.tensor_bytes(self.page_table, self.num_pages, self.lengths)
            + self.observed.num_bytes
            + (0 if self.delayed is None else self.delayed.num_bytes)
            + 4 * self.pages_in_use,
            kept=self.lengths.float().mean(0).cpu(),
            seen_tokens=seen_tokens,
        )

    def _check_open(self) -> None:
        if self.closed:
            raise CacheError(
                "This cache was released and holds no entries any more. Make a new one: pleated.new_cache()."
            )


def _free_all(pool: PagePool, owner: int) -> None:
    """Finalizer: give back what a cache owns, by the pool's own records."""
    pages = torch.nonzero(pool.owner == owner).squeeze(1)
    if pages.numel():
        pool.free(pages)
