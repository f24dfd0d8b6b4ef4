"""The whole engine with the kernels of a GPU, in Triton's interpreter where there is none: prompts in chunks, tokens
beside them, rows that leave. The tokens are those of the one-model wrapper on a CPU."""

from typing import Any

import pytest
import torch

from kvpleat import compress
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.hf.families import base_of, describe
from kvpleat.kernels import decode, extend, fork, gate, prefill, update
from kvpleat.kernels.device_pool import check_integrity
from kvpleat.policies import DMC, DMS, AttentionScore, Fold, GateConfig, Gates, Window
from kvpleat.policies.base import Policy
from tests import models

TOKENS = 2  # of an answer


def policy_of(model: Any, kind: str) -> Policy:
    if kind == "window":
        return Window(budget=48)
    if kind == "attention":
        return AttentionScore(ratio=4.0, interval=2)
    base, (cls, delay) = base_of(model, describe(model)), {"dms": (DMS, 4), "fold": (Fold, 4), "dmc": (DMC, 0)}[kind]
    options = base["num_layers"], base["num_kv_heads"], base["hidden_size"], delay
    gates, random = Gates(GateConfig(cls.name, *options, scale=2.0)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.25 / options[2] ** 0.5)
            layer.bias.zero_()
    return cls(gates=gates.requires_grad_(False))


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
    from kvpleat.kernels import prefill_triton, update_triton

    def attend(*arguments: Any) -> Any:
        return prefill_triton.attend(*arguments, *[None] * (8 - len(arguments)))

    # The interpreter takes programs one by one: better few of them.
    for name, size in {"STREAMS": 16, "MERGED": 16, "MOVED": 16, "MOVERS": 1}.items():
        monkeypatch.setattr(update_triton, name, size)
    for module in (update, extend, fork):
        monkeypatch.setattr(module, "_on_gpu", lambda pool: True)
    monkeypatch.setattr(gate, "runs_on_triton", lambda *tensors: True)
    monkeypatch.setattr(decode, "attend", decode.on_gpu)
    monkeypatch.setattr(decode, "plan", decode.plan_on_gpu)
    monkeypatch.setattr(prefill, "attend", attend)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("dms", "llama"),
        ("fold", "llama"),
        ("dmc", "llama"),
        ("window", "llama"),
        ("fold", "gpt2"),
        ("attention", "llama"),
        ("fold", "gemma2"),
    ],
)
def test_answers(kind: str, family: str, request: pytest.FixtureRequest) -> None:
    changes: dict[str, Any] = {} if family == "gpt2" else {"num_attention_heads": 4}
    if family == "gemma2":
        changes |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
    model = models.tiny(family, dtype=torch.float32, num_hidden_layers=2, **changes)
    policy = policy_of(model, kind)
    prompts = {str(n): models.prompt(n, seed=n) for n in ((60, 5) if kind in ("window", "attention") else (23, 5))}
    with compress(model, policy):
        wanted = {
            name: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
            for name, ids in prompts.items()
        }
    request.getfixturevalue("on_triton")
    options = {
        "kv_memory": "256KiB",
        "max_num_seqs": 2,
        "max_num_batched_tokens": 62 if kind in ("window", "attention") else 25,
        "max_model_len": 64,
    }
    core = EngineCore(model, policy, **options)
    answers: dict[str, list[int]] = {name: [] for name in ("nan", *prompts)}
    if not model.config.tie_word_embeddings:  # a row of NaN comes first: nobody notices, beside it and in its seat
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = torch.nan  # no prompt holds padding
        core.add(Request("nan", (5, 0, 7), SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    for name, ids in prompts.items():
        core.add(Request(name, tuple(ids[0].tolist()), SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    while core.unfinished:
        for news in core.step():
            answers[news.request_id] += news.token_ids
    core.step()
    pool = core.runner.pool
    check_integrity(pool)
    assert int(pool.free_count) == pool.holders.numel()
    core.close()
    assert answers.pop("nan") == []
    assert answers == {name: ids[0, -TOKENS:].tolist() for name, ids in wanted.items()}


def test_shared(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A prompt that begins as another one, and the next turn: rows are forked, kept and dropped."""
    for module in ("prefixes", "pages"):
        monkeypatch.setattr(f"kvpleat.engine.{module}.LEAST", 8)
    model = models.tiny("llama", dtype=torch.float32, num_hidden_layers=2, num_attention_heads=4)
    policy, text = policy_of(model, "fold"), models.prompt(30, seed=1)[0].tolist()
    prompts = {"first": text[:23], "second": [*text[:20], 7, 8], "third": [*text[:23], 9]}
    answers: dict[str, list[int]] = {}
    with compress(model, policy):
        for name, tokens in prompts.items():
            ids = torch.tensor([tokens])
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
            answers[name] = model.generate(ids, **options)[0, -TOKENS:].tolist()
    request.getfixturevalue("on_triton")
    core = EngineCore(model, policy, kv_memory="256KiB", max_num_seqs=2, max_num_batched_tokens=25, max_model_len=64)
    found: dict[str, list[int]] = {name: [] for name in prompts}
    cached = {}
    for name, tokens in prompts.items():
        core.add(Request(name, tuple(tokens), SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    while core.unfinished:
        for news in core.step():
            found[news.request_id] += news.token_ids
            cached[news.request_id] = news.num_cached_tokens
    for _ in range(2):
        core.step()
    check_integrity(core.runner.pool)
    core.reset_prefix_cache()
    core.step()
    check_integrity(core.runner.pool)
    assert int(core.runner.pool.free_count) == core.runner.pool.holders.numel()
    core.close()
    assert found == answers
    assert cached == {"first": 0, "second": 20, "third": 20}
