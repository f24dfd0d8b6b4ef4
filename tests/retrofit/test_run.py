"""A run step by step: resumed bit for bit, recomputed or not, and what it leaves on the model and in files."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvpleat.errors import ModelError, OptionError
from kvpleat.hf.adapters import merge
from kvpleat.policies import Gates
from kvpleat.policies.lora import LoraWeights
from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.run import Figures, Run
from tests import models
from tests.retrofit.rows import Rows
from tests.retrofit.test_student import picture

SIZES = [17, 1, 15]
WAYS = {  # each method and each kind of training, with other options among them
    "gates": Recipe(method="fold", train="gates", delay=3, mlp_size=5),
    "lora": Recipe(method="dms", train="lora", delay=5, accumulate=2, lm_weight=0.1),
    "full": Recipe(method="dmc", train="full", delay=0, checkpointing=True),
}
WAYS = {
    name: replace(recipe, ratios=(1.3,), steps=5, rows=2, length=sum(SIZES), rate=0.05, rank=2)
    for name, recipe in WAYS.items()
}


def run_of(recipe: Recipe, family: str = "llama", **options: Any) -> Run:
    return Run(models.tiny(family, **options), recipe, Rows(recipe.rows, SIZES))


def advance(run: Run, steps: int) -> list[Figures]:
    with run.student.attached():
        return [run.advance() for _ in range(steps)]


def state(run: Run) -> dict[str, Tensor]:
    """Everything that is trained, and the optimiser's state."""
    tensors = {name: p.detach().clone() for name, p in run.trained().items()}
    for index, values in run.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return tensors


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("way", WAYS)
def test_resumed_bit_for_bit(way: str, tmp_path: Path) -> None:
    """Five steps, or three, a file, other objects, and two more: the same numbers everywhere."""
    whole = run_of(WAYS[way])
    figures = advance(whole, 5)
    first = run_of(WAYS[way])
    assert advance(first, 3) == figures[:3]
    checkpoint.save(first, tmp_path / "checkpoint")
    second = run_of(WAYS[way])
    second.batches.next_row = 1000
    found = checkpoint.find(tmp_path / "checkpoint", second.processes)
    assert found is not None
    checkpoint.load(second, found)
    assert (second.step, second.tokens) == (3, first.tokens)
    equal(state(second), state(first))
    assert advance(second, 2) == figures[3:]
    equal(state(second), state(whole))
    assert (second.step, second.tokens) == (whole.step, whole.tokens)
    assert len({figure.loss for figure in figures}) == 5


def test_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on with other options, another model or other processes would be another run."""
    place, recipe = tmp_path / "checkpoint", WAYS["gates"]
    checkpoint.save(run_of(recipe), place)
    for run, text in (
        (run_of(replace(recipe, rate=0.04)), "with recipe .*'rate': 0.05.* and this run has .*'rate': 0.04"),
        (run_of(recipe, num_hidden_layers=2), "with base .*'num_layers': 3.* and this run has .*'num_layers': 2"),
    ):
        before = state(run)
        with pytest.raises(ModelError, match=text):
            checkpoint.load(run, place)
        equal(state(run), before)
    run = run_of(recipe)
    monkeypatch.setattr(run.processes, "size", 2)
    with pytest.raises(ModelError, match="with processes 1 and this run has 2"):
        checkpoint.load(run, place)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    place, recipe = tmp_path / "checkpoint", WAYS["gates"]
    checkpoint.save(run_of(recipe), place)
    file = place / checkpoint.TENSORS_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"cannot be read.*Remove it"):
        checkpoint.load(run_of(recipe), place)
    assert checkpoint.find(tmp_path / "nothing", run_of(recipe).processes) is None


@pytest.mark.parametrize("place", ["tensors", "state", "first rename", "second rename"])
def test_an_interrupted_save_leaves_the_old_one(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is cut off, the checkpoint before it is found, and saving again works."""
    folder, run = tmp_path / "checkpoint", run_of(WAYS["gates"])
    advance(run, 1)
    checkpoint.save(run, folder)
    saved = state(run)
    advance(run, 1)

    def stop(*arguments: Any, **options: Any) -> None:
        raise InterruptedError

    renames: list[Any] = []

    def rename(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == (1 if place == "first rename" else 2):
            raise InterruptedError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        target = {"tensors": "save_file", "state": "json.dumps"}.get(place, "os.replace")
        patch.setattr(f"kvpleat.retrofit.checkpoint.{target}", rename if "rename" in place else stop)
        with pytest.raises(InterruptedError):
            checkpoint.save(run, folder)
    other = run_of(WAYS["gates"])
    found = checkpoint.find(folder, other.processes)
    assert found is not None
    checkpoint.load(other, found)
    equal(state(other), saved)
    checkpoint.save(run, folder)
    found = checkpoint.find(folder, other.processes)
    assert found == folder
    checkpoint.load(other, found)
    equal(state(other), state(run))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("way", WAYS)
def test_recomputed_activations_change_nothing(way: str) -> None:
    """Noise and decisions are the same when a layer runs again: the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        run = run_of(replace(WAYS[way], checkpointing=checkpointing))
        advance(run, 2)
        calls: list[int] = []
        for layer in run.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with run.student.attached():
            run._backward(next(run.batches), 0)
        taught = 0 if run.student.teacher is not None else 3
        assert len(calls) - taught == (6 if checkpointing else 3)
        gradients.append({name: p.grad for name, p in run.trained().items()})
    equal(gradients[1], gradients[0])
    assert all(bool(gradient.any()) for gradient in gradients[0].values())


@pytest.mark.parametrize("way", WAYS)
def test_one_batch_or_two_halves(way: str) -> None:
    """Two batches of one row each make the step that one batch of both makes, but for the weights of their tokens."""
    recipe = replace(WAYS[way], accumulate=1)
    whole, halves = run_of(recipe), run_of(recipe)
    batch = next(whole.batches)
    batch.loss_weight[:] = batch.loss_weight[:1]
    with whole.student.attached():
        whole._backward(batch, 0)
    noise = halves._noise
    with halves.student.attached():
        for row in range(2):
            part = type(batch)(batch.tokens[row:], batch.doc_start[row:], batch.loss_weight[row:])
            part = type(batch)(*(x[:1] for x in (part.tokens, part.doc_start, part.loss_weight)))
            halves._noise = lambda _, p, r=row: noise(batch, p)[:, r : r + 1]  # type: ignore[method-assign]
            halves._backward(part, 0)
    for name, parameter in halves.trained().items():
        torch.testing.assert_close(parameter.grad / 2, whole.trained()[name].grad, rtol=1e-3, atol=1e-7)


def test_noise_belongs_to_a_row() -> None:
    """Rows, steps, parts and seeds have noise of their own; the same one again is the same."""
    run = run_of(WAYS["gates"])
    batch = next(run.batches)
    noise = run._noise(batch, 0)
    assert torch.equal(run._noise(batch, 0), noise)
    run.processes.rank = 1
    other = run._noise(batch, 0)
    run.processes.rank = 0
    part = run._noise(batch, 1)
    run.step = 1
    later = run._noise(batch, 0)
    seeded = run_of(replace(WAYS["gates"], seed=1))._noise(batch, 0)
    rows = torch.cat([noise, other, part, later, seeded], dim=1).transpose(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_closed_the_model_is_as_it_was(way: str, family: str) -> None:
    """No adapter, no hook, the modes of before; bit for bit where its own weights were not trained."""
    model, tokens = models.tiny(family), models.prompt(20)
    model.get_input_embeddings().requires_grad_(False)
    before, as_it_was = model(tokens).logits, picture(model)
    for _ in range(2):
        run = Run(model, WAYS[way], Rows(2, SIZES))
        advance(run, 2)
        run.close()
        assert picture(model) == as_it_was
        assert torch.equal(model(tokens).logits, before) == (way != "full")


def test_the_start_follows_from_the_seed() -> None:
    """Adapters and gates begin by the seed, whatever torch's generators have done; those stay where they were."""
    recipe = replace(WAYS["lora"], mlp_size=4)
    torch.manual_seed(5)
    follows = torch.rand(3)
    torch.manual_seed(5)
    first = state(run_of(recipe))
    assert torch.equal(torch.rand(3), follows)
    equal(state(run_of(recipe)), first)
    other = state(run_of(replace(recipe, seed=1)))
    assert not all(torch.equal(other[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("adapt", ["attention", "all"])
def test_adapters_load_without_peft(family: str, adapt: str, tmp_path: Path) -> None:
    """What is saved gives the PEFT model's logits once kvpleat has merged it, numbers of 16 bits apart."""
    tokens = models.prompt(30)
    run = run_of(replace(WAYS["lora"], adapt=adapt, model_rate=0.02), family)
    advance(run, 3)
    run.save_gates(tmp_path, 2.0)
    with torch.no_grad():
        wanted = run.model(tokens).logits
        model = models.tiny(family)
        before = model(tokens).logits
        merged = merge(model, LoraWeights.load(tmp_path))
        found = model(tokens).logits
        merged.undo()
    effect = float((wanted - before).abs().max())
    assert effect > 0.05
    assert float((found - wanted).abs().max()) < effect / 50
    adapter = Gates.from_pretrained(tmp_path).adapter
    assert adapter is not None
    layers = run.model.config.num_hidden_layers
    assert len(adapter.pairs) == layers * {"gpt2": (2, 4), "llama": (4, 7)}.get(family, (4, 7))[adapt == "all"]


def test_gates_are_saved_as_they_are(tmp_path: Path) -> None:
    """In float16, with the recipe and what was measured beside them, for the ratio of the stage."""
    run = run_of(WAYS["gates"])
    advance(run, 2)
    run.save_gates(tmp_path, 1.3, {"kl": 0.25})
    loaded = Gates.from_pretrained(tmp_path)
    for name, tensor in run.student.gates.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert (loaded.config.method, loaded.config.ratio, loaded.config.delay) == ("fold", 1.3, 3)
    training = loaded.config.training
    assert (training["step"], training["tokens"], training["measured"]) == (2, 2 * 2 * 33, {"kl": 0.25})
    assert training["recipe"] == json.loads(json.dumps(WAYS["gates"].__dict__))
    assert "kl | 0.25" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_trained_whole_is_saved(tied: bool, tmp_path: Path) -> None:
    """All weights, in bfloat16, as transformers loads them."""
    run = run_of(WAYS["full"], tie_word_embeddings=tied)
    advance(run, 2)
    run.save_gates(tmp_path, 1.3)
    loaded = type(run.model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) == (not tied)


def test_metrics_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    """Lines of steps that are done again are dropped, and so is a line that was cut off."""
    with checkpoint.Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    with checkpoint.Metrics(tmp_path, step=2) as metrics:
        metrics.write({"step": 3, "loss": 9.0, "gates": "2x"})
    with checkpoint.Metrics(tmp_path / "none", main=False) as metrics:
        metrics.write({"step": 1})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0, "gates": "2x"}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"needs peft.*pip install 'kvpleat\[retrofit\]'"):
        run_of(WAYS["lora"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"TensorBoard.*pip install 'kvpleat\[retrofit\]'"):
        checkpoint.Metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match=r"WORLD_SIZE=2.*accelerate.*pip install 'kvpleat\[retrofit\]'"):
        run_of(WAYS["gates"])


def test_methods_that_are_not_taught() -> None:
    recipe = replace(WAYS["gates"])
    object.__setattr__(recipe, "method", "window")  # a recipe itself refuses it
    with pytest.raises(OptionError, match=r"method='window': retrofit teaches one of .*dms"):
        run_of(recipe)
