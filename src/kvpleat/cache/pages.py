"""The page pool: one pool for all streams of a model, an allocator, and the check that it never lies.

A page is `page_size` entries of one stream. The allocator's state is the tensor `owner`; who owns which page is decided
here and nowhere else.
"""

import numpy as np
import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.cache.memory import GrowableArray, physical_memory
from kvpleat.errors import OutOfPagesError
from kvpleat.types import KVShape

FREE = -1
GROWTH = 1.5  # of arrays that grow by copying


class PagePool:
    """Pages of what `shape.arrays` lists: keys and values, or their codes, and the side arrays a policy asked for.

    Args:
        shape: the model's KV shape.
        device: where the pages live.
        max_pages: upper limit of the pool; None: what the machine's memory holds.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(self, shape: KVShape, device: torch.device, max_pages: int | None = None) -> None:
        self.shape = shape
        self.device = device
        self.page_bytes = accounting.page_bytes(shape)
        fits = physical_memory() // self.page_bytes if device.type == "cpu" else None
        self.max_pages = min(x for x in (max_pages, fits, 2**31 - 1) if x is not None)
        self.owner = torch.empty(0, dtype=torch.int32, device=device)  # [P] owner id of each page, or FREE
        self.backed = torch.empty(0, dtype=torch.bool, device=device)  # [P] False once trim gave the page's memory back
        self.in_use = 0
        self.arrays = {
            name: GrowableArray((shape.page_size, *item), dtype, device, self.max_pages)
            for name, (item, dtype) in shape.arrays.items()
        }

    @property
    def num_pages(self) -> int:
        """Pages that exist, owned or free."""
        return self.owner.numel()

    def slots(self, name: str) -> Tensor:
        """[P * S, ...] one array of the pool, entry by entry: a name of `shape.arrays`."""
        tensor = self.arrays[name].tensor
        return tensor.view(-1, *tensor.shape[2:])

    def allocate(self, counts: list[int], owner: int) -> list[Tensor]:
        """Take pages for several streams; each stream gets one run of neighbours where the pool has one.

        Args:
            counts: pages per stream, zeros allowed.
            owner: id (>= 0) that the pages belong to until freed.

        Returns:
            per stream the page numbers, int32, ascending within a run.

        Raises:
            OutOfPagesError: the pool cannot grow that far; nothing was taken.
        """
        runs = self._find(counts)
        for run in runs:
            self.owner[run.long()] = owner
            self.backed[run.long()] = True
        self.in_use += sum(counts)
        return runs

    def free(self, pages: Tensor) -> None:
        """Give pages back to the pool: [n] page numbers. Their memory stays with the pool until `trim`."""
        self.owner[pages.long()] = FREE
        self.in_use -= pages.numel()

    @property
    def shrinks_in_place(self) -> bool:
        """Whether `trim` gives pages back one by one (Linux CPU), without copying what stays."""
        return self.arrays["key"].kind == "reserved"

    @torch.inference_mode(False)
    def trim(self) -> int:
        """Give the memory of free pages back to the system. Returns the bytes given back.

        Only reserved arrays (Linux CPU) can do it page by page; others give back the free tail of the pool.
        """
        if self.shrinks_in_place:
            idle = torch.nonzero((self.owner == FREE) & self.backed).squeeze(1)
            self.backed[idle] = False
            return sum(
                array.give_back(start, stop) for start, stop in _runs(idle.numpy()) for array in self.arrays.values()
            )
        used = torch.nonzero(self.owner != FREE).squeeze(1)
        last = int(used[-1]) + 1 if used.numel() else 0
        given_back = (self.arrays["key"].capacity - last) * self.page_bytes
        self.owner, self.backed = self.owner[:last].clone(), self.backed[:last].clone()
        for array in self.arrays.values():
            array.replace(array.tensor[:last].clone())
        return given_back

    def check_integrity(self, owned: dict[int, Tensor]) -> None:
        """Raise AssertionError unless every page is owned once or free and all counts add up.

        Args:
            owned: for each owner id, the page numbers it believes to own.
        """
        seen = torch.zeros(self.num_pages, dtype=torch.int64, device=self.device)
        for owner, pages in owned.items():
            pages = pages.long()
            assert bool((self.owner[pages] == owner).all()), f"owner {owner} holds pages that the pool gave to another"
            seen.index_add_(0, pages, torch.ones_like(pages))
        assert int(seen.max() if seen.numel() else 0) <= 1, "a page has two owners"
        assert bool(((self.owner == FREE) == (seen == 0)).all()), "a page is neither free nor owned"
        assert int(seen.sum()) == self.in_use, f"{int(seen.sum())} pages owned, {self.in_use} counted"
        assert self.num_pages <= min(array.capacity for array in self.arrays.values()), "pages without memory"

    def _find(self, counts: list[int]) -> list[Tensor]:
        """Free pages for each count: the first run that is long enough, else the lowest pages; grows as needed."""
        self.require(sum(counts))
        self._extend(sum(counts) - (self.num_pages - self.in_use))
        free_pages = torch.nonzero(self.owner == FREE).squeeze(1).to(torch.int32)
        if self.device.type != "cpu":  # kernels there follow the page table: order costs nothing, a search would
            return list(free_pages[: sum(counts)].split(counts))
        runs = [list(run) for run in _runs(free_pages.numpy())]
        found: list[Tensor] = []
        for count in counts:
            fitting = next((run for run in runs if run[1] - run[0] >= count), None)
            if fitting is None:
                found.append(_take_pieces(runs, count))
            else:
                found.append(torch.arange(fitting[0], fitting[0] + count, dtype=torch.int32))
                fitting[0] += count
        return found

    def require(self, more: int) -> None:
        """Raise OutOfPagesError unless the pool can hold `more` pages than are in use."""
        wanted = self.in_use + more
        if more > 0 and wanted > self.max_pages:
            raise OutOfPagesError(
                f"{wanted} pages of {accounting.human_bytes(self.page_bytes)} are needed and the pool may hold "
                f"{self.max_pages} ({accounting.human_bytes(self.max_pages * self.page_bytes)}). Shorten the batch or "
                "the context, raise the compression ratio, or release caches that are no longer used."
            )

    @torch.inference_mode(False)
    def _extend(self, missing: int) -> None:
        """Add `missing` pages to the pool."""
        if missing <= 0:
            return
        wanted = self.num_pages + missing
        for array in self.arrays.values():
            if array.capacity < wanted:
                array.grow(min(self.max_pages, max(wanted, int(array.capacity * GROWTH))))
        added = torch.full((missing,), FREE, dtype=torch.int32, device=self.device)
        self.owner = torch.cat([self.owner, added])
        self.backed = torch.cat([self.backed, torch.zeros_like(added, dtype=torch.bool)])


def _runs(pages: np.ndarray) -> list[tuple[int, int]]:
    """Half-open runs of neighbours in ascending page numbers."""
    if not len(pages):
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = pages[np.concatenate([[0], breaks])]
    stops = pages[np.concatenate([breaks - 1, [len(pages) - 1]])] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _take_pieces(runs: list[list[int]], count: int) -> Tensor:
    """`count` pages from the longest runs first, so that a stream falls into few pieces."""
    pieces = []
    for run in sorted(runs, key=lambda r: r[0] - r[1]):
        taken = min(count, run[1] - run[0])
        pieces.append(torch.arange(run[0], run[0] + taken, dtype=torch.int32))
        run[0] += taken
        count -= taken
        if not count:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
