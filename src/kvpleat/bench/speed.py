"""Decode speed and prefill memory beside transformers' DynamicCache: `python -m kvpleat.bench.speed --help`.

Both caches are filled with the same real text by the same weights, then decode alternately, one step each, so that
whatever else the machine does falls on both. The floor is printed first: bytes of weights and of live entries over the
measured copy bandwidth. A speed is refused when kvpleat's own full cache does not give DynamicCache's logits in the
same run.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

from kvpleat import Pleated, compress, policies
from kvpleat.accounting import human_bytes
from kvpleat.bench.quality import parse_policy, token_windows
from kvpleat.errors import NumericsError
from kvpleat.hf.models import load

CHUNK = 512  # tokens of a prefill chunk where peak memory is measured, for both sides
FILL_CHUNK = 2048  # tokens of a chunk where the caches are only filled, which takes minutes on a CPU


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes; the best of five."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def share_weights(model: Any) -> Any:
    """A second model object on the same weight tensors, so that two caches can be served in turns."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict(), assign=True, strict=True)
    for name, buffer in model.named_buffers():  # rotary tables are not in the state dict
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, buffer)
    twin.tie_weights()
    return twin.eval()


@torch.no_grad()
def prefill_dynamic(model: nn.Module, ids: Tensor, chunk: int = CHUNK) -> DynamicCache:
    """transformers' own cache after a chunked prefill."""
    cache = DynamicCache(config=model.config)
    for first in range(0, ids.shape[1], chunk):
        model(ids[:, first : first + chunk], past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def check_full(plain: nn.Module, model: nn.Module, ids: Tensor) -> None:
    """Raise NumericsError unless kvpleat's Full gives DynamicCache's logits on a short prompt and 8 steps."""
    short = ids[:, :600]
    dynamic = prefill_dynamic(plain, short)
    with compress(model, policies.Full()) as pleated:
        cache = pleated.new_cache()
        pleated.prefill(short, cache=cache, chunk_size=CHUNK)
        for i in range(8):
            token = ids[:, 600 + i : 601 + i]
            difference = (
                (plain(token, past_key_values=dynamic).logits - model(token, past_key_values=cache).logits).abs().max()
            )
            if not difference < (1e-3 if ids.device.type == "cpu" else 1e-2):
                raise NumericsError(
                    f"Full differs from DynamicCache by {difference:.2g} in the logits: no speed is reported."
                )


@torch.no_grad()
def decode_pairs(
    plain: nn.Module, pleated: Pleated, dynamic: DynamicCache, cache: Any, ids: Tensor
) -> tuple[list[float], list[float]]:
    """Seconds of alternating steps, transformers' and ours: ids [R, steps] are fed one by one."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(ids.shape[1]):
        token = ids[:, i : i + 1]
        for side, (model, past) in enumerate(((plain, dynamic), (pleated.model, cache))):
            start = time.perf_counter()
            model(token, past_key_values=past, logits_to_keep=1)
            if token.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One paired run."""
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    model, policy = loaded.model, parse_policy(args.policy)
    steps = args.warmup + args.steps
    ids = torch.stack([w for _, w in token_windows(loaded, args.data, args.context, args.batch, 0)]).to(model.device)
    prompt, rest = ids[:, : args.context - steps], ids[:, args.context - steps :]
    bandwidth = copy_bandwidth(model.device)
    plain = share_weights(model)
    check_full(plain, model, ids)
    console.print("Full equals DynamicCache; filling both caches ...")
    start = time.perf_counter()
    dynamic = prefill_dynamic(plain, prompt, FILL_CHUNK)
    filled_dynamic = time.perf_counter() - start
    with compress(model, policy) as pleated:
        cache = pleated.new_cache()
        start = time.perf_counter()
        pleated.prefill(prompt, cache=cache, chunk_size=FILL_CHUNK)
        filled = time.perf_counter() - start
        theirs, ours = (s[args.warmup :] for s in decode_pairs(plain, pleated, dynamic, cache, rest))
        report = cache.report()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "batch": args.batch,
        "context": args.context,
        "policy": policy.to_dict(),
        "threads": torch.get_num_threads(),
        "bandwidth_bytes_per_s": bandwidth,
        "floor_s": {
            "dynamic": (weights + report.full_bytes) / bandwidth,
            "kvpleat": (weights + report.live_bytes) / bandwidth,
        },
        "step_s": {"dynamic": theirs, "kvpleat": ours},
        "prefill_s": {"dynamic": filled_dynamic, "kvpleat": filled},
        "kv": {k: v for k, v in report.to_dict().items() if k != "kept"},
    }


def peak_memory(args: argparse.Namespace) -> dict[str, int]:
    """Growth of the peak resident memory by a chunked prefill, each side in a process of its own (Linux)."""
    peaks = {}
    for side, policy in (
        ("dynamic", "full"),
        ("kvpleat", args.policy),
        (f"kvpleat {args.memory_policy}", args.memory_policy),
    ):
        options = {
            "model": args.model,
            "data": args.data,
            "context": args.context,
            "dtype": args.dtype,
            "policy": policy,
        }
        command = [sys.executable, "-W", "ignore", "-m", "kvpleat.bench.speed", "--peak-of", side.split()[0]]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        peaks[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def peak_of(args: argparse.Namespace) -> int:
    """In the process of one side: bytes by which a chunked prefill of one row raised the peak resident memory."""
    loaded = load(args.model, dtype=args.dtype, device="cpu", progress=False)
    ids = torch.stack([w for _, w in token_windows(loaded, args.data, args.context, 1, 0)])
    with torch.no_grad():
        loaded.model(ids[:, :64])  # what the first forward allocates once is no cache
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    if args.peak_of == "dynamic":
        prefill_dynamic(loaded.model, ids)
    else:
        with compress(loaded.model, parse_policy(args.policy)) as pleated:
            pleated.prefill(ids, cache=pleated.new_cache(), chunk_size=CHUNK)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def show(figures: dict[str, Any], console: Console) -> None:
    """The figures as a table, the floor first."""
    console.print(
        f"batch {figures['batch']}, context {figures['context']}, {figures['threads']} threads, copy bandwidth "
        f"{figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, compression ratio {figures['kv']['compression_ratio']:.2f}"
    )
    table = Table("cache", "floor ms", "step ms (median)", "mean", "min to max", "tokens/s (mean)", "prefill s")
    for side in ("dynamic", "kvpleat"):
        steps = figures["step_s"][side]
        median, mean = statistics.median(steps), statistics.mean(steps)  # the mean holds the moments of compression
        table.add_row(
            side,
            f"{1e3 * figures['floor_s'][side]:.1f}",
            f"{1e3 * median:.1f}",
            f"{1e3 * mean:.1f}",
            f"{1e3 * min(steps):.1f} to {1e3 * max(steps):.1f}",
            f"{figures['batch'] / mean:.1f}",
            f"{figures['prefill_s'][side]:.1f}",
        )
    console.print(table)
    for name, centre in (("median", statistics.median), ("mean", statistics.mean)):
        theirs, ours = (centre(figures["step_s"][side]) for side in ("dynamic", "kvpleat"))
        console.print(f"decode, {name} step: {theirs / ours:.2f}x")
    for side, peak in figures.get("peak_prefill_bytes", {}).items():
        console.print(f"peak process memory of a prefill in chunks of {CHUNK}, one row, {side}: {human_bytes(peak)}")


def main(argv: list[str] | None = None) -> None:
    """Command line of the speed benchmark."""
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.speed", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="attention:ratio=4")
    parser.add_argument("--memory-policy", default="attention:ratio=4,slack=2", help="measured too, for memory")
    parser.add_argument("--data", type=Path, required=True, help="JSONL (.xz, .gz) with the keys source and text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192, help="tokens at the end of the run")
    parser.add_argument("--steps", type=int, default=64, help="measured decode steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory of a prefill out")
    parser.add_argument("--peak-of", choices=("dynamic", "kvpleat"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="write all figures here as JSON")
    args = parser.parse_args(argv)
    if args.peak_of:
        print(peak_of(args))
        return
    console = Console(width=140)
    figures = measure(args, console)
    if not args.no_memory:
        figures["peak_prefill_bytes"] = peak_memory(args)
    show(figures, console)
    if args.out is not None:
        args.out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
