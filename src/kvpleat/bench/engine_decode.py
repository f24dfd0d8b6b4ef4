"""Decode steps of the engine beside their floor: of one batch, of all rows that a memory holds, of one long row; and
what it costs to score entries while decoding."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpleat.accounting import full_bytes, human_bytes
from kvpleat.bench import engine_state
from kvpleat.bench.engine_models import policy_for, profile
from kvpleat.bench.engine_report import Bench, Column
from kvpleat.engine.reckoned import AHEAD
from kvpleat.hf.families import describe
from kvpleat.policies import AttentionScore, Window
from kvpleat.policies.base import Policy

COLUMNS: list[Column] = [
    ("rows", "rows", "6d", 1), ("ratio", "ratio", "6.2f", 1), ("in pages", "allocated_ratio", "8.2f", 1),
    ("floor ms", "floor_seconds", "8.2f", 1e3), ("graph ms", "graph_seconds", "8.2f", 1e3),
    ("x floor", "graph_of_floor", "7.3f", 1), ("step ms", "step_seconds", "8.2f", 1e3),
    ("x floor", "step_of_floor", "7.3f", 1), ("tok/s", "tokens_per_s", "8.0f", 1),
    ("floor's", "floor_tokens_per_s", "8.0f", 1), ("x ratio 1", "speedup", "9.2f", 1),
    ("kept by", "bookkeeping_share", "7.1%", 1), ("gates", "gate_share", "6.1%", 1),
]  # fmt: skip
SCORED: list[Column] = [
    ("rows", "rows", "6d", 1), ("ratio", "ratio", "6.2f", 1), ("step ms", "step_seconds", "8.2f", 1e3),
    ("of it", "share_of_scores", "7.1%", 1),
]  # fmt: skip
SCORED_ROWS, SCORED_STEPS = 32, 64  # rows have prompts of different lengths, so that moments come at different steps
SCORING = 16 * 2**30  # bytes left to what AttentionScore computes at the end of a prompt
SHORT = 768  # tokens of a row of GPT-2, which knows 1,024
MOST_ROWS = 512  # at ratio 1: what more would show is the same


@dataclass(frozen=True)
class Case:
    """One batch. rows: None: as many as the memory holds. skewed: whether heads keep as much as trained gates do."""

    shape: str
    ratio: float
    skewed: bool
    tokens: int
    rows: int | None

    @property
    def name(self) -> str:
        """For the table."""
        kept = "" if self.ratio == 1 else ", skewed" if self.skewed else ", uniform"
        return f"{self.shape}, {self.tokens:,} tokens, {self.ratio:g}{kept}"


def step(bench: Bench) -> None:
    """A decode step of a model like Llama-3-8B, one batch at ratio 1, 4 and 8."""
    tokens = 192 if bench.tiny else bench.tokens
    rows = 3 if bench.tiny else bench.rows
    kinds = [(1.0, True), (4.0, True), (8.0, True), (4.0, False), (8.0, False)]
    _run(bench, "step", "llama-3-8b", [Case("llama-3-8b", r, skewed, tokens, rows) for r, skewed in kinds])


def long(bench: Bench) -> None:
    """One row of 32k and of 128k tokens."""
    cases = [
        Case("llama-3-8b", ratio, True, tokens, 1)
        for tokens in ([256, 384] if bench.tiny else [32_768, 131_072])
        for ratio in (1.0, 8.0)
    ]
    _run(bench, "long", "llama-3-8b", cases)


def scores(bench: Bench) -> None:
    """What AttentionScore costs while decoding: its steps beside those of a window that holds as much, which looks at
    no queries. Prompts are fed here, since it scores what they hold."""
    shape, tokens = "llama-3-8b", 192 if bench.tiny else bench.tokens
    model = bench.model("scores", shape, SCORED)
    if model is None:
        return
    bench.heading(f"scores: {shape}, rows of {tokens:,} tokens, ratio 4", SCORED)
    before: list[float] = []
    for policy in (Window(ratio=4.0), AttentionScore(ratio=4.0)):
        bench.case("scores", policy.name, SCORED, partial(_scored, bench, model, policy, tokens, before))


def _scored(bench: Bench, model: Any, policy: Policy, tokens: int, before: list[float]) -> dict[str, Any]:
    rows, steps = (3, 8) if bench.tiny else (SCORED_ROWS, SCORED_STEPS)
    length, memory = tokens + 2 * steps + rows, bench.room() - (0 if bench.tiny else SCORING)
    core = engine_state.new_core(bench, model, policy, memory, rows, length, max_num_batched_tokens=max(rows, tokens))
    try:
        for number in range(rows):
            prompt = tokens - number * bench.page_size % tokens // 2 - number
            core.add(engine_state.random_request(number, prompt, 2 * steps, model.config.vocab_size))
        while any(row.fed < row.goal for row in [*core.scheduler.running, *core.scheduler.waiting]):
            core.step()
        decoding = len(core.scheduler.running)
        watch = engine_state.Watch(core)
        watch.look()
        ratio, start = watch.ratio, bench.now()
        for _ in range(steps):
            core.step()
        seconds = (bench.now() - start) / steps
    finally:
        core.close()
    before.append(seconds)
    return {
        "rows": decoding, "ratio": ratio, "step_seconds": seconds, "steps": steps,
        "share_of_scores": None if len(before) == 1 else 1 - before[0] / seconds,
    }  # fmt: skip


def throughput(bench: Bench) -> None:
    """As many rows as the same memory holds, at each ratio."""
    shapes = ("llama-3-8b", "gpt2-124m") if bench.tiny else ("llama-3-8b", "llama-2-7b", "gpt2-124m", "gpt2-1.5b")
    for shape in [bench.shape] if bench.shape else shapes:
        short = shape.startswith("gpt2")
        tokens, ratios = (SHORT, (1.0, 4.0)) if short else (bench.tokens, (1.0, 2.6, 4.0, 8.0))
        tokens = 192 if bench.tiny else tokens
        _run(bench, "throughput", shape, [Case(shape, ratio, True, tokens, None) for ratio in ratios])


def _run(bench: Bench, part: str, shape: str, cases: list[Case]) -> None:
    model = bench.model(part, shape, COLUMNS)
    if model is None:
        return
    memory = bench.room()
    if cases[0].rows is None:  # the same for all of them, and no more than is of use at ratio 1
        memory = min(int(0.95 * memory), MOST_ROWS * full_bytes(describe(model).shape, cases[0].tokens + AHEAD))
    bench.heading(f"{part}: {shape}, at most {human_bytes(memory)} for the cache", COLUMNS)
    before: dict[int, float] = {}
    for case in cases:
        bench.case(part, case.name, COLUMNS, partial(decode, bench, model, case, memory, before))


def decode(bench: Bench, model: Any, case: Case, memory: int, before: dict[int, float]) -> dict[str, Any]:
    """The figures of one batch. before: tokens a second at ratio 1, by the tokens of a row."""
    shape = describe(model, bench.page_size).shape
    stays = profile(case.ratio, case.tokens, shape.num_layers, shape.num_kv_heads, case.skewed)
    policy = policy_for(model, stays)
    most = engine_state.fitting(policy, model, case.tokens, memory, bench.page_size)
    rows = most + 2 if case.rows is None else min(case.rows, most)  # of more than fit the engine admits what it can
    length = min(case.tokens + engine_state.ANSWER, describe(model).max_positions)
    core = engine_state.new_core(
        bench, model, policy, memory, rows, length, max_num_batched_tokens=engine_state.BATCHED, graph_prompts=False
    )
    try:
        engine_state.fill(core, rows, case.tokens, stays)
        found = engine_state.measure(bench, core)
    finally:
        core.close()
    floor, graph = found["floor_seconds"], found["graph_seconds"]
    if case.ratio == 1:
        before[case.tokens] = found["tokens_per_s"]
    return found | {
        "ratio_wanted": case.ratio,
        "skewed": case.skewed,
        "tokens": case.tokens,
        "rows_wanted": case.rows,
        "graph_of_floor": _over(graph, floor),
        "step_of_floor": _over(found["step_seconds"], floor),
        "speedup": _over(found["tokens_per_s"], before.get(case.tokens)),
        "floor_tokens_per_s": found["rows"] / floor,
        "bookkeeping_share": _over(found["bookkeeping_seconds"], graph),
        "gate_share": _over(found["gate_seconds"], graph),
    }


def _over(number: float | None, other: float | None) -> float | None:
    return None if number is None or not other else number / other
