"""The floor of a decode step: the bytes it cannot avoid reading, over the bandwidth that this machine was measured at.

A step reads every weight once, whatever the batch, and every live entry of every row. No arithmetic is counted, so the
floor is what memory alone would allow.
"""

import time
from typing import Any

import torch

from kvpleat.accounting import full_entry_bytes, storage_bytes
from kvpleat.bench.methods import Memory
from kvpleat.types import KVShape

COPIED = 2**29  # bytes of the copy: far beyond any cache of a processor
TRIES = 5


def now(device: torch.device) -> float:
    """Seconds on a clock, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, both counted; the best of five."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(TRIES):
        start = now(device)
        target.copy_(source)
        best = min(best, now(device) - start)
    return 2 * COPIED / best


def weights_read(model: Any) -> int:
    """Bytes of the weights that a step reads: all but an embedding that is only looked up in (one not tied to the
    output), since a step reads one row of it for each token."""
    looked_up = model.get_input_embeddings().weight
    tied = looked_up is model.get_output_embeddings().weight
    return storage_bytes(list(model.parameters())) - (0 if tied else storage_bytes([looked_up]))


def live_bytes(memory: Memory, shape: KVShape, rows: int, tokens: int) -> int:
    """Bytes of the entries that attention can read: those of the full cache less what was evicted, but never more than
    the method claims to keep (entries of fewer bits are smaller than those of a full cache).

    Args:
        memory: of a session that has seen `tokens` tokens in each of `rows` rows. Where it does not say what each head
            kept, everything that is allocated is read.
        shape: of the model's entries.
    """
    if memory.kept is None:
        return memory.allocated_bytes
    evicted = sum(tokens - kept for layer in memory.kept for kept in layer)
    return min(memory.full_bytes - round(rows * evicted * full_entry_bytes(shape)), memory.claimed_bytes)
