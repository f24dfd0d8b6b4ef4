"""Many requests at once: each gets the tokens that it gets alone, from transformers or from kvpleat.compress, whatever
runs beside it, wherever prompts are cut, and however often it gives its pages up."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpleat import accounting, compress
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Emitted, Request, SamplingParams
from kvpleat.hf.families import describe
from kvpleat.kernels.device_pool import check_integrity
from kvpleat.policies import DMC, DMS, Fold, Full, GateConfig, Gates, Window
from kvpleat.policies.base import Policy
from kvpleat.policies.learned import Learned
from tests import models

LONGEST = 36  # tokens of an answer
LEARNED: dict[str, tuple[type[Learned], int, int | None]] = {
    "dms": (DMS, 5, None),
    "fold": (Fold, 3, None),
    "dmc": (DMC, 0, None),
    "dmc of 3": (DMC, 0, 3),
}
POLICIES = [*LEARNED, "full", "window", "window that grows"]


@functools.cache
def model_of(family: str = "llama") -> Any:
    return models.tiny(family, dtype=torch.float32, num_hidden_layers=2)


def policy_of(kind: str, family: str = "llama") -> Policy:
    """Policies that keep about half: gates are random, with weights so large that about half of all tokens are
    marked."""
    fixed = {"full": Full(), "window": Window(budget=48), "window that grows": Window(ratio=2.0)}
    if kind in fixed:
        return fixed[kind]
    cls, delay, look_back = LEARNED[kind]
    config = model_of(family).config
    options = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
    gates = Gates(GateConfig(cls.name, *options, delay, look_back, scale=2.0, ratio=1.5))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.25 / config.hidden_size**0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2)
    return cls(gates=gates.requires_grad_(False))


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(models.prompt(length, seed=length)[0].tolist())


@functools.cache
def alone(kind: str, length: int, family: str = "llama") -> list[int]:
    """The greedy answer to `prompt_of(length)`, from the one-model wrapper, and for Full from transformers alone."""
    model, ids = model_of(family), torch.tensor([prompt_of(length)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LONGEST, "do_sample": False}
    if kind == "full":
        return list(model.generate(ids, **options)[0, length:].tolist())
    with compress(model, policy_of(kind, family)):
        return list(model.generate(ids, **options)[0, length:].tolist())


class Engine:
    """A core, what it has answered, and a look at its pages after each step."""

    def __init__(self, kind: str, family: str = "llama", **options: Any) -> None:
        defaults = {"kv_memory": "2MiB", "max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 200}
        self.core = EngineCore(model_of(family), policy_of(kind, family), **{**defaults, **options})
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.logprobs: dict[str, list[Any]] = {}

    def add(self, name: str, length: int, tokens: int = LONGEST, **options: Any) -> None:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **options})
        self.core.add(Request(name, prompt_of(length), params))
        self.answers[name], self.reasons[name], self.logprobs[name] = [], None, []

    def step(self) -> list[Emitted]:
        emitted = self.core.step()
        for news in emitted:
            assert self.reasons[news.request_id] is None, "something comes after the end"
            self.answers[news.request_id] += news.token_ids
            self.reasons[news.request_id] = news.finish_reason
            self.logprobs[news.request_id] += news.logprobs or []
        check_integrity(self.core.runner.pool)
        return emitted

    def run(self) -> "Engine":
        for _ in range(2000):
            if not self.core.unfinished:
                break
            self.step()
        assert not self.core.unfinished, "it does not come to an end"
        for _ in range(2):
            assert self.step() == []
        pool = self.core.runner.pool
        assert int(pool.free_count) == pool.owner.numel(), "pages are lost"
        return self

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.core.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_families(family: str) -> None:
    """Prompts of several lengths, more of them than seats, cut where the step ends: transformers' own tokens."""
    lengths = [5, 37, 1, 64, 100, 18]
    with Engine("full", family) as engine:
        for length in lengths:
            engine.add(str(length), length)
        engine.run()
    assert engine.answers == {str(length): alone("full", length, family) for length in lengths}
    assert set(engine.reasons.values()) == {"length"}


@pytest.mark.parametrize("kind", POLICIES)
def test_policies(kind: str) -> None:
    """Chunks of prompts beside tokens of other rows: the tokens of the one-model wrapper."""
    lengths = [70, 3, 41, 16, 1, 90]
    with Engine(kind, "qwen3") as engine:
        for length in lengths:
            engine.add(str(length), length)
        engine.run()
        assert engine.core.scheduler.preemptions == 0
    assert engine.answers == {str(length): alone(kind, length, "qwen3") for length in lengths}


REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from([1, 2, 15, 16, 17, 33, 60]),
        "tokens": st.integers(1, LONGEST),
        "arrives": st.integers(0, 30),
        "cancelled": st.none() | st.none() | st.integers(0, 40),
    }
)


def memory_of(kind: str, pages: int) -> int:
    """Bytes of so many pages."""
    shape = replace(describe(model_of()).shape, fields=policy_of(kind).fields)
    return pages * accounting.page_bytes(shape)


@pytest.mark.parametrize("kind", ["full", "dms", "fold", "dmc", "window"])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUEST, min_size=2, max_size=5),
    pages=st.integers(32, 60),
    seats=st.integers(1, 4),
    step_tokens=st.sampled_from([4, 16, 64]),
)
def test_any_requests(kind: str, requests: list[dict[str, Any]], pages: int, seats: int, step_tokens: int) -> None:
    """Arrivals, cancels and pools that are too small for all: every request ends with its own tokens, and at the end
    all pages are free."""
    options = {"max_num_seqs": seats, "max_num_batched_tokens": step_tokens, "max_model_len": 100}
    with Engine(kind, kv_memory=memory_of(kind, pages), **options) as engine:
        assert engine.core.runner.pool.owner.numel() <= pages
        gone = set()
        for step in range(41):
            for i, request in enumerate(requests):
                if request["arrives"] == step:
                    engine.add(str(i), request["prompt"], request["tokens"])
                if request["cancelled"] == step and str(i) in engine.answers and engine.reasons[str(i)] is None:
                    engine.core.cancel(str(i))
                    gone.add(str(i))
            if engine.core.unfinished:
                engine.step()
        engine.run()
    for i, request in enumerate(requests):
        answer, whole = engine.answers[str(i)], alone(kind, request["prompt"])
        assert answer == whole[: len(answer) if str(i) in gone else request["tokens"]]


@pytest.mark.parametrize("kind", POLICIES)
def test_preempted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that give their pages up, in the middle of prompts and of answers, go on with the same tokens."""
    pages = {"full": 34, "window": 18, "window that grows": 22}.get(kind, 26)
    monkeypatch.setattr("kvpleat.engine.scheduler.SCALES", (0.125, 0.125))  # so that too many are let in
    with Engine(kind, kv_memory=memory_of(kind, pages), max_model_len=100, max_num_batched_tokens=64) as engine:
        lengths = [60, 33, 17, 60, 16, 33]
        for i, length in enumerate(lengths):
            engine.add(str(i), length)
        engine.run()
        assert engine.core.scheduler.preemptions > 0
    assert engine.answers == {str(i): alone(kind, length) for i, length in enumerate(lengths)}


def test_alone_without_memory() -> None:
    """Who alone needs more than there is ends with what it has, and others go on."""
    model, policy = model_of(), policy_of("dms")
    for layer in policy.gates.outer:  # type: ignore[union-attr]
        layer.bias.sub_(100.0)  # nothing is ever marked, whatever the gates were trained for
    with Engine("dms", kv_memory=memory_of("dms", 24), max_model_len=100) as engine:
        engine.core.close()
        options = {"kv_memory": memory_of("dms", 24), "max_model_len": 100, "max_num_batched_tokens": 16}
        engine.core = EngineCore(model, policy, **options, max_num_seqs=2)
        engine.add("long", 70)
        engine.add("short", 16, 8)
        engine.run()
    assert engine.reasons == {"long": "memory", "short": "length"}
    with Engine("full") as whole:
        whole.add("long", 70)
        whole.run()
    assert 0 < len(engine.answers["long"]) < LONGEST
    assert engine.answers["long"] == whole.answers["long"][: len(engine.answers["long"])]
