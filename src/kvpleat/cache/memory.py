"""Growable arrays for the page pool: memory that grows without copying and is really given back.

On Linux CPUs an array reserves address space once and the kernel backs it with memory as it is first written; giving a
range back is one system call, and the process shrinks by exactly that. Elsewhere an array grows by copying.
"""

import mmap
import os
import sys

import torch
from torch import Tensor

OS_PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it before Python 3.13


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class GrowableArray:
    """[count, *item_shape] on one device, whose first dimension grows and whose unused rows can be given back.

    Args:
        item_shape: shape of one row.
        dtype, device: of the tensor.
        reserve_rows: rows of address space to reserve where the platform can (Linux CPU); 0 never reserves.
    """

    def __init__(
        self, item_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, reserve_rows: int
    ) -> None:
        self.item_shape = item_shape
        self.row_bytes = dtype.itemsize * int(torch.Size(item_shape).numel())
        self._map: mmap.mmap | None = None
        if device.type == "cpu" and sys.platform == "linux" and reserve_rows:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            try:
                self._map = mmap.mmap(-1, reserve_rows * self.row_bytes, flags=flags)
            except OSError:  # strict overcommit: grow by copying instead; `kind` says so
                self._map = None
        if self._map is not None:
            self.tensor = torch.frombuffer(self._map, dtype=dtype).view(-1, *item_shape)
        else:
            self.tensor = torch.empty(0, *item_shape, dtype=dtype, device=device)

    @property
    def kind(self) -> str:
        """How this array grows: "reserved" address space or "copied"."""
        return "reserved" if self._map is not None else "copied"

    @property
    def capacity(self) -> int:
        """Rows that exist now."""
        return self.tensor.shape[0]

    def grow(self, rows: int) -> None:
        """Make room for `rows` rows in all. Raises MemoryError (or torch's own) where the device has no more."""
        if rows <= self.capacity:
            return
        if self._map is not None:
            raise MemoryError(f"{rows} rows of {self.row_bytes} bytes are more than this machine's memory")
        bigger = torch.empty(rows, *self.item_shape, dtype=self.tensor.dtype, device=self.tensor.device)
        bigger[: self.capacity] = self.tensor
        self.tensor = bigger

    def give_back(self, start: int, stop: int) -> int:
        """Return the memory of rows [start, stop) to the system, as far as it fills pages of the operating system.

        The rows' content is lost. Only reserved arrays do it. Returns the bytes given back.
        """
        if self._map is None:
            return 0
        first = -(-start * self.row_bytes // OS_PAGE) * OS_PAGE
        last = stop * self.row_bytes // OS_PAGE * OS_PAGE
        if last <= first:
            return 0
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        return last - first

    def replace(self, tensor: Tensor) -> None:
        """Take `tensor` as the new content (arrays that grow by copying shrink this way)."""
        self.tensor = tensor
