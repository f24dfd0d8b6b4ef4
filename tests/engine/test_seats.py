"""Rows that go on in other seats: steps get narrower, and every row's tokens are those that it has alone."""

import random
from typing import Any

import pytest
import torch

from kvpleat.engine.rows import Plan
from kvpleat.engine.sizes import ladder, width
from tests.engine.test_core import Engine, memory_of

LENGTHS = (37, 33, 9, 50, 21, 5, 64, 18)
ENDS = (4, 6, 3, 5, 40, 4, 38, 36)  # tokens of the answers: those that last are above the others


class Moving(Engine):
    """An engine, and how its rows moved. widths: seats that steps covered, and that they would have without gaps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, max_num_seqs=options.pop("max_num_seqs", 8), **options)
        self.moved = 0
        schedule, self.widths = self.core.scheduler.schedule, []

        def watched(runs: bool) -> Plan:
            plan = schedule(runs)
            self.moved += len(plan.moved)
            seats = self.core.scheduler.limits.seats
            self.widths.append((width(plan.width, seats), width(len(self.core.scheduler.running), seats)))
            return plan

        self.core.scheduler.schedule = watched  # type: ignore[method-assign]


def options_of(i: int) -> dict[str, Any]:
    """What a row asks the sampler for."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": i}, {"temperature": 0.0}, {"temperature": 1.1, "top_k": 9, "seed": i},
        {"temperature": 0.9, "top_p": 0.7, "seed": i, "min_tokens": 3, "stop_token_ids": [11, 12]},
    ]  # fmt: skip
    return kinds[i % len(kinds)]


def answers(kind: str, family: str, together: bool, **options: Any) -> tuple[dict[str, list[int]], int]:
    """Of all requests, together or each in an engine of its own, and how many rows moved."""
    found, moved = {}, 0
    for group in [range(8)] if together else [[i] for i in range(8)]:
        with Moving(kind, family, **options) as engine:
            for i in group:
                engine.add(str(i), LENGTHS[i], tokens=ENDS[i], **options_of(i))
            engine.run()
            moved += engine.moved
        found |= engine.answers
    return found, moved


@pytest.mark.parametrize(
    ("kind", "family"),
    [("full", "llama"), ("window", "llama"), ("attention often", "llama"), ("attention in prompts", "llama"),
     ("dms", "llama"), ("fold", "llama"), ("dmc", "llama"), ("dmc of 3", "llama"), ("full", "gemma2"),
     ("dms", "gemma2"), ("attention often", "gemma2")],
)  # fmt: skip
@pytest.mark.parametrize("sharing", [True, False])
def test_moved_rows_go_on_as_alone(kind: str, family: str, sharing: bool) -> None:
    if not sharing and kind.startswith("attention"):
        pytest.skip("it never shares")
    options = {"enable_prefix_caching": sharing, "kv_memory": "8MiB"}
    together, moved = answers(kind, family, True, **options)
    alone, none = answers(kind, family, False, **options)
    assert moved >= 2
    assert none == 0, "one row alone has nowhere to go"
    assert together == alone


@pytest.mark.parametrize("most", [1, 2, 5, 8, 100])
def test_width_is_of_the_ladder(most: int) -> None:
    for seats in range(1, most + 1):
        assert width(seats, most) == min(n for n in ladder(most) if n >= seats)


def test_steps_get_narrower() -> None:
    with Moving("full", kv_memory="8MiB", max_num_batched_tokens=512) as engine:
        for i in range(8):
            engine.add(str(i), LENGTHS[i], tokens=ENDS[i], temperature=0.0)
        engine.run()
    wide = [covered > needed for covered, needed in engine.widths if needed > 1]
    assert engine.widths[2][0] == 8
    assert engine.widths[20] == (4, 4), "three rows of eight"
    assert not any(wide)


@pytest.mark.parametrize("kind", ["full", "fold", "attention often"])
@pytest.mark.parametrize("seed", range(2))
def test_any_order(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come and end as chance has it, in a pool that is too small at times."""
    monkeypatch.setattr("kvpleat.engine.reckoned.SCALES", (0.125, 0.125))  # so that too many are let in
    monkeypatch.setattr("kvpleat.engine.reckoned.AHEAD", 4)
    chance = random.Random(seed)
    asked = [(chance.randrange(2, 60), chance.randrange(1, 40), chance.randrange(40)) for _ in range(16)]
    found = []
    for pages in (36, 400):
        with Moving(kind, kv_memory=memory_of(kind, pages, seats=8), max_model_len=100) as engine:
            for step in range(41):
                for i, (length, tokens, when) in enumerate(asked):
                    if when == step:
                        engine.add(str(i), length, tokens=tokens, temperature=0.7, seed=i)
                engine.step()
            engine.run()
            assert engine.moved
            preempted = engine.core.scheduler.preemptions
            assert not preempted if pages > 100 else preempted or kind == "attention often"
        found.append(engine.answers)
    assert found[0] == found[1]
    assert {name: len(answer) for name, answer in found[0].items()} == {str(i): a[1] for i, a in enumerate(asked)}


def test_a_cancelled_row_that_moved_leaves_its_new_seat() -> None:
    with Moving("dms", kv_memory="8MiB") as engine:
        for i in range(8):
            engine.add(str(i), LENGTHS[i], tokens=ENDS[i], temperature=0.0)
        while not engine.moved:
            engine.step()
        engine.core.cancel("6")
        pool = engine.core.runner.pool
        engine.step()
        assert int((pool.lengths[:8].sum((1, 2)) > 0).sum()) == len(engine.core.scheduler.running)
        engine.core.cancel("4")
        engine.core.cancel("7")
        engine.reasons |= dict.fromkeys("467", "abort")
        while engine.core.unfinished:
            engine.step()
        for _ in range(2):
            engine.step()
        assert not torch.count_nonzero(pool.lengths[:8])
