"""An engine in the middle of its work, without the prompts that lead there, and how long its steps take.

The engine does all itself: it admits requests, plans steps, counts pages, and preempts. Only what a step with prompts
would compute is replaced: streams grow as `Profile` says, on scattered pages, and entries are random numbers. From then
on it decodes as ever.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpleat.accounting import full_entry_bytes, page_bytes
from kvpleat.bench.engine_models import Profile
from kvpleat.bench.engine_report import Bench, said
from kvpleat.bench.floor import weights_read
from kvpleat.bench.kernel_timing import Machine
from kvpleat.engine import sizes
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.reckoned import AHEAD
from kvpleat.engine.rows import Plan
from kvpleat.hf.families import describe
from kvpleat.kernels import update
from kvpleat.kernels.device_pool import DevicePool, pool_bytes

ANSWER = 512  # tokens: more than are decoded before the clock starts and while it runs
OTHERS = 2**20  # number of the first prompt of those that only warm up: pages of prompts may be shared
BATCHED = 2**20  # tokens of a step that only seems to feed prompts
WARM_UPS, STEPS = 3, 16  # few: rows are sure to find pages for AHEAD tokens
BOOKKEEPING = ("count", "share", "settle", "append", "step", "plan")  # kernels, in update_*_triton and decode_*_triton


def new_core(bench: Bench, model: Any, policy: Any, memory: int | None, seats: int, length: int, **options: Any) -> Any:
    """An engine as the benchmark is told to make it."""
    if bench.compile:  # or what was compiled for other policies counts against what torch.compile will compile
        torch._dynamo.reset()
    options = {"max_num_batched_tokens": max(bench.step_tokens, seats), "compile": bench.compile, **options}
    return EngineCore(  # random prompts have no beginnings to share
        model, policy, kv_memory=memory, max_num_seqs=seats, max_model_len=length, page_size=bench.page_size,
        enable_prefix_caching=False, **options,
    )  # fmt: skip


def fitting(policy: Any, model: Any, tokens: int, memory: int, page_size: int) -> int:
    """Rows of so many tokens that the engine is expected to admit."""
    shape = describe(model, page_size).shape
    length = min(tokens + ANSWER, describe(model).max_positions)
    page = pool_bytes(shape, policy.delayed, 0, 1, 0)[0]
    row = sum(pool_bytes(shape, policy.delayed, 1, 0, length)[1].values())
    entries = policy.expected_entries(tokens + AHEAD, shape)
    each = entries / page_size + 0.5 if policy.delayed is not None else math.ceil(entries / page_size)  # as Limits does
    pages = math.ceil(shape.num_streams * each)
    return max(1, int(memory // (pages * page + row)))


def random_request(number: int, tokens: int, answer: int, vocabulary: int, greedy: bool = False) -> Request:
    """A prompt of random tokens, the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0 if greedy else 1.0, max_tokens=answer, ignore_eos=True, detokenize=False)
    return Request(str(number), tuple(prompt), params)


class Watch:
    """What rows hold from step to step, as the host knows it. pages, fed: most pages, and tokens of rows then."""

    def __init__(self, core: Any) -> None:
        self.core, self.pages, self.fed = core, 0, 0

    def look(self) -> None:
        """After a step."""
        running = self.core.scheduler.running
        pages = sum(row.held for row in running)
        if pages >= self.pages:
            self.pages, self.fed = pages, sum(row.fed for row in running)

    @property
    def ratio(self) -> float:
        """Tokens over places in pages, when most were held."""
        shape = self.core.runner.pool.shape
        return float(self.fed * shape.num_streams / max(1, self.pages * shape.page_size))


class Filler:
    """In place of the runner's forward over prompts. stays: by which streams grow."""

    def __init__(self, core: Any, stays: Profile) -> None:
        self.runner, self.stays = core.runner, stays
        pool: DevicePool = self.runner.pool
        for name in ("key", "value"):
            pool.arrays[name].normal_()
        if pool.log_weight is not None:
            pool.log_weight.zero_()
        pool.free_pages.copy_(pool.free_pages[torch.randperm(pool.free_pages.numel(), device=pool.holders.device)])

    def __call__(self, n: int, plan: Plan) -> None:
        pool: DevicePool = self.runner.pool
        seats, tokens = torch.tensor([[f.seat, f.start + f.size] for f in plan.feeds], device=pool.holders.device).T
        wanted = self.stays.lengths(tokens, seats)
        counts = torch.zeros_like(pool.lengths)
        counts[seats] = (wanted - pool.lengths[seats]).clamp(min=0)
        update.reserve(pool, counts)
        pool.lengths.add_(counts * (pool.failed == 0))
        if pool.ring is not None:
            self._remember(pool, seats, tokens)
        self.runner._logits.normal_()

    def _remember(self, pool: DevicePool, seats: Tensor, tokens: Tensor) -> None:
        """The last tokens of each stream, whose entries come last, marked as often as the profile says."""
        assert pool.ring is not None
        size = pool.ring.slots.shape[-1]
        age = torch.arange(size, device=seats.device)
        place = ((tokens[:, None] - 1 - age) % size)[:, None, None].expand(-1, *pool.lengths.shape[1:], -1)
        slots = pool.lengths[seats][..., None] - 1 - age
        there = (age < tokens[:, None])[:, None, None] & (slots >= 0)
        stays = self.stays.keep.to(seats.device)[seats % self.stays.keep.shape[0], ..., None]
        marked = (torch.rand(slots.shape, device=seats.device) >= stays) & there
        slots = torch.where(there, slots, -1).int()
        pool.ring.slots[seats] = torch.empty_like(slots).scatter_(-1, place, slots)
        pool.ring.marked[seats] = torch.empty_like(marked).scatter_(-1, place, marked)


def fill(core: Any, rows: int, tokens: int, stays: Profile) -> None:
    """Requests with prompts of so many tokens come in, as many of `rows` as are admitted; the others are cancelled."""
    core.runner._mixed = Filler(core, stays)
    for number in range(rows):
        core.add(random_request(number, tokens, ANSWER, core.runner.sampler.vocab_size))
    still, before = 0, 0
    for _ in range(ANSWER // 2):
        if still == 4:
            break
        core.step()
        running = core.scheduler.running
        settled = all(row.fed >= row.goal for row in running) and len(running) == before
        still, before = still + 1 if settled else 0, len(running)
    for row in [*core.scheduler.waiting, *core.scheduler.running]:
        if row.fed < row.goal:
            core.cancel(row.request.id)
    del core.runner._mixed


@dataclass
class Replay:
    """What a step of the rows that run computes, without the host's part: on a GPU, its graphs."""

    core: Any

    @functools.cached_property
    def width(self) -> int:
        """Seats that a step covers."""
        highest = max(row.seat for row in self.core.scheduler.running)
        return sizes.width(highest + 1, self.core.scheduler.limits.seats)

    @torch.inference_mode()
    def __call__(self) -> None:
        runner, n = self.core.runner, self.width
        mode = runner.sampler.mode
        runner._decode_by_graph(n)
        runner._graphs.run((n, mode), lambda: runner._draw(n, mode))

    def seconds(self, device: torch.device) -> float:
        """Median over replays, by the GPU's clock."""
        if device.type != "cuda":
            return statistics.median(timed(self) for _ in range(2))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UPS + STEPS)]
        for event in events:
            self()
            event.record()
        torch.cuda.synchronize(device)
        times = [float(start.elapsed_time(stop)) for start, stop in itertools.pairwise(events[WARM_UPS - 1 :])]
        return statistics.median(times) / 1e3

    def kernels(self) -> dict[str, float]:
        """Seconds that a step spends in each kernel; empty without a GPU."""
        if not torch.cuda.is_available():
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(WARM_UPS):
                self()
            torch.cuda.synchronize()
        events = profiler.key_averages()
        return {e.key[:60]: e.self_device_time_total / 1e6 / WARM_UPS for e in events if e.self_device_time_total > 0}


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call on the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(bench: Bench, core: Any) -> dict[str, Any]:
    """Steps of the rows that run, beside their floor. Afterwards the engine is only good for being closed.

    Returns:
        rows, entries held, ratio (tokens seen over entries) and allocated ratio (over the slots of pages), and seconds:
        step_seconds of a step as the host sees it, graph_seconds on the device alone, floor_seconds, and of these
        bookkeeping_seconds (the kernels that keep the cache) and gate_seconds. tokens_per_s as the host sees it.
    """
    runner, scheduler, pool = core.runner, core.scheduler, core.runner.pool
    for _ in range(WARM_UPS):
        core.step()
    held, start = int(pool.lengths.sum()), bench.now()
    took = [timed(core.step) for _ in range(STEPS if bench.device.type == "cuda" else 3)]
    whole = bench.now() - start
    seen = sum(row.fed for row in scheduler.running) * pool.shape.num_streams
    after, pages = int(pool.lengths.sum()), int(pool.num_pages.sum())
    entries, rows, step = (held + after) / 2, len(scheduler.running), Replay(core)
    floor = (weights_read(runner.attached.model) + entries * full_entry_bytes(pool.shape)) / bench.bandwidth
    found = {
        "rows": rows, "width": step.width, "entries": entries, "ratio": seen / after,
        "allocated_ratio": seen / (pages * pool.shape.page_size),
        "pool_bytes": pool.holders.numel() * page_bytes(pool.shape),
        "floor_seconds": floor, "step_seconds": statistics.median(took), "tokens_per_s": rows * len(took) / whole,
        "graph_seconds": step.seconds(bench.device), "preemptions": scheduler.preemptions,
    }  # fmt: skip
    try:
        kernels = step.kernels()
    except RuntimeError as error:  # a profiler that does not run here; the times above stand without it
        print(f"no times of kernels: {said(error)}", flush=True)
        kernels = {}
    found["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:16])
    found["bookkeeping_seconds"] = bookkeeping(kernels)
    found["gate_seconds"] = _gates(bench, core, step.width)
    if int(pool.failed):  # the last replays left the cache as it was, which is less work
        found["graph_seconds"] = found["bookkeeping_seconds"] = None
    return found


def bookkeeping(kernels: dict[str, float]) -> float | None:
    """Seconds of the kernels that keep the cache, of all; None where nothing is known of any."""
    mine = (seconds for name, seconds in kernels.items() if name in BOOKKEEPING)
    return sum(mine) if kernels else None


@torch.inference_mode()
def _gates(bench: Bench, core: Any, rows: int) -> float | None:
    """Seconds that gates of all layers take; None where there are none, or no GPU."""
    attached = core.runner.attached
    if attached.policy.delayed is None or bench.device.type != "cuda":
        return None
    config, dtype = attached.model.config, attached.facts.shape.dtype
    hidden = torch.randn(1, rows, config.hidden_size, device=bench.device, dtype=dtype)
    calls = [
        functools.partial(attached.policy.logits, layer, hidden) for layer in range(attached.facts.shape.num_layers)
    ]
    return Machine(bench.device, quick=True).seconds(calls) * len(calls)
