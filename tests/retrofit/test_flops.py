"""Costs of a retrofit beside torch's own count of what a forward and a backward pass compute."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvpleat.errors import OptionError
from kvpleat.retrofit import flops
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Packing
from kvpleat.retrofit.data_store import TokenStore
from tests import models
from tests.retrofit.texts import numbered_store

LENGTH = 64
CLOSE = 1e-3  # rotary embedding counts as a product too


def recipe(train: str, **options: Any) -> Recipe:
    return Recipe(train=train, length=LENGTH, delay=4, ratios=(2.0,), **options)


def counted(model: Any, trains_weights: bool) -> tuple[float, float]:
    """FLOPs a token of forward and backward as torch counts them. Eager attention computes every pair of tokens."""
    model.set_attn_implementation("eager")
    model.requires_grad_(trains_weights)
    embedded = model.get_input_embeddings()(models.prompt(LENGTH)).detach().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops() / LENGTH, backward.get_total_flops() / LENGTH


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("train", ["gates", "full"])
def test_costs_are_what_torch_counts(family: str, train: str) -> None:
    model = models.tiny(family, dtype=torch.float32)
    forward, backward = counted(model, train == "full")
    found = flops.cost(model, recipe(train), visible=LENGTH)
    gates = flops.trained_weights(model, recipe(train))["gates"]
    assert found.teacher == pytest.approx(forward, rel=CLOSE)
    assert found.forward - 2 * gates == pytest.approx(forward, rel=CLOSE)
    assert found.backward - 4 * gates == pytest.approx(backward, rel=CLOSE)
    assert found.total == found.teacher + found.forward + found.backward


def test_sliding_layers_see_no_more_than_their_window() -> None:
    """Gemma 3 with two layers of each kind: 6 query heads of 16 channels, 4 FLOPs for each key."""
    model, far = models.tiny("gemma3_text", dtype=torch.float32), 100.0
    near = flops.cost(model, recipe("gates"), visible=10).teacher
    more = flops.cost(model, recipe("gates"), visible=far).teacher - near
    assert more == 4 * 6 * 16 * (2 * (far - 10) + 2 * (models.SLIDING_WINDOW - 10))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("adapt", ["attention", "all"])
def test_trained_numbers_are_those_of_a_run(family: str, adapt: str) -> None:
    from kvpleat.retrofit.train import Run

    model, options = models.tiny(family, dtype=torch.float32), recipe("lora", adapt=adapt, rank=3, mlp_size=5)
    expected = flops.trained_weights(model, options)
    trained = Run(model, options, None).trained()
    assert expected["gates"] == sum(p.numel() for name, p in trained.items() if name.startswith("gates."))
    assert expected["adapters"] == sum(p.numel() for name, p in trained.items() if name.startswith("model."))
    assert all("lora" in name for name in trained if name.startswith("model."))


def test_adapters_cost_their_weights() -> None:
    """Two FLOPs forward and four backward for each number, beside what gates alone cost."""
    model = models.tiny("llama", dtype=torch.float32)
    alone, beside = (flops.cost(model, recipe(train)) for train in ("gates", "lora"))
    adapters = flops.trained_weights(model, recipe("lora"))["adapters"]
    assert beside.teacher == alone.teacher
    assert beside.forward - alone.forward == 2 * adapters
    assert beside.backward - alone.backward == 4 * adapters


@pytest.mark.parametrize("sizes", [[3], [7, 1, 20], [64, 64], [5, 8, 13, 40]])
def test_visible_keys_by_counting(sizes: list[int]) -> None:
    length = 8
    counts = [place % length + 1 for size in sizes for place in range(size)]
    store = numbered_store(sizes)
    mean = sum(counts) / len(counts)
    assert flops.visible_keys(store, length) == pytest.approx(mean)
    assert flops.visible_keys(store, length, 0.25) == pytest.approx(0.25 * 4.5 + 0.75 * mean)


def test_visible_keys_of_packed_rows() -> None:
    """Documents that fill rows to the last token: nothing is cut where the formula does not cut it."""
    store = TokenStore(np.zeros(96, np.uint16), np.array([16, 32, 40, 48, 80, 96]))
    packing = Packing(store, 16)
    rows = [packing.row(i) for i in range(packing.num_rows)]
    seen = [np.arange(16) - starts + 1 for _, starts, _ in rows]
    assert flops.visible_keys(store, 16) == np.mean(seen)


def test_matmul_rate_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that take 5 ms each, the first ones longer: they only warm up."""
    calls: list[tuple[torch.Size, torch.dtype]] = []

    def slow(a: torch.Tensor, b: torch.Tensor) -> None:
        calls.append((b.shape, b.dtype))
        time.sleep(0.005 if len(calls) > 3 else 0.2)

    monkeypatch.setattr(flops.torch, "matmul", slow)
    rate = flops.matmul_rate(torch.device("cpu"), size=32, repeats=4)
    assert calls == [((32, 32), torch.bfloat16)] * 7
    assert 2 * 32**3 / 0.05 < rate <= 2 * 32**3 / 0.005


# ---- the table


@pytest.mark.parametrize(
    ("name", "weights"),
    [("SmolLM2-135M", 134_515_008), ("Llama-3.2-1B", 1_235_814_400), ("Llama-3.2-3B", 3_212_749_824),
     ("Llama-3.1-8B", 8_030_261_248), ("Qwen3-32B", 32_762_123_264), ("Llama-3.1-70B", 70_553_706_496)],
)  # fmt: skip
def test_known_sizes_have_the_weights_their_makers_state(name: str, weights: int) -> None:
    assert sum(p.numel() for p in flops.sized_model(name).parameters()) == pytest.approx(weights, rel=1e-5)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    flops.main(["SmolLM2-135M", "--peak", "100", "--share", "0.5", "--length", "1024", "--train", "lora"])
    *_, line = capsys.readouterr().out.splitlines()
    name, gflop, speed, hours, size = (cell.strip() for cell in line.strip("|").split("|"))
    total = flops.cost(flops.sized_model("SmolLM2-135M"), Recipe(train="lora", length=1024)).total
    assert (name, gflop, size) == ("SmolLM2-135M", f"{total / 1e9:.3g}", "0.251 GiB")
    assert float(speed.replace(",", "")) == pytest.approx(50e12 / total, abs=1)
    assert float(hours) == pytest.approx(1e8 * total / 50e12 / 3600, rel=0.05)


def test_table_of_a_folder(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    models.config("qwen3").save_pretrained(tmp_path / "mine")
    flops.main([str(tmp_path / "mine"), "--train", "gates"])
    assert "| mine |" in capsys.readouterr().out
    with pytest.raises(OptionError, match="neither a folder"):
        flops.main([str(tmp_path)])
