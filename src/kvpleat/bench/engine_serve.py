"""Requests that come as they like: how long they wait for their first token, and for each after it."""

import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from kvpleat.accounting import human_bytes, page_bytes
from kvpleat.bench.engine_models import policy_for, profile
from kvpleat.bench.engine_report import Bench, Column
from kvpleat.bench.engine_state import OTHERS, Watch, new_core, random_request
from kvpleat.engine.params import Request
from kvpleat.hf.families import describe

SHAPE = "llama-3.2-1b"
REQUESTS, PROMPTS, ANSWERS = 512, (256, 16_384), (32, 512)
MEMORY = 5 * 2**29
SEATS = 192
TRIED = 128  # requests that come at once, to see how many a second ratio 1 can take
BEYOND = 1.5  # times as many come

COLUMNS: list[Column] = [
    ("ratio", "ratio", "6.2f", 1), ("rows", "mean_rows", "6.1f", 1), ("TTFT p50", "ttft_p50", "9.2f", 1),
    ("p99 s", "ttft_p99", "7.2f", 1), ("TPOT p50", "tpot_p50", "9.1f", 1e3), ("p99 ms", "tpot_p99", "7.1f", 1e3),
    ("tok/s", "tokens_per_s", "7.0f", 1), ("x ratio 1", "speedup", "9.2f", 1), ("req/s", "requests_per_s", "6.2f", 1),
    ("most GiB", "most_bytes", "8.2f", 2**-30), ("of GPU", "gpu_bytes", "7.2f", 2**-30),
    ("preempted", "preemptions", "9d", 1),
]  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests in the order they come. arrivals: seconds after the start."""

    requests: list[Request]
    arrivals: list[float]


def workload(
    count: int,
    vocabulary: int,
    rate: float | None,
    prompts: tuple[int, int],
    answers: tuple[int, int],
    first: int = 0,
) -> Workload:
    """Lengths drawn evenly by their logarithm, arrivals by a Poisson process; rate: requests a second, None: all at
    once; first: number of the first prompt. The same requests whatever the rate."""
    generator = torch.Generator().manual_seed(0)

    def lengths(least: int, most: int) -> list[int]:
        drawn = torch.rand(count, generator=generator) * math.log(most / least)
        return [round(least * math.exp(x)) for x in drawn.tolist()]

    sizes = zip(lengths(*prompts), lengths(*answers), strict=True)
    gaps = torch.empty(count).exponential_(generator=generator)
    arrivals = [0.0] * count if rate is None else (gaps.cumsum(0) / rate).tolist()
    return Workload([random_request(i, *size, vocabulary) for i, size in enumerate(sizes, first)], arrivals)


def serve(bench: Bench) -> None:
    """The same requests at each ratio in the same memory, more of them than ratio 1 can take."""
    model = bench.model("serve", SHAPE, COLUMNS)
    if model is None:
        return
    service = Service(bench, model, min(bench.room(), 2**19 if bench.tiny else MEMORY))
    bench.heading(f"serve: {SHAPE}, {human_bytes(service.memory)} for the cache", COLUMNS)
    for ratio in (1.0, 2.6, 4.0, 8.0):
        bench.case("serve", f"{SHAPE}, ratio {ratio:g}", COLUMNS, functools.partial(service.measure, ratio))


class Service:
    """One model and memory. rate: requests a second, found out at ratio 1; before: its tokens a second."""

    def __init__(self, bench: Bench, model: Any, memory: int) -> None:
        self.bench, self.model, self.memory = bench, model, memory
        self.rate, self.before = bench.rate, None  # type: float | None, float | None
        self.prompts, self.answers = ((8, 100), (4, 12)) if bench.tiny else (PROMPTS, ANSWERS)

    def load(self, count: int, rate: float | None = None, first: int = OTHERS) -> Workload:
        """A workload of this service."""
        return workload(count, self.model.config.vocab_size, rate, self.prompts, self.answers, first)

    def measure(self, ratio: float) -> dict[str, Any]:
        """All requests, at one ratio."""
        core, tiny = self._core(ratio), self.bench.tiny
        try:
            run(core, self.load(2))  # compiles kernels
            if self.rate is None:
                self.rate = BEYOND * run(core, self.load(6 if tiny else TRIED, first=2 * OTHERS))["requests_per_s"]
                print(
                    f"{self.rate:.2f} requests a second come, {BEYOND:g} times what ratio {ratio:g} takes", flush=True
                )
            found = run(core, self.load(12 if tiny else REQUESTS, self.rate, first=0))
        finally:
            core.close()
        self.before = found["tokens_per_s"] if ratio == 1 else self.before
        speedup = found["tokens_per_s"] / self.before if self.before else None
        return found | {"ratio_wanted": ratio, "rate": self.rate, "kv_memory": self.memory, "speedup": speedup}

    def _core(self, ratio: float) -> Any:
        tiny, shape = self.bench.tiny, describe(self.model).shape
        stays = profile(ratio, 96 if tiny else self.bench.tokens, shape.num_layers, shape.num_kv_heads)
        seats, length = 8 if tiny else SEATS, self.prompts[1] + self.answers[1]
        policy = policy_for(self.model, stays)
        return new_core(self.bench, self.model, policy, self.memory, seats, length)


def run(core: Any, load: Workload) -> dict[str, Any]:
    """Serve a workload to its end.

    Returns:
        percentiles of seconds: ttft from a request's arrival to its first token, tpot between tokens after it, mean of
        a request; tokens and requests a second until the last one ended; most_bytes of pages held at a time, and
        gpu_bytes, the most memory that PyTorch gave out meanwhile.
    """
    came: dict[str, list[float]] = {request.id: [] for request in load.requests}
    watch, rows, steps, taken = Watch(core), 0, 0, core.scheduler.preemptions
    waiting = list(zip(load.arrivals, load.requests, strict=True))[::-1]
    cuda = core.runner.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    while waiting or core.unfinished:
        now = time.perf_counter() - start
        while waiting and waiting[-1][0] <= now:
            core.add(waiting.pop()[1])
        if not core.unfinished:
            time.sleep(max(0.0, waiting[-1][0] - now))
            continue
        for emitted in core.step():
            came[emitted.request_id] += [time.perf_counter() - start] * len(emitted.token_ids)
        watch.look()
        rows, steps = rows + len(core.scheduler.running), steps + 1
    seconds, shape = time.perf_counter() - start, core.runner.pool.shape
    core.step()
    first = [came[r.id][0] - arrival for r, arrival in zip(load.requests, load.arrivals, strict=True) if came[r.id]]
    each = [(times[-1] - times[0]) / (len(times) - 1) for times in came.values() if len(times) > 1]
    return {
        "requests": len(came), "answered": len(first), "seconds": seconds, "ratio": watch.ratio,
        "mean_rows": rows / max(1, steps), "ttft_p50": quantile(first, 0.5), "ttft_p99": quantile(first, 0.99),
        "tpot_p50": quantile(each, 0.5), "tpot_p99": quantile(each, 0.99),
        "tokens_per_s": sum(map(len, came.values())) / seconds, "requests_per_s": len(came) / seconds,
        "most_bytes": watch.pages * page_bytes(shape), "preemptions": core.scheduler.preemptions - taken,
        "gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
