"""What an engine on a GPU does before its first request, done on a CPU."""

from typing import Any

import pytest
import torch

from kvpleat.engine import core as core_module
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.runner import Runner
from kvpleat.engine.sampling import Mode
from kvpleat.engine.warm import warm_up
from kvpleat.errors import OutOfMemoryError
from kvpleat.kernels.device_pool import check_integrity
from tests.engine.test_core import model_of, policy_of


def new(kind: str, family: str, **options: Any) -> EngineCore:
    defaults = {"kv_memory": 2**23, "max_num_seqs": 5, "max_num_batched_tokens": 16, "max_model_len": 64}
    return EngineCore(model_of(family), policy_of(kind, family), **{**defaults, **options})


def answers(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, length in enumerate((3, 21, 40)):
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=9)
        core.add(Request(str(i), tuple(range(3, 3 + length)), params))
    while core.unfinished:
        for news in core.step():
            found.setdefault(news.request_id, []).extend(news.token_ids)
    return found


@pytest.mark.parametrize(
    ("kind", "family"),
    [("full", "llama"), ("window", "llama"), ("attention", "llama"), ("dms", "llama"), ("fold", "llama"),
     ("dmc", "llama"), ("full", "gpt2"), ("dms", "gemma2")],
)  # fmt: skip
def test_nothing_is_left(kind: str, family: str) -> None:
    core = new(kind, family)
    pool, runner = core.runner.pool, core.runner
    warm_up(runner, core.scheduler.limits)
    check_integrity(pool)
    assert int(pool.free_count) == pool.holders.numel()
    assert not any(bool(x.any()) for x in (pool.failed, pool.lengths, pool.num_pages, pool.holders))
    assert runner.sampler.mode == Mode()
    assert runner._observed is None or not runner._observed._samples
    found = answers(core)
    core.close()
    other = new(kind, family)
    assert found == answers(other)
    other.close()


@pytest.mark.parametrize("pages", ["enough", "few"])
def test_every_kind_of_step(pages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a step finds too few pages."""
    core = new("full", "llama")
    if pages == "few":
        core.runner.pool.free_count.fill_(core.scheduler.limits.streams - 1)
    seen, modes = [], set()
    launch, draw = core.runner.launch, core.runner.draw
    monkeypatch.setattr(core.runner, "launch", lambda plan: seen.append(plan) or launch(plan))
    monkeypatch.setattr(core.runner, "draw", lambda n, mode: modes.add((n, mode)) or draw(n, mode))
    warm_up(core.runner, core.scheduler.limits)
    kinds = {(bool(plan.tokens), tuple(sorted({feed.start > 0 for feed in plan.chunks}))) for plan in seen}
    assert kinds >= {(False, (False,)), (False, (True,)), (True, ()), (True, (False,))}
    assert any(len(plan.chunks) == 5 for plan in seen), "a prompt in every seat"
    for name in ("kept", "begun", "taken"):
        assert any(getattr(plan, name) for plan in seen), name
    assert modes >= {(n, Mode(draws=draws)) for n in (1, 2, 4, 5) for draws in (False, True)}
    assert (5, Mode(draws=True, filters=True)) in modes
    assert not int(core.runner.pool.failed)
    core.close()


@pytest.mark.parametrize("options", [{"max_num_seqs": 1}, {"max_model_len": 4}, {"enable_prefix_caching": False}])
def test_small_engines(options: dict[str, Any]) -> None:
    core = new("dms", "llama", **options)
    warm_up(core.runner, core.scheduler.limits)
    assert int(core.runner.pool.free_count) == core.runner.pool.holders.numel()
    assert core.start_seconds > 0
    core.close()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine as it is made, which leaves the model free for another one."""
    monkeypatch.setattr(core_module, "WARMED", ("cpu",))

    def none_left(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_mixed", none_left)
        with pytest.raises(OutOfMemoryError, match="Pass a smaller kv_memory"):
            new("full", "llama")
    new("full", "llama").close()
