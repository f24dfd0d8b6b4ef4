"""A device without memory: when an engine is made, and in the middle of a step. Others go on, nothing is lost."""

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from kvpleat.engine import runner
from kvpleat.engine.core import EngineCore
from kvpleat.engine.runner import Runner
from kvpleat.errors import OutOfMemoryError
from kvpleat.policies import Full
from tests.engine.test_core import Engine, alone, memory_of, model_of, policy_of, prompt_of

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_SAYS = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
LENGTHS = (60, 33, 17, 1)


@contextmanager
def forwards(module: Any, hook: Callable[[Any], None]) -> Iterator[None]:
    """Before a module runs: `hook` of its input, which may raise."""
    handle = module.register_forward_pre_hook(lambda _, args: hook(args[0]))
    try:
        yield
    finally:
        handle.remove()


# ---- at the start


@pytest.mark.parametrize("where", ["pool", "warm-up"])
@pytest.mark.parametrize("error", [FULL, CPU_SAYS, MemoryError()], ids=lambda error: type(error).__name__)
def test_no_memory_for_the_cache(where: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said with what to do; the model is as it was, and all that was made until then is free."""
    made: list[Any] = []

    def fail(*_: Any) -> None:
        made.append(weakref.ref(_[0].pool.key))
        raise error

    if where == "pool":
        monkeypatch.setattr(runner, "new_pool", lambda *_: (_ for _ in ()).throw(error))
    else:
        monkeypatch.setattr(Runner, "_decode_by_graph", fail)
    model = model_of()
    before = model.config._attn_implementation
    with pytest.raises(OutOfMemoryError, match=r"kv_memory='1MiB': cpu ran out of .*smaller kv_memory") as caught:
        EngineCore(model, policy_of("dms"), kv_memory="1MiB", max_num_seqs=2, max_model_len=64)
    assert caught.value.__cause__ is error
    assert model.config._attn_implementation == before
    assert [ref() for ref in made] == ([] if where == "pool" else [None]), "the pool lives on"
    monkeypatch.undo()
    EngineCore(model, policy_of("dms"), kv_memory="1MiB", max_num_seqs=2, max_model_len=64).close()


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_decode_by_graph", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        EngineCore(model_of(), Full(), kv_memory="1MiB", max_num_seqs=2, max_model_len=64)
    monkeypatch.undo()
    with Engine("full") as engine:
        engine.add("x", 5)
        with forwards(model_of().model.layers[1].mlp, lambda _: 1 / 0), pytest.raises(ZeroDivisionError):  # type: ignore[arg-type, return-value]
            engine.step()


def test_steps_run_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever thread they do: a new one begins with the first GPU."""
    entered: list[Any] = []
    with Engine("full") as engine:
        engine.core._device = torch.device("cuda:3")
        monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
        engine.add("x", 5, 2)
        engine.step()
    assert entered == [torch.device("cuda:3")]


# ---- in a step


@pytest.mark.parametrize("kind", ["full", "dms", "fold", "dmc of 3", "window", "attention often"])
def test_steps_that_break_off(kind: str) -> None:
    """Steps that some layers have taken part in, and others not: every row goes on with its own tokens."""
    dice = random.Random(kind)
    failed = [False]

    def hook(_: Any) -> None:
        failed.append(not failed[-1] and sum(failed) < 5 and dice.random() < 0.25)
        if failed[-1]:
            raise dice.choice([FULL, CPU_SAYS])

    with Engine(kind, max_num_seqs=3, kv_memory=memory_of(kind, 56, 3), max_model_len=100) as engine:
        with forwards(model_of().model.layers[1].mlp, hook):
            for length in LENGTHS:
                engine.add(str(length), length)
            engine.run()
        assert sum(failed) == 5
    assert engine.answers == {str(length): alone(kind, length) for length in LENGTHS}


@pytest.mark.parametrize("kind", ["fold"])
def test_steps_become_smaller(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where larger ones never fit, all is done in smaller ones; larger ones are tried again, ever more seldom."""
    monkeypatch.setattr("kvpleat.engine.scheduler.PATIENCE", (4, 64))
    sizes: list[int] = []

    def hook(hidden: Any) -> None:
        sizes.append(hidden.shape[1])
        if hidden.shape[1] > 20:
            raise FULL

    with Engine(kind) as engine, forwards(model_of().model.layers[0].mlp, hook):
        for length in LENGTHS:
            if length == 33:
                for _ in range(20):
                    engine.step()
            engine.add(str(length), length)
        engine.run()
    assert engine.answers == {str(length): alone(kind, length) for length in LENGTHS}
    failed = [i for i, size in enumerate(sizes) if size > 20]
    assert 2 <= len(failed) <= 8
    assert failed[-1] > 10, "larger steps were tried again"


def test_the_draw_of_tokens() -> None:
    """No memory after the cache took the tokens in: nothing is fed twice."""
    with Engine("dms") as engine:
        draw, calls = engine.core.runner.sampler.sample, iter(range(1000))

        def sample(*arguments: Any) -> Any:
            if next(calls) in (2, 7, 8):
                raise FULL
            return draw(*arguments)

        engine.core.runner.sampler.sample = sample  # type: ignore[method-assign]
        for length in LENGTHS:
            engine.add(str(length), length)
        engine.run()
    assert engine.answers == {str(length): alone("dms", length) for length in LENGTHS}


@pytest.mark.parametrize("kind", ["dmc"])
def test_a_row_that_never_fits(kind: str) -> None:
    """The token of one row that there is no memory for, alone or not, ends that row and no other."""
    met = {token for length in LENGTHS for token in (*prompt_of(length), *alone(kind, length))}
    bad = next(token for token in range(1, 97) if token not in met)

    def hook(ids: Any) -> None:
        if bool((ids == bad).any()):
            raise FULL

    with Engine(kind) as engine, forwards(model_of().model.embed_tokens, hook):
        engine.add("60", 60)
        engine.add("bad", 20, changed={12: bad})
        for length in LENGTHS[1:]:
            engine.add(str(length), length)
        engine.run()
        assert engine.core.scheduler.step_tokens == engine.core.scheduler.limits.step_tokens
    assert engine.reasons.pop("bad") == "memory"
    assert engine.answers.pop("bad") == []
    assert engine.answers == {str(length): alone(kind, length) for length in LENGTHS}


def test_no_row_fits() -> None:
    """Everything ends, and the engine serves again when there is memory."""
    with Engine("fold") as engine:
        with forwards(model_of().model.layers[1].mlp, lambda _: (_ for _ in ()).throw(FULL)):
            for length in LENGTHS:
                engine.add(str(length), length)
            engine.run()
        assert set(engine.reasons.values()) == {"memory"}
        assert not any(engine.answers.values())
        engine.add("60", 60)
        engine.run()
    assert engine.answers["60"] == alone("fold", 60)
