"""All kernels of the cache, checked and timed in one call: `python -m kvpleat.bench.kernels [--json FILE]`

Every kernel is compared with its specification in plain torch, on a GPU or, at small sizes, in Triton's interpreter. On
a GPU it is then timed beside the floor: the bytes it cannot avoid, over the bandwidth that a large copy was measured at
by the same clock. `--sweep` tries what the launches can be told, and prints what was fastest. For a profiler, `--only
decode --case "ragged, mean 8192/8" --once` launches one case a few times, and neither checks nor times anything.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvpleat.bench.kernel_timing import Cases, Checked, Machine, Timed, environment, machine

SEED = 0


def all_cases() -> list[Cases]:
    """Every kernel module that is checked and timed here. Imported late: it needs Triton."""
    from kvpleat.bench import (
        kernels_decode,
        kernels_extend,
        kernels_gate,
        kernels_prefill,
        kernels_sampling,
        kernels_seats,
        kernels_update,
    )

    caches = kernels_decode, kernels_prefill, kernels_update, kernels_extend, kernels_seats
    modules = *caches, kernels_sampling, kernels_gate
    return [module.CASES for module in modules]


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a check failed: its kernels' times are then not given out."""
    args = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # read where Triton is imported: long ago
        command = [sys.executable, "-m", "kvpleat.bench.kernels", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    chosen = [cases for cases in all_cases() if args.only in (None, cases.name)]
    if not chosen:
        _parser().error(f"--only {args.only}: there are {', '.join(cases.name for cases in all_cases())}.")
    start, failed = time.perf_counter(), False
    if args.once and device.type != "cuda":
        _parser().error("--once: it launches what is timed, and that needs a GPU.")
    here = machine(device, args.quick, args.case, args.once, args.small)
    about: dict[str, Any] = environment(device) | {"copy_bandwidth": here.bandwidth}
    print(" ".join(f"{key}={value:.3e}" if isinstance(value, float) else f"{value}" for key, value in about.items()))
    results: dict[str, Any] = {}
    for cases in chosen:
        torch.manual_seed(SEED)
        checks = [] if args.once else list(_checks(cases, here))
        wrong = [check for check in checks if not check.passed]
        failed = failed or bool(wrong)
        times: list[Timed] = []
        if wrong:
            print(f"{cases.name}: {len(wrong)} of {len(checks)} checks failed, so no times")
        elif device.type == "cuda" and not args.small:
            if args.sweep and cases.sweep is not None:
                for line in cases.sweep(here):
                    print(line, flush=True)
            else:
                times = list(_times(cases, here))
        results[cases.name] = {"checks": [asdict(c) for c in checks], "times": [asdict(t) for t in times]}
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": about, "kernels": results}, indent=1) + "\n")
    return int(failed)


def _checks(cases: Cases, here: Machine) -> Iterator[Checked]:
    """Each check, printed as it is made."""
    for check in cases.check(here):
        verdict = "ok    " if check.passed else "FAILED"
        print(f"{verdict} {cases.name:8} {check.case:66} off by {check.error:.1e} of {check.allowed:.0e}", flush=True)
        yield check


def _times(cases: Cases, here: Machine) -> Iterator[Timed]:
    """Each time, printed as it is taken."""
    if not here.once:
        print(f"{'':8} {'':44} {'us':>9} {'MB':>8} {'TB/s':>6} {'of a copy':>9}")
    for timed in cases.time(here):
        if here.once:
            print(f"{cases.name:8} {timed.case:44} launched", flush=True)
            continue
        line = f"{cases.name:8} {timed.case:44} {timed.seconds * 1e6:9.1f}"
        if timed.read is not None:
            rate = timed.read / timed.seconds
            line += f" {timed.read / 1e6:8.1f} {rate / 1e12:6.2f} {rate / here.bandwidth:9.1%}"
        print(line + "".join(f"  {name} {value}" for name, value in timed.beside.items()), flush=True)
        yield timed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.kernels", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--only", metavar="NAME", help="one kernel module")
    parser.add_argument("--case", metavar="NAME", default="", help="of what is timed, only what begins so")
    parser.add_argument("--once", action="store_true", help="launch it three times, untimed, for a profiler")
    parser.add_argument("--small", action="store_true", help="check at small sizes alone, for compute-sanitizer")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--sweep", action="store_true", help="try block sizes, warps, stages and programs instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
