"""What a method really takes: bytes of a fresh process around one prompt, never the method's own word for it.

A process of its own for every method, so that no other cache, no earlier peak and no fragment of one is counted. On a
CPU (Linux) its anonymous pages are counted, the allocator is told to give freed tensors back at once (both thresholds
at 64 KiB), and what the heap has free is given back before each reading, so that what is counted is what is held; on a
GPU torch's allocator is asked. For kvpress the worker is that process.

The noise floor, measured with DynamicCache, whose tensors are known to the byte: SmolLM2-135M in float32, fed in chunks
of 512, three processes each, grew by 45.26 to 45.30 MiB for 45.0 MiB of tensors at 1,024 tokens and by 90.27 to 90.32
for 90.0 at 2,048. A peak holds activations too and spread over 1.4 MiB.

Without `trim` a pool of kvpleat keeps the pages that compressing freed. After a prompt of 2,048 in chunks of 512,
AttentionScore(ratio=4) held 24.7 MiB in pages and its process 72; after `trim`, 24.8.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpleat.accounting import storage_bytes
from kvpleat.bench.methods import Session, parse
from kvpleat.bench.methods.peer_worker import process_bytes
from kvpleat.bench.methods.peers import PeerSession
from kvpleat.errors import JudgeError, KvpleatError
from kvpleat.hf.models import load

CHUNK = 512  # tokens of the prompt fed at a time, by the methods that can
WARM = 256  # tokens of a first prompt, for what libraries allocate once: a chunk of them, or at least so many
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc; bytes


def can_measure(device: torch.device) -> bool:
    """Whether this system says what a process takes on a device."""
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process could still take on a device; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if not can_measure(device):
        return None
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def process_memory(
    model: str, spec: str, ids: Tensor, *, dtype: str, device: str, chunk: int | None = CHUNK
) -> dict[str, int]:
    """Bytes that a method takes for a prompt, measured in a fresh process.

    Args:
        model: name or folder, as for `load`. spec: of the method. ids: [R, T] the prompt.
        dtype, device: of the model.
        chunk: tokens fed at a time; None: all at once. kvpress's presses need the whole prompt and get it.

    Returns:
        process_bytes: growth of the process once the prompt was fed and compressed. trimmed_bytes: the same after the
        method was asked to give back what it does not need (`PleatedCache.trim`; others have nothing to ask for).
        peak_bytes: the highest growth until then. allocated_bytes, claimed_bytes, full_bytes: as in Memory.
        weights_bytes: of the model.

    Raises:
        JudgeError: the process failed, ran out of memory, or the system does not say what it takes.
    """
    if not can_measure(torch.device(device)):
        raise JudgeError(
            f"Memory of a process on {device} under {sys.platform} cannot be measured: it is read from Linux's /proc "
            "or asked of CUDA. Measure on one of these."
        )
    request = {"model": model, "spec": spec, "ids": ids.tolist(), "dtype": dtype, "device": device, "chunk": chunk}
    what = f"{spec} with {ids.shape[0]} x {ids.shape[1]} tokens"
    return in_fresh_process("kvpleat.bench.memory", request, what)


def in_fresh_process(module: str, request: dict[str, Any], what: str) -> dict[str, int]:
    """What `python -m module` answers to a request on its stdin, with the allocator told to give memory back.

    Args:
        request: JSON-ready; "threads" is added. what: is measured, for people.

    Raises:
        JudgeError: the process failed or ran out of memory.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        input=json.dumps({**request, "threads": torch.get_num_threads()}),
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = _last(done.stderr) if done.returncode > 0 else f"it was ended by signal {-done.returncode}"
        if done.returncode == -signal.SIGKILL:
            why += ", most likely for lack of memory"
        raise JudgeError(
            f"The process that measured the memory of {what} ended: {why}. "
            "Pass fewer tokens or rows, or leave the method out."
        )
    figures: dict[str, int] = json.loads(_last(done.stdout))
    return figures


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _measure(request: dict[str, Any]) -> dict[str, int]:
    """In the fresh process: what `process_memory` returns."""
    torch.set_num_threads(request["threads"])
    loaded = load(request["model"], dtype=request["dtype"], device=request["device"], progress=False)
    method, ids = parse(request["spec"]), torch.tensor(request["ids"], device=loaded.model.device)
    with method.open(loaded) as session:
        session.prefill(ids[:, : max(WARM, request["chunk"] or 0)])
    with method.open(loaded) as session:
        session.chunk = request["chunk"]
        before = _bytes(session, loaded.model.device, reset_peak=True)
        session.prefill(ids)
        after = _bytes(session, loaded.model.device)
        session.trim()
        trimmed = _bytes(session, loaded.model.device)["bytes"]
        memory = session.memory()
    return {
        "process_bytes": int(after["bytes"] - before["bytes"]),
        "trimmed_bytes": int(trimmed - before["bytes"]),
        "peak_bytes": int(after["peak_bytes"] - before["peak_bytes"]),
        "claimed_bytes": memory.claimed_bytes,
        "allocated_bytes": memory.allocated_bytes,
        "full_bytes": memory.full_bytes,
        "weights_bytes": storage_bytes(list(loaded.model.parameters())),
    }


def _bytes(session: Session, device: torch.device, *, reset_peak: bool = False) -> dict[str, int]:
    """Bytes now and at peak of the process that holds the session's cache."""
    if isinstance(session, PeerSession):
        return session.process_bytes(reset_peak=reset_peak)
    gc.collect()
    return process_bytes(device, reset_peak)


def main() -> None:
    """Answer the one request on stdin with one line on stdout; a failure is the last line of stderr."""
    answer_request(_measure)


def answer_request(measure: Callable[[dict[str, Any]], dict[str, int]]) -> None:
    """In the fresh process: read the request, measure, print."""
    with contextlib.suppress(OSError):  # not on Linux
        # If memory runs out, this process ends and not the one that waits for it.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    try:
        figures = measure(json.load(sys.stdin))
    except (KvpleatError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " "))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
