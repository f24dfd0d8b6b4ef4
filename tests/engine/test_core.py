"""Many requests at once: each gets the tokens that it gets alone, from transformers or from kvpleat.compress, whatever
runs beside it, wherever prompts are cut, and however often it gives its pages up."""

import copy
import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpleat import accounting, compress
from kvpleat.engine import sizes
from kvpleat.engine.core import EngineCore
from kvpleat.engine.observed import sample_bytes
from kvpleat.engine.params import Emitted, Request, SamplingParams
from kvpleat.errors import AttachError, OptionError, UnsupportedError
from kvpleat.hf.families import base_of, describe
from kvpleat.kernels.device_pool import check_integrity
from kvpleat.policies import DMC, DMS, AttentionScore, Fold, Full, GateConfig, Gates, Window
from kvpleat.policies.base import Policy
from kvpleat.policies.learned import Learned
from tests import models

LONGEST = 36  # tokens of an answer
COMMON = (1, 2, 15, 16, 17, 33, 60)  # tokens of prompts
LEARNED: dict[str, tuple[type[Learned], int, int | None]] = {
    "dms": (DMS, 5, None),
    "fold": (Fold, 3, None),
    "dmc": (DMC, 0, None),
    "dmc of 3": (DMC, 0, 3),
}
FIXED: dict[str, Policy] = {
    "full": Full(),
    "window": Window(budget=48),
    "window that grows": Window(ratio=2.0),
    "attention": AttentionScore(ratio=4.0),
    "attention often": AttentionScore(ratio=2.0, interval=8),
    "attention in prompts": AttentionScore(ratio=3.0, slack=1.0, interval=16),
    "attention by coverage": AttentionScore(coverage=0.8, interval=8),
}
POLICIES = [*LEARNED, *FIXED]


def model_of(family: str = "llama") -> Any:
    return _model_of(family)


@functools.cache
def _model_of(family: str) -> Any:
    changes: dict[str, Any] = {} if family.startswith("gemma") else {"num_hidden_layers": 2}
    if family == "qwen2":
        changes |= {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    return models.tiny(family, dtype=torch.float32, **changes)


def policy_of(kind: str, family: str = "llama") -> Policy:
    """Policies that keep about half: gates are random, with weights so large that about half of all tokens are
    marked."""
    if kind in FIXED:
        return FIXED[kind]
    cls, delay, look_back = LEARNED[kind]
    base = base_of(model_of(family), describe(model_of(family)))
    options = base["num_layers"], base["num_kv_heads"], base["hidden_size"]
    gates = Gates(GateConfig(cls.name, *options, delay, look_back, scale=2.0, ratio=1.5))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.25 / options[2] ** 0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2)
    return cls(gates=gates.requires_grad_(False))


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(models.prompt(length, seed=length)[0].tolist())


@functools.cache
def answers_to(kind: str, lengths: tuple[int, ...], family: str = "llama") -> dict[str, list[int]]:
    """The greedy answers to prompts of some lengths, from the one-model wrapper, and for Full from transformers alone.
    As padded rows of one batch, where each gets what it gets alone (tests/hf): much faster than one by one."""
    model, longest = model_of(family), max(lengths)
    ids = torch.tensor([[0] * (longest - length) + list(prompt_of(length)) for length in lengths])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": LONGEST, "do_sample": False}
    with nullcontext() if kind == "full" else compress(model, policy_of(kind, family)):
        answers = model.generate(ids, **options)[:, longest:].tolist()
    return {str(length): answer for length, answer in zip(lengths, answers, strict=True)}


def alone(kind: str, length: int, family: str = "llama") -> list[int]:
    """One of them."""
    return answers_to(kind, COMMON if length in COMMON else (length,), family)[str(length)]


class Engine:
    """A core, what it has answered, and a look at its pages now and then."""

    def __init__(self, kind: str, family: str = "llama", device: str = "cpu", **options: Any) -> None:
        defaults = {"kv_memory": "2MiB", "max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 200}
        options = {**defaults, **options}
        model = model_of(family) if device == "cpu" else copy.deepcopy(model_of(family)).to(device)
        self.core = EngineCore(model, policy_of(kind, family), **options)
        given = (options[name] for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"))
        self.samples = sample_bytes(self.core._attached.facts.shape, *given)
        self.steps = 0
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.logprobs: dict[str, list[Any]] = {}

    def add(
        self, name: str, length: int, tokens: int = LONGEST, changed: dict[int, int] | None = None, **options: Any
    ) -> None:
        """changed: tokens of the prompt that are others, by place."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **options})
        prompt = [(changed or {}).get(i, token) for i, token in enumerate(prompt_of(length))]
        self.core.add(Request(name, tuple(prompt), params))
        self.answers[name], self.reasons[name], self.logprobs[name] = [], None, []

    def step(self) -> list[Emitted]:
        emitted = list(self.core.step())
        for news in emitted:
            assert self.reasons[news.request_id] is None, "something comes after the end"
            self.answers[news.request_id] += news.token_ids
            self.reasons[news.request_id] = news.finish_reason
            self.logprobs[news.request_id] += news.logprobs or []
        self.steps += 1
        if (observed := self.core.runner._observed) is not None:
            assert accounting.storage_bytes(list(observed._samples.values())) <= self.samples
        if self.steps % 4 == 0:
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
        self.core.reset_prefix_cache()
        assert self.step() == []
        pool = self.core.runner.pool
        check_integrity(pool)
        assert int(pool.free_count) == pool.holders.numel(), "pages are lost"
        return self

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.core.close()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family: str) -> None:
    """Prompts of several lengths, more of them than seats, cut where the step ends: transformers' own tokens."""
    lengths = [5, 37, 1, 64, 100, 18]
    with Engine("full", family) as engine:
        for length in lengths:
            engine.add(str(length), length)
        engine.run()
    assert engine.answers == answers_to("full", tuple(lengths), family)
    assert set(engine.reasons.values()) == {"length"}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *((kind, "qwen3") for kind in POLICIES),
        *((kind, "gpt2") for kind in ("fold", "dmc", "attention")),
        *((kind, "gemma2") for kind in ("dms", "window that grows", "attention")),
        *((kind, "gemma3_text") for kind in ("fold", "dmc of 3", "window")),
    ],
)
def test_policies(kind: str, family: str) -> None:
    """Chunks of prompts beside tokens of other rows: the tokens of the one-model wrapper."""
    lengths = [70, 3, 41, 16, 1, 160]
    with Engine(kind, family) as engine:
        for length in lengths:
            engine.add(str(length), length)
        engine.run()
        assert engine.core.scheduler.preemptions == 0
    assert engine.answers == answers_to(kind, tuple(lengths), family)


REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(COMMON),
        "tokens": st.integers(1, LONGEST),
        "arrives": st.integers(0, 30),
        "cancelled": st.none() | st.none() | st.integers(0, 40),
    }
)


def memory_of(kind: str, pages: int, seats: int = 4, family: str = "llama", step_tokens: int = 48) -> int:
    """Bytes of so many pages and of what else the cache needs, for sequences of 100 tokens."""
    policy, facts = policy_of(kind, family), describe(model_of(family))
    facts = facts.stored_with(policy.fields, None)
    fixed = sizes.fixed_bytes(policy, facts, seats, step_tokens, 100)
    return sum(fixed.values()) + pages * (accounting.page_bytes(facts.shape) + accounting.PAGE_OVERHEAD)


@pytest.mark.parametrize("kind", ["full", "dms", "fold", "dmc", "window", "attention often"])
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
    with Engine(kind, kv_memory=memory_of(kind, pages, seats, step_tokens=step_tokens), **options) as engine:
        assert engine.core.runner.pool.holders.numel() <= pages
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


@pytest.mark.parametrize(
    ("kind", "family", "pages"),
    [
        ("full", "llama", 34),
        ("dms", "llama", 26),
        ("fold", "llama", 26),
        ("dmc of 3", "llama", 26),
        ("window", "llama", 18),
        ("attention", "llama", 36),
        ("attention in prompts", "llama", 36),
        ("attention by coverage", "llama", 36),
        ("full", "gpt2", 51),
        ("attention", "gemma2", 64),
        ("dms", "gemma3_text", 44),
        ("fold", "gpt2", 42),
    ],
)
def test_preempted(kind: str, family: str, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that give their pages up, in the middle of prompts and of answers, go on with the same tokens."""
    monkeypatch.setattr("kvpleat.engine.reckoned.SCALES", (0.125, 0.125))  # so that too many are let in
    memory = memory_of(kind, pages, family=family, step_tokens=64)
    with Engine(kind, family, kv_memory=memory, max_model_len=100, max_num_batched_tokens=64) as engine:
        lengths = [60, 33, 17, 60, 16, 33]
        for i, length in enumerate(lengths):
            engine.add(str(i), length)
        engine.run()
        assert engine.core.scheduler.preemptions > 0
    assert engine.answers == {str(i): alone(kind, length, family) for i, length in enumerate(lengths)}


def test_alone_without_memory() -> None:
    """Who alone needs more than there is ends with what it has, and others go on."""
    model, policy = model_of(), policy_of("dms")
    for layer in policy.gates.outer:  # type: ignore[union-attr]
        layer.bias.sub_(100.0)  # nothing is ever marked, whatever the gates were trained for
    with Engine("dms", kv_memory=memory_of("dms", 24), max_model_len=100) as engine:
        engine.core.close()
        options = {"kv_memory": memory_of("dms", 24, 2), "max_model_len": 100, "max_num_batched_tokens": 16}
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


# ---- how requests end


def test_end_tokens() -> None:
    """A request ends with the first end token, which is part of its answer; what is drawn after it is dropped."""
    whole = alone("full", 37)
    token = whole[9]
    first = whole.index(token)
    with Engine("full") as engine:
        engine.add("stops", 37, stop_token_ids=[token])
        engine.add("goes on", 37)
        engine.add("waits", 37, stop_token_ids=[token], min_tokens=first + 2, ignore_eos=True)
        engine.run()
    assert engine.answers["stops"] == whole[: first + 1]
    assert engine.answers["goes on"] == whole
    assert token not in engine.answers["waits"][: first + 2]
    assert engine.reasons == {"stops": "stop", "goes on": "length", "waits": engine.reasons["waits"]}


def test_the_models_own_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its generation config, one or several, unless they are ignored."""
    whole = alone("full", 37)
    monkeypatch.setattr(model_of().generation_config, "eos_token_id", [whole[5], 2])
    with Engine("full") as engine:
        engine.add("stops", 37)
        engine.add("ignores", 37, ignore_eos=True)
        engine.run()
    assert engine.answers == {"stops": whole[: whole.index(whole[5]) + 1], "ignores": whole}


def test_model_length() -> None:
    """An answer ends where the engine's sequences do."""
    with Engine("full", max_model_len=40) as engine:
        engine.add("long", 37, tokens=20)
        engine.add("endless", 18, max_tokens=None)
        engine.run()
    assert engine.answers == {"long": alone("full", 37)[:3], "endless": alone("full", 18)[:22]}


def test_cancel() -> None:
    """Waiting or running, at once; unknown ids are no error; a name can be used again."""
    with Engine("dms", max_num_seqs=1) as engine:
        engine.add("runs", 37)
        engine.add("waits", 37)
        engine.add("stays", 18)
        for _ in range(5):
            engine.step()
        for name in ("runs", "waits", "runs", "nobody"):
            engine.core.cancel(name)
        assert engine.core.unfinished == 1
        engine.add("runs", 5)
        engine.run()
    assert engine.answers == {"runs": alone("dms", 5), "waits": [], "stays": alone("dms", 18)}


# ---- what is drawn


@pytest.mark.parametrize("kind", ["full", "fold"])
def test_draws_depend_on_the_request_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a temperature: the same tokens alone, in a batch, and after preemption; other ones for another seed."""
    options = {"temperature": 0.8, "top_p": 0.9, "tokens": 24}
    lengths = [60, 33, 50, 33]

    def answers(several: bool, pages: int = 100, **changed: Any) -> dict[str, list[int]]:
        found, preempted = {}, 0
        for group in [range(4)] if several else [[i] for i in range(4)]:
            with Engine(kind, kv_memory=memory_of(kind, pages), max_model_len=100, **changed) as engine:
                for i in group:
                    engine.add(str(i), lengths[i], seed=i, **options)
                engine.run()
                preempted += engine.core.scheduler.preemptions
            found |= engine.answers
        assert bool(preempted) == (pages < 100)
        return found

    wanted = answers(several=False)
    assert len({tuple(answer) for answer in wanted.values()}) == 4, "33 comes twice, with two seeds"
    assert answers(several=True, max_num_batched_tokens=5) == wanted
    monkeypatch.setattr("kvpleat.engine.reckoned.AHEAD", 4)  # so that too many are let in
    monkeypatch.setattr("kvpleat.engine.reckoned.SCALES", (0.125, 0.125))
    assert answers(several=True, pages={"full": 34, "fold": 32}[kind], max_num_batched_tokens=64) == wanted


def test_seeds_of_the_engine() -> None:
    """Requests without a seed draw by the engine's, each its own way, and the same in the next engine."""

    def answers(seed: int) -> list[list[int]]:
        with Engine("full", seed=seed) as engine:
            for i in range(3):
                engine.add(str(i), 18, 12, temperature=1.0)
            engine.run()
        return list(engine.answers.values())

    first = answers(0)
    assert answers(0) == first
    assert len({tuple(x) for x in [*first, *answers(1)]}) == 6


def test_logprobs() -> None:
    """Each request gets as many as it asked for, of the model itself."""
    with Engine("full") as engine:
        engine.add("three", 37, 8, logprobs=3)
        engine.add("own", 18, 8, logprobs=0, temperature=0.9, seed=1)
        engine.add("none", 5, 8)
        engine.run()
    for name, length, count in (("three", 37, 3), ("own", 18, 0)):
        answer = engine.answers[name]
        tokens = torch.tensor([[*prompt_of(length), *answer]])
        with torch.no_grad():
            logits = model_of()(tokens).logits[0, length - 1 : -1]
        wanted = logits.log_softmax(-1)
        assert len(engine.logprobs[name]) == len(answer) == 8
        for i, found in enumerate(engine.logprobs[name]):
            assert found.ids == (answer[i], *wanted[i].topk(count).indices.tolist())
            torch.testing.assert_close(torch.tensor(found.logprobs), wanted[i][list(found.ids)], atol=1e-4, rtol=0)
            assert found.rank == 1 + int((wanted[i] > wanted[i, answer[i]]).sum())
    assert engine.logprobs["none"] == []


@pytest.mark.parametrize("kind", POLICIES)
def test_nan_stays_in_its_row(kind: str) -> None:
    """Rows whose numbers are not, from somewhere in a prompt or in an answer on, end with an error; those beside them
    and those that get their seats and pages do not notice."""
    lengths = (33, 60, 17, 1, 2)
    model, met = model_of(), {token for length in lengths for token in (*prompt_of(length), *alone(kind, length))}
    # A token of one answer and of no other row is poisoned, and put into a prompt.
    found = ((n, token) for n in (16, 15, 48, 70, 5) for token in alone(kind, n) if token not in {*met, *prompt_of(n)})
    length, poisoned = next(found)
    with Engine(kind, max_num_seqs=3, kv_memory=memory_of(kind, 64, 3), max_model_len=100) as engine:
        weight = model.model.embed_tokens.weight
        kept = weight[poisoned].clone()
        try:
            with torch.no_grad():
                weight[poisoned] = torch.nan
            for name, number in (("in answer", length), ("33", 33), ("in prompt", 40), ("60", 60), ("17", 17)):
                engine.add(name, number, changed={30: poisoned} if name == "in prompt" else {})
            engine.add("1", 1)
            engine.add("2", 2)
            engine.run()
        finally:
            with torch.no_grad():
                weight[poisoned] = kept
    whole = alone(kind, length)
    assert engine.answers.pop("in prompt") == []
    assert engine.answers.pop("in answer") == whole[: whole.index(poisoned) + 1]
    assert [engine.reasons.pop("in prompt"), engine.reasons.pop("in answer")] == ["error"] * 2
    assert engine.answers == {name: alone(kind, int(name)) for name in engine.answers}


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ((), {}, "is empty"),
        ((1,) * 200, {}, "leaves no room"),
        ((1, 97), {}, "knows 0 to 96"),
        ((1, -1), {}, "knows 0 to 96"),
        ((1,), {"logprobs": 21}, "max_logprobs"),
        ((1,), {"stop_token_ids": [97]}, "end at 96"),
    ],
)
def test_requests_that_cannot_run(prompt: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with Engine("full") as engine:
        with pytest.raises(OptionError, match=message):
            engine.core.add(Request("x", prompt, SamplingParams(**options)))
        assert engine.core.unfinished == 0
        engine.add("x", 5)
        with pytest.raises(OptionError, match="not ended yet"):
            engine.add("x", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_memory": "64KiB"}, "One sequence of 200 tokens is expected to need"),
        ({"kv_memory": "1KiB"}, "page tables.* for 4 sequences of 200 tokens, and then 0 pages.*smaller max_num_seqs"),
        ({"kv_memory": "a lot"}, "no amount of memory"),
        ({"max_model_len": 513}, "knows 512 positions"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 48}, "a token of every request"),
        ({"page_size": 8}, "page_size=8"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Engine("full", **options)


@pytest.mark.parametrize(
    ("family", "policy", "message"),
    [("llama", Full(bits=8), "bits=8"), ("mistral", Full(), "sliding window of 20 tokens")],
)
def test_what_is_not_served(family: str, policy: Policy, message: str) -> None:
    """It is said by name, and the model is left as it was (see the fixture in conftest.py)."""
    model = models.tiny(family, dtype=torch.float32, **({"sliding_window": 20} if family == "mistral" else {}))
    with pytest.raises(UnsupportedError, match=message):
        EngineCore(model, policy, kv_memory="1MiB")


def test_one_owner() -> None:
    """A model has one engine, or one policy attached; and while it has, nobody else runs it."""
    model = model_of()
    with Engine("dms") as engine:
        with pytest.raises(AttachError, match="two cannot own one cache"):
            Engine("full")
        with pytest.raises(AttachError, match="outside of the engine"):
            model(torch.tensor([[1, 2, 3]]))
        engine.add("x", 5)
        model.set_attn_implementation("sdpa")
        with pytest.raises(AttachError, match="became 'sdpa'"):
            engine.step()
    with compress(model, policy_of("dms")), pytest.raises(AttachError, match="two cannot own one cache"):
        Engine("full")
    engine.core.close()  # twice is no error
