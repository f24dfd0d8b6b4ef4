"""A retrofit from texts to gate folders that compress."""

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpleat import compress, policies
from kvpleat.policies import Gates
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Batch, mixture
from kvpleat.retrofit.data_held_out import held_out
from kvpleat.retrofit.measure import Lesson, judge
from kvpleat.retrofit.student import Student
from kvpleat.retrofit.train import Progress, retrofit
from tests import models
from tests.retrofit import texts
from tests.retrofit.rows import random_gates

LENGTH = 96
RECIPE = Recipe(
    method="dms", ratios=(1.5, 2.5), train="lora", steps=40, rows=3, length=LENGTH, delay=6, rate=0.03, rank=2
)


def model_for_texts() -> Any:
    return models.tiny("llama", dtype=torch.float32, vocab_size=len(texts.tokenizer()), num_hidden_layers=2)


def batches(recipe: Recipe = RECIPE) -> Any:
    return mixture(
        texts.prose_store(),
        texts.tokenizer(),
        length=LENGTH,
        batch_rows=recipe.rows,
        recall_share=0.0,
        seed=recipe.seed,
    )


def judged() -> Iterator[Batch]:
    return held_out(texts.prose_store(), LENGTH, 4, rows=8)()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress], dict[str, Any]]:
    """A run to the end: its folder, its steps, what was measured."""
    out, steps = tmp_path_factory.mktemp("run"), []
    measured = retrofit(model_for_texts(), RECIPE, batches(), out, held_out=judged, on_step=steps.append)
    return out, steps, measured


def test_the_ratio_goes_up(taught: tuple[Path, list[Progress], dict[str, Any]]) -> None:
    """What is asked for rises, and decisions follow."""
    _, steps, measured = taught
    assert [step.step for step in steps] == list(range(1, 41))
    assert steps[0].reached < 1.1
    assert sum(step.reached for step in steps[-5:]) / 5 > 1.9
    assert [step.ratio for step in steps] == sorted(step.ratio for step in steps)
    assert steps[-1].tokens == 40 * 3 * LENGTH
    assert 1.2 < measured["1.5x"]["ratio"] < 1.6 < measured["2.5x"]["ratio"] < 2.6  # few steps: hard ones lag behind
    assert all(step.tokens_per_s > 0 for step in steps)


def test_what_is_written(taught: tuple[Path, list[Progress], dict[str, Any]]) -> None:
    """A gate folder for each ratio, metrics of each step and stage, curves, cards; no checkpoint, as none was asked
    for."""
    out, steps, measured = taught
    assert {path.name for path in out.iterdir()} == {"1.5x", "2.5x", "measured.json", "metrics.jsonl", "tensorboard"}
    assert json.loads((out / "measured.json").read_text()) == measured
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [step.loss for step in steps]
    assert [(line["step"], line["gates"], line["kl"]) for line in lines if "gates" in line] == [
        (RECIPE.stage_ends()[0], "1.5x", measured["1.5x"]["kl"]),
        (40, "2.5x", measured["2.5x"]["kl"]),
    ]
    for name in measured:
        card = (out / name / "README.md").read_text()
        assert "policies.DMS.from_pretrained" in card
        assert f"| kl | {measured[name]['kl']:.4g} |" in card
        assert Gates.from_pretrained(out / name).config.training["measured"] == measured[name]


@pytest.mark.parametrize("name", ["1.5x", "2.5x"])
def test_what_comes_out_compresses(name: str, taught: tuple[Path, list[Progress], dict[str, Any]]) -> None:
    """A folder is a policy: with its LoRA merged a fresh model holds as many entries as was measured."""
    out, _, measured = taught
    model, policy = model_for_texts(), policies.DMS.from_pretrained(str(out / name))
    assert policy.adapter is not None
    lengths = []
    with torch.no_grad(), compress(model, policy) as pleated:
        assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, model_for_texts_weight())
        for batch in judged():
            cache = pleated.new_cache()
            model(batch.tokens, **models.given(cache))
            assert cache.kv is not None
            lengths.append(cache.kv.lengths.flatten().clone())
    found = LENGTH / float(torch.cat(lengths).double().mean())
    assert found == pytest.approx(measured[name]["ratio"], rel=0.01)  # gates and adapters are saved in 16 bits
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, model_for_texts_weight())


@functools.cache
def model_for_texts_weight() -> torch.Tensor:
    weight: torch.Tensor = model_for_texts().model.layers[0].self_attn.q_proj.weight.detach()
    return weight


def test_gates_learn_what_to_keep(tmp_path: Path) -> None:
    """Without adapters, too: at the same ratio the KL of learned gates is below that of gates by chance."""
    recipe = replace(RECIPE, train="gates", ratios=(2.5,), steps=60, rows=4)
    measured = retrofit(model_for_texts(), recipe, batches(recipe), tmp_path, held_out=judged)["2.5x"]
    by_chance = []
    for seed in range(2):
        low, high = -3.0, 3.0  # biases between which the ratio is met
        for _ in range(7):
            bias = (low + high) / 2
            found = judged_by_chance(seed, bias)
            low, high = (bias, high) if found["ratio"] < measured["ratio"] else (low, bias)
        assert found["ratio"] == pytest.approx(measured["ratio"], rel=0.03)
        by_chance.append(found["kl"])
    assert measured["kl"] < 0.9 * min(by_chance)


def judged_by_chance(seed: int, bias: float) -> dict[str, float]:
    model = model_for_texts()
    gates = random_gates(model, "dms", seed, bias)
    gates.config = replace(gates.config, delay=RECIPE.delay)
    student = Student(model, gates, policies.DMS)
    with student.attached():
        return judge(Lesson(student), judged())


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The metrics, times left out."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def test_steps_fitted_to_the_time(tmp_path: Path) -> None:
    """As many as fit, and never so few that a ratio leaves no gates; a run that was cut off keeps the number."""
    recipe, steps = replace(RECIPE, steps=600, train="gates"), []
    run = functools.partial(retrofit, model_for_texts(), recipe, held_out=judged)
    measured = run(batches(), tmp_path / "none", fit_s=0.0, on_step=steps.append)
    assert list(measured) == ["1.5x", "2.5x"]
    assert steps[-1].step == steps[-1].steps < 90
    assert json.loads((tmp_path / "none" / "2.5x" / "config.json").read_text())["training"]["recipe"]["steps"] < 90

    def stop(progress: Progress) -> None:
        if progress.step == 35:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(batches(), tmp_path / "some", fit_s=0.0, save_every=34, on_step=stop)
    assert run(batches(), tmp_path / "some", fit_s=0.0, save_every=34) == measured


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """A run that stops at its deadline, and one that dies between two checkpoints, end as one that went through: the
    same gates, the same metrics."""
    recipe = replace(RECIPE, steps=8)
    retrofit(model_for_texts(), recipe, batches(), tmp_path / "whole", held_out=judged)

    def die(progress: Progress) -> None:
        if progress.step == 7:
            raise InterruptedError

    run = functools.partial(retrofit, model_for_texts(), recipe, out=tmp_path / "parts", held_out=judged)
    assert run(batches=batches(), deadline_s=0.0) == {}
    assert len(steps_of(tmp_path / "parts")) == 1
    with pytest.raises(InterruptedError):
        run(batches=batches(), save_every=2, on_step=die)
    measured = run(batches=batches(), save_every=2)
    assert measured == json.loads((tmp_path / "whole" / "measured.json").read_text())
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    for name in ("1.5x/gates.safetensors", "2.5x/gates.safetensors", "2.5x/adapter_model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run(batches=batches()) == measured  # nothing is left to do
    shutil.rmtree(tmp_path / "parts" / "checkpoint")
    again = run(batches=batches(), resume=False, deadline_s=0.0)
    assert again == {}
    assert len(steps_of(tmp_path / "parts")) == 1
