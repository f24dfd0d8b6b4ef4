"""An engine under load for long, all policies in turn: `python -m kvpleat.bench.soak [--minutes 20] [--device cpu]`

Requests arrive at random, of any length, greedy and drawn, several samples of a prompt, some with NaN in them; some are
cancelled, steps run out of memory, and pools are so small that rows give their pages up. At the end of each policy all
pages must be free and the integrity check green, memory must not have grown, and requests taken at random must have
got the tokens that they get alone. `--only identical` compares alone, in a batch and preempted (soak_identical.py).
"""

import argparse
import gc
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kvpleat.bench import soak_identical
from kvpleat.bench.soak_load import (
    NAMES,
    ROOM,
    SEATS,
    Served,
    arrivals,
    careless,
    core_for,
    failing,
    job_by_chance,
    poisoned,
    served,
)
from kvpleat.engine.core import EngineCore
from kvpleat.engine.jobs import Desk, Job, Sample
from kvpleat.kernels.device_pool import check_integrity

MEAN = 0.3  # requests that arrive in a step
CANCELS, FAULTS = 0.01, 0.0005  # chance in a step that a request is cancelled, that a step with prompts has no memory
COMPARED = 0.08  # share of the samples that are repeated alone
GROWTH = 24 * 2**20  # bytes of a process that are no leak: arenas of malloc, caches of torch
SAME = {torch.float32: 0.995, torch.float16: 0.9, torch.bfloat16: 0.5}  # share that must be the same; rounding decides


@dataclass
class Outcome:
    """What one policy did."""

    policy: str
    counts: Counter[str] = field(default_factory=Counter)
    growth: int = 0
    kept: list[Sample] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """What was wrong first, or "ok"."""
        return "; ".join(self.wrong[:3]) or "ok"


def process_bytes(device: torch.device) -> int:
    """What the process holds: on a GPU, of the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(it: Served, name: str, seconds: float, seed: int, device: torch.device) -> Outcome:
    """One policy for so many seconds; what has begun then is finished."""
    chance, found = random.Random(f"{seed} {name}"), Outcome(name)
    vocabulary = int(it.model.config.vocab_size)
    core = core_for(it, name, ROOM)
    desk, began, warm = Desk(core), time.monotonic(), 0

    def fails() -> bool:
        found.counts["no memory"] += (now := chance.random() < FAULTS)
        return now

    with careless(), failing(it, fails):
        while (spent := time.monotonic() - began) < seconds or desk.jobs:
            if spent > seconds / 3 and not warm:
                warm = process_bytes(device)
            for _ in range(arrivals(chance, MEAN) if spent < seconds and len(desk.jobs) < 4 * SEATS else 0):
                found.counts["requests"] += 1
                desk.submit(job_by_chance(str(found.counts["requests"]), chance, vocabulary))
            if desk.jobs and chance.random() < CANCELS:
                job = chance.choice(desk.jobs)
                desk.cancel(job)
                found.counts["cancelled"] += 1
                _ended(job, chance, found)
            for job in desk.step() if desk.jobs else ():
                if job.error is not None:
                    found.wrong.append(f"{job.id}: {job.error}")
                if job.finished:
                    _ended(job, chance, found)
            found.counts["steps"] += 1
            if found.counts["steps"] % 64 == 0:
                check_integrity(core.runner.pool)
    for _ in range(3):
        core.step()  # what the last rows left is given back
        core.reset_prefix_cache()
    found.counts["preempted"] = core.scheduler.preemptions
    _inspect(core, found)
    found.growth = process_bytes(device) - warm
    desk.close()
    return found


def _ended(job: Job, chance: random.Random, found: Outcome) -> None:
    for sample in job.samples:
        found.counts["tokens"] += len(sample.token_ids)
        found.counts[f"ended: {sample.finish_reason}"] += 1
        if chance.random() < COMPARED:
            found.kept.append(sample)


def _inspect(core: EngineCore, found: Outcome) -> None:
    """Nothing is left of anybody."""
    pool = core.runner.pool
    try:
        check_integrity(pool)
    except AssertionError as error:
        found.wrong.append(str(error))
    if int(pool.free_count) != pool.key.shape[0]:
        found.wrong.append(f"{pool.key.shape[0] - int(pool.free_count)} pages are not free")
    if core.unfinished or core.scheduler.running or core.scheduler.waiting:
        found.wrong.append("rows are left")


def compare(it: Served, found: Outcome) -> None:
    """Repeat the samples that were kept, each alone in an engine with room for it."""
    core = core_for(it, found.policy, None, seats=1, enable_prefix_caching=False)
    desk = Desk(core)
    for sample in found.kept:
        request = sample.request
        job = Job(request.id, None, request.prompt, replace(request.params, n=1), None)
        desk.submit(job)
        while desk.jobs:
            desk.step()
        alone, count = job.samples[0], len(sample.token_ids)
        cut = sample.finish_reason in ("abort", "memory")
        same = alone.token_ids[:count] == sample.token_ids and (cut or alone.finish_reason == sample.finish_reason)
        found.counts["compared"] += 1
        found.counts["same"] += same
    desk.close()
    found.kept.clear()


def table(outcomes: list[Outcome]) -> str:
    """One line for each policy."""
    columns = ("requests", "tokens", "steps", "preempted", "cancelled", "ended: error", "no memory", "compared", "same")
    lines = [f"{'policy':10}" + "".join(f"{name.replace('ended: error', 'NaN'):>11}" for name in columns) + "  growth"]
    for found in outcomes:
        counts = "".join(f"{found.counts[name]:>11,}" for name in columns)
        lines.append(f"{found.policy:10}{counts} {found.growth / 2**20:6.1f} MiB  {found.verdict}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> list[Outcome]:
    """All policies in turn."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    it = served(args.model, device, dtype)
    outcomes = []
    with poisoned(it):
        for name in args.policy or NAMES:
            found = soak(it, name, 60 * args.minutes / len(args.policy or NAMES), args.seed, device)
            compare(it, found)
            if found.counts["same"] < SAME[dtype] * found.counts["compared"]:
                found.wrong.append(f"{found.counts['compared'] - found.counts['same']} are not as alone")
            if found.growth > GROWTH:
                found.wrong.append("memory grew")
            outcomes.append(found)
            print(f"{name}: {found.verdict} {dict(sorted(found.counts.items()))}", file=sys.stderr, flush=True)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if anything was wrong."""
    args = _parser().parse_args(argv)
    if args.only == "identical":
        return soak_identical.main(args)
    began = time.monotonic()
    outcomes = run(args)
    print(f"{args.device}, {args.dtype}, {args.model or 'random weights'}, seed {args.seed}")
    print(table(outcomes))
    preempted = sum(found.counts["preempted"] for found in outcomes)
    failed = any(found.wrong for found in outcomes) or not preempted
    print(f"{'FAILED' if failed else 'ok'} after {time.monotonic() - began:.0f} s")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of all policies together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--policy", action="append", choices=NAMES, help="one of them, or several; all if left out")
    parser.add_argument("--model", metavar="NAME", help="a model to load; random weights if left out")
    parser.add_argument("--only", choices=("identical",), help="compare alone, in a batch and preempted instead")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
