"""The cache of a worker: a `DevicePool` for all its layers, over the memory that vLLM allocated.

Requests find their rows by a table from the number of their first block to a seat, which stands on the device, since a
batch of vLLM's is in another order in every step. All tensors but the pages are made with the model, so that vLLM
counts them as its memory and not as the cache's.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpleat.errors import CacheError
from kvpleat.kernels import decode, update
from kvpleat.kernels.decode import Work
from kvpleat.kernels.device_pool import DevicePool, new_pool
from kvpleat.types import Delay, KVShape, Rotary
from kvpleat.vllm.ledger import Changes
from kvpleat.vllm.metrics import Usage

Fed = list[tuple[str, int, int, int]]  # (request, seat, birth, tokens after the step)
REPORTED = 8  # of so many steps without prompts, one is reported; with those on their way fewer than a page has entries


class Asked(NamedTuple):
    """A question to the device. seated: all requests, whether or not the step fed them: stages of a pipeline feed some
    in one step and others in the next. held: [R + 4] blocks of each row, pages of all, entries of all and of the
    fullest head, and missing pages; on the host once `done` has come."""

    seated: Fed
    held: Tensor
    done: Any


class Memory:
    """See above.

    Args:
        shape: of this worker's layers and heads. delay: of the policy.
        seats: requests at a time. length: of a request, in tokens.
        tokens: of the largest step. outputs: numbers of a gate; 0: there are no gates, all entries are marked.
        rotary: how keys are rotated, where entries merge.
    """

    def __init__(
        self,
        shape: KVShape,
        delay: Delay,
        seats: int,
        length: int,
        tokens: int,
        outputs: int,
        rotary: Rotary | None,
        device: torch.device,
    ) -> None:
        self.shape, self.delay, self.device = shape, delay, device
        self.rotary = None if rotary is None else Rotary(rotary.inv_freq.to(device))
        self.pool: DevicePool = new_pool(shape, delay, seats, 1, length, device)
        self.said = torch.ones(max(1, outputs), tokens, shape.num_kv_heads, dtype=torch.float32, device=device)
        self._seat_of = torch.full((1,), -1, dtype=torch.int32, device=device)
        self._works: dict[int, Work] = {}
        self._asked: deque[Asked] = deque()
        self._seated: dict[int, tuple[str, int, int, int]] = {}  # by seat, as it was last fed
        self._steps = 0
        self.live = False  # whether a step with requests runs, and no rehearsal of vLLM's

    @property
    def entry_bytes(self) -> int:
        """Of a key, its value and what stands beside them."""
        return sum(torch.empty(item, dtype=dtype).nbytes for item, dtype in self.shape.arrays.values())

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def bind(self, memory: Tensor) -> None:
        """Take over vLLM's tensor: blocks, streams, entries of a page, bytes of an entry in any order of these."""
        raw = memory.flatten().view(torch.uint8) if memory.is_contiguous() else _storage(memory)
        blocks = memory.shape[0]
        pages, start = blocks * self.shape.num_streams, 0
        arrays = {}
        for name, (item, dtype) in self.shape.arrays.items():
            size = pages * self.shape.page_size * torch.empty(item, dtype=dtype).nbytes
            arrays[name] = raw[start : start + size].view(dtype).view(pages, self.shape.page_size, *item)
            start += size
        if start > raw.numel():
            raise CacheError(f"vLLM gave {raw.numel()} bytes for {blocks} blocks, which need {start}.")

        def ints(size: int, fill: int) -> Tensor:
            return torch.full((size,), fill, dtype=torch.int32, device=self.device)

        self.pool = replace(
            self.pool,
            arrays=arrays,
            holders=ints(pages, 0),
            free_pages=torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=self.device),
            free_count=ints(1, pages),
        )
        self._seat_of = ints(blocks, -1)

    def seats(self, first_blocks: Tensor) -> Tensor:
        """[n] int32 rows of the pool of requests by their first blocks [n]; -1: nobody's."""
        known: Tensor = self._seat_of[first_blocks.clamp(min=0, max=self._seat_of.shape[0] - 1).long()]
        return known

    def work(self, rows: int) -> Work:
        """Room to plan the attention of so many rows."""
        if rows not in self._works:
            self._works[rows] = decode.room(
                self.pool.lengths, self.shape.head_dim, self.shape.dtype, self.shape.page_size, rows=rows
            )
        return self._works[rows]

    # ---- between steps

    @torch.inference_mode()
    def begin_step(self, changes: Changes, live: bool) -> None:
        """Empty the rows of requests that ended, and note where others sit."""
        self.live = live
        for seat in changes.released:
            self._seated.pop(seat, None)
        if changes.released:
            update.release(self.pool, self._sent(changes.released))
        if changes.seated:
            seats, blocks = self._sent([list(x) for x in zip(*changes.seated, strict=True)])
            self._seat_of[blocks.long()] = seats

    @torch.inference_mode()
    def end_step(self, fed: Fed, has_prompts: bool) -> None:
        """Ask what rows hold after the step that was launched."""
        self.live = False
        self._steps += 1
        self._seated |= {item[1]: item for item in fed}
        if not fed or not (has_prompts or self._steps % REPORTED == 0):
            return
        streams, pages = self.shape.num_streams, self.pool.num_pages.sum((1, 2))
        entries = self.pool.lengths.sum(0)  # rows that were released have none
        held = (pages + streams - 1) // streams
        answer = torch.cat([held, torch.stack([pages.sum(), entries.sum(), entries.max(), self.pool.failed[0]])])
        seated = list(self._seated.values())
        if self.device.type != "cuda":
            self._asked.append(Asked(seated, answer, None))
            return
        host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
        host.copy_(answer, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._asked.append(Asked(seated, host, done))

    def known(self) -> Iterator[tuple[Fed, list[int], Usage]]:
        """What is known by now, by step: who sat where, the blocks of each seat, and the use of memory."""
        while self._asked and (self._asked[0].done is None or self._asked[0].done.query()):
            asked = self._asked.popleft()
            *held, pages, entries, most, missing = asked.held.tolist()
            if missing:
                raise CacheError(
                    f"{missing} pages of the KV cache were missing in a step, so what it computed is void. The "
                    "scheduler charged less than requests took: this is a bug of kvpleat, please report your settings."
                )
            yield asked.seated, held, self._usage(asked.seated, pages, entries, most)

    def _usage(self, seated: Fed, pages: int, entries: int, most: int) -> Usage:
        """Of all who sit somewhere; requests that just ended are among them until workers hear of it."""
        streams, size = self.shape.num_streams, self.entry_bytes
        full = sum(tokens for *_, tokens in seated) * streams * 2 * self.shape.head_dim * self.shape.dtype.itemsize
        return Usage(full, entries * size, pages * self.shape.page_size * size, most, entries, streams)

    def _sent(self, numbers: Any) -> Tensor:
        x = torch.tensor(numbers, dtype=torch.int32)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x


def _storage(memory: Tensor) -> Tensor:
    """The bytes behind a tensor whose axes stand in another order, without holes."""
    order = sorted(range(memory.dim()), key=memory.stride, reverse=True)
    straight = memory.permute(order)
    if not straight.is_contiguous():
        raise CacheError(f"vLLM's KV cache has holes: shape {tuple(memory.shape)}, strides {memory.stride()}.")
    return straight.flatten().view(torch.uint8)
