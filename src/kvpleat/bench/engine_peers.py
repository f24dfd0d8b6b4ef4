"""The engine beside transformers: generate() with its caches on the same prompts, and the time to the first token."""

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from kvpleat.bench.engine_models import policy_for, profile
from kvpleat.bench.engine_report import Bench, Column
from kvpleat.bench.engine_state import OTHERS, Watch, new_core, random_request, timed
from kvpleat.errors import PeerError
from kvpleat.hf.families import describe
from kvpleat.policies import DMC, DMS

SHAPE = "llama-3-8b"
CASES = "1x2048,32x2048,8x8192,64x512"  # as many as there is time for in a call
TINY_CASES = "1x24,3x40"
ANSWER, TINY_ANSWER = 128, 8
PEER_SECONDS = 120.0  # of a peer in a case, its compilation included
TOKENS_AT_ONCE = 65_536  # tokens of prompts that a peer computes at once, in pieces where there are more

Case = tuple[int, int]  # rows, and tokens of each
Prompts = Sequence[Sequence[int]]

OF_COMPARE: list[Column] = [
    ("rows", "rows", "5d", 1), ("tokens", "tokens", "7d", 1), ("ratio", "ratio", "6.2f", 1),
    ("all s", "seconds", "8.2f", 1), ("tok/s", "tokens_per_s", "8.0f", 1), ("decode tok/s", "decode_per_s", "12.0f", 1),
    ("ratio 1 over it", "speedup", "15.2f", 1), ("in decode", "decode_speedup", "9.2f", 1),
]  # fmt: skip
OF_PREFILL: list[Column] = [
    ("tokens", "tokens", "7d", 1), ("ratio", "ratio", "6.2f", 1), ("first token ms", "seconds", "14.1f", 1e3),
    ("tok/s", "tokens_per_s", "8.0f", 1), ("x sdpa", "of_sdpa", "7.3f", 1),
]  # fmt: skip


@dataclass(frozen=True)
class Times:
    """How long prompts and answers took. decode_per_s: tokens a second while all rows decode; None: they never do."""

    seconds: float
    decode_per_s: float | None


Peer = Callable[[Bench, Any, Prompts, int], Times]


def compare(bench: Bench) -> None:
    """transformers' generate with a dynamic, a static compiled, and a paged cache. The engine first, then its peers,
    case by case as long as there is time."""
    model = bench.model("compare", bench.shape or SHAPE, OF_COMPARE)
    if model is None:
        return
    text = bench.cases or (TINY_CASES if bench.tiny else CASES)
    cases = [(int(rows), int(tokens)) for rows, tokens in (case.split("x") for case in text.split(","))]
    bench.heading(f"compare: {bench.shape or SHAPE}, answers of {_answer(bench)} tokens", OF_COMPARE)
    ours: dict[Case, Times] = {}
    for ratio in (1.0, 4.0):
        name = f"kvpleat, ratio {ratio:g}"
        all_of_it = functools.partial(_engine_cases, bench, model, name, ratio, cases, ours)
        bench.attempt("compare", name, OF_COMPARE, all_of_it)
    for rows, tokens in cases:
        prompts = [list(random_request(i, tokens, 1, model.config.vocab_size).prompt) for i in range(rows)]
        for name, peer in PEERS.items():
            run = functools.partial(_beside, bench, model, peer, prompts, ours.get((rows, tokens)))
            bench.case("compare", f"transformers, {name}", OF_COMPARE, run, PEER_SECONDS)


def _answer(bench: Bench) -> int:
    return TINY_ANSWER if bench.tiny else ANSWER


def _record(bench: Bench, rows: int, tokens: int, times: Times, ours: Times | None) -> dict[str, Any]:
    found = {
        "rows": rows, "tokens": tokens, "seconds": times.seconds, "decode_per_s": times.decode_per_s,
        "tokens_per_s": rows * _answer(bench) / times.seconds, "ratio": 1.0, "speedup": None, "decode_speedup": None,
    }  # fmt: skip
    if ours is not None:
        found["speedup"] = times.seconds / ours.seconds
        if times.decode_per_s and ours.decode_per_s:
            found["decode_speedup"] = ours.decode_per_s / times.decode_per_s
    return found


# ---- the engine


def _engine_cases(
    bench: Bench, model: Any, name: str, ratio: float, cases: list[Case], ours: dict[Case, Times]
) -> None:
    """All cases under one policy, in one engine; what ratio 1 gives is kept for its peers."""
    most, longest = (max(x) for x in zip(*cases, strict=True))
    shape = describe(model).shape
    policy = policy_for(model, profile(ratio, longest, shape.num_layers, shape.num_kv_heads))
    core = new_core(bench, model, policy, int(0.95 * bench.room()), most, longest + _answer(bench) + 1)

    def measure(case: Case) -> dict[str, Any]:
        engine_times(core, *case, 1, first=OTHERS)  # compiles kernels, if there are any to compile
        times, held = engine_times(core, *case, _answer(bench))
        if ratio == 1:
            ours[case] = times
        return _record(bench, *case, times, ours.get(case)) | {"ratio": held}

    try:
        for case in cases:
            bench.case("compare", name, OF_COMPARE, functools.partial(measure, case))
    finally:
        core.close()


def engine_times(core: Any, rows: int, tokens: int, answer: int, first: int = 0) -> tuple[Times, float]:
    """Prompts that come all at once, greedy, from number `first` on; and the ratio when most was held."""
    vocabulary, watch = core.runner.sampler.vocab_size, Watch(core)
    requests = [
        random_request(number, tokens, answer, vocabulary, greedy=True) for number in range(first, first + rows)
    ]
    came: dict[str, list[float]] = {request.id: [] for request in requests}
    start = time.perf_counter()
    try:
        for request in requests:
            core.add(request)
        while core.unfinished:
            for emitted in core.step():
                came[emitted.request_id].append(time.perf_counter())
            watch.look()
        seconds = time.perf_counter() - start
    finally:
        for request in requests:
            core.cancel(request.id)
        core.step()
    return Times(seconds, together(list(came.values()))), watch.ratio


def together(came: Sequence[Sequence[float]]) -> float | None:
    """Tokens a second between the last row's first token and the first row's last one: came: times of each row's."""
    begin, end = max(times[0] for times in came), min(times[-1] for times in came)
    count = sum(begin < time <= end for times in came for time in times)
    return count / (end - begin) if count else None


# ---- its peers


class Clock(BaseStreamer):
    """When each token of generate() came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """A token of every row, on the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left over."""


def _beside(bench: Bench, model: Any, peer: Peer, prompts: Prompts, ours: Times | None) -> dict[str, Any]:
    return _record(bench, len(prompts), len(prompts[0]), peer(bench, model, prompts, _answer(bench)), ours)


def _generate(bench: Bench, model: Any, prompts: Prompts, answer: int, **options: Any) -> Times:
    """generate(), whose rows go in step. The same call goes first: for another length caches are compiled anew."""
    ids = torch.tensor(prompts, device=bench.device)
    if ids.numel() > TOKENS_AT_ONCE and "cache_implementation" not in options:
        options["prefill_chunk_size"] = TOKENS_AT_ONCE // ids.shape[0]

    def run() -> list[float]:
        clock, config = Clock(), GenerationConfig(max_new_tokens=answer, do_sample=False, pad_token_id=0, **options)
        start = bench.now()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
        return [each - start for each in [*clock.times[1:], bench.now()]]  # the first time is that of the prompt

    try:
        run()
        first, *_, whole = run()
    finally:
        if model.__dict__.pop("_compiled_call", None) is not None:  # or its graphs would stay
            torch._dynamo.reset()
    return Times(whole, ids.shape[0] * (answer - 1) / (whole - first) if whole > first else None)


def _dynamic(bench: Bench, model: Any, prompts: Prompts, answer: int) -> Times:
    return _generate(bench, model, prompts, answer)


def _static(bench: Bench, model: Any, prompts: Prompts, answer: int) -> Times:
    """Compiled by transformers itself, on a GPU."""
    return _generate(bench, model, prompts, answer, cache_implementation="static")


def _continuous(bench: Bench, model: Any, prompts: Prompts, answer: int) -> Times:
    """generate_batch(), by the times it notes itself: its graphs are captured before."""
    config = GenerationConfig(max_new_tokens=answer, do_sample=False, pad_token_id=0, eos_token_id=-1)
    small = {"num_blocks": 16, "max_batch_tokens": 256} if bench.device.type == "cpu" else {}
    before = model.config._attn_implementation
    try:
        results = model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**small),
            record_timestamps=True,
        )
    finally:
        model.set_attn_implementation(before)  # which it leaves as it was only where all goes well
    done = list(results.values())
    wrong = next((result.error for result in done if result.error), None)
    if len(done) < len(prompts) or wrong:
        raise PeerError(f"{len(done)} of {len(prompts)} requests were answered: {wrong}")
    end, start = max(result.timestamps[-1] for result in done), min(result.created_time for result in done)
    return Times(end - start, together([result.timestamps for result in done]))


PEERS: dict[str, Peer] = {
    "dynamic": _dynamic,
    "static, compiled": _static,
    "continuous batching": _continuous,
}


# ---- the first token


def prefill(bench: Bench) -> None:
    """The time to the first token of one long prompt, beside one forward of the model with FlashAttention."""
    model = bench.model("prefill", SHAPE, OF_PREFILL)
    if model is None:
        return
    bench.heading(f"prefill: {SHAPE}, {bench.step_tokens:,} tokens of a prompt at a time", OF_PREFILL)
    for tokens in [96, 160] if bench.tiny else [8192, 32_768]:
        name = "transformers, one forward, sdpa flash"
        flash = bench.case("prefill", name, OF_PREFILL, functools.partial(_flash, bench, model, tokens))
        for name, ratio, method in (("full", 1.0, DMS), ("dms, ratio 4", 4.0, DMS), ("dmc, ratio 4", 4.0, DMC)):
            run = functools.partial(_first_token, bench, model, tokens, ratio, method, flash)
            bench.case("prefill", f"kvpleat, {name}", OF_PREFILL, run)


@torch.inference_mode()
def _flash(bench: Bench, model: Any, tokens: int) -> dict[str, Any]:
    """One forward over a prompt, its cache kept and its likeliest token read."""
    ids = torch.tensor([random_request(0, tokens, 1, model.config.vocab_size).prompt], device=bench.device)
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if bench.device.type == "cuda" else contextlib.nullcontext()
    with flash:
        seconds = _median(lambda: int(model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax()))
    return {"tokens": tokens, "ratio": 1.0, "seconds": seconds, "tokens_per_s": tokens / seconds, "of_sdpa": 1.0}


def _first_token(
    bench: Bench, model: Any, tokens: int, ratio: float, method: type[DMS] | type[DMC], flash: dict[str, Any] | None
) -> dict[str, Any]:
    """The engine's, from add() until the token is on the host."""
    shape = describe(model).shape
    stays = profile(ratio, tokens, shape.num_layers, shape.num_kv_heads, merges=method is DMC)
    core = new_core(bench, model, policy_for(model, stays, method), int(0.95 * bench.room()), 1, tokens + 2)
    try:
        number = itertools.count(OTHERS)
        seconds = _median(lambda: engine_times(core, 1, tokens, 1, next(number)))
        ratio = engine_times(core, 1, tokens, 2)[1]
    finally:
        core.close()
    of_sdpa = None if flash is None else seconds / flash["seconds"]
    return {"tokens": tokens, "ratio": ratio, "seconds": seconds, "tokens_per_s": tokens / seconds, "of_sdpa": of_sdpa}


def _median(call: Callable[[], object]) -> float:
    call()
    return statistics.median(timed(call) for _ in range(3))
