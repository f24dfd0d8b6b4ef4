"""The engine on a model: a LoRA merged, gates that are channels of the model, layers fused; and all of it taken off."""

import copy
import functools
from typing import Any

import pytest
import torch

from kvpleat import compress
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.errors import AttachError
from kvpleat.policies import DMC, DMS, Full, GateConfig, Gates
from kvpleat.policies.base import Policy
from kvpleat.policies.lora import LoraWeights
from tests import models

PROMPTS = (30, 5, 17)
TOKENS = 12


def alone(model: Any, policy: Policy) -> dict[str, list[int]]:
    """Answers of the one-model wrapper."""
    answers = {}
    with compress(model, policy):
        for length in PROMPTS:
            ids = models.prompt(length, seed=length)
            mask = torch.ones_like(ids)
            found = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
            answers[str(length)] = found[0, length:].tolist()
    return answers


def together(model: Any, policy: Policy, **options: Any) -> dict[str, list[int]]:
    """Answers of the engine."""
    core = EngineCore(
        model, policy, kv_memory="1MiB", max_num_seqs=2, max_num_batched_tokens=24, max_model_len=64, **options
    )
    answers: dict[str, list[int]] = {str(length): [] for length in PROMPTS}
    for name in answers:
        prompt = tuple(models.prompt(int(name), seed=int(name))[0].tolist())
        core.add(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    while core.unfinished:
        for news in core.step():
            answers[news.request_id] += news.token_ids
    core.close()
    return answers


def gates_for(model: Any, **options: Any) -> Gates:
    config, random = model.config, torch.Generator().manual_seed(0)
    sizes = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
    gates = Gates(GateConfig("dms", *sizes, delay=4, scale=2.0, **options))
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.25 / config.hidden_size**0.5)
            layer.bias.zero_()
    return gates.requires_grad_(False)


def test_lora() -> None:
    """It is merged while the engine lives; then the weights are what they were, bit for bit."""
    model, random = models.tiny("llama", dtype=torch.float32), torch.Generator().manual_seed(2)
    name, policy = "model.layers.1.self_attn.o_proj", DMS(gates=gates_for(model))
    rows, columns = model.get_submodule(name).weight.shape
    pair = torch.randn(3, columns, generator=random).half(), torch.randn(rows, 3, generator=random).half()
    assert isinstance(policy.gates, Gates)
    plain = together(model, policy)
    policy.gates.adapter = LoraWeights(3, 0.1, {name: pair})
    before = {key: x.clone() for key, x in model.state_dict().items()}
    answers = together(model, policy)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert answers == alone(model, policy) != plain


def test_sinks() -> None:
    """First entries that gates have no say in."""
    model = models.tiny("llama", dtype=torch.float32)
    policy = DMS(gates=gates_for(model, sinks=4))
    answers = together(model, policy)
    assert answers == alone(model, policy) != alone(model, DMS(gates=gates_for(model)))


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_channels_of_the_model(method: str) -> None:
    """Published checkpoints: gates are channels that attention must not see."""
    model = models.tiny(
        "qwen3", dtype=torch.float32, dms_window_size=6, rope_parameters={"rope_type": "default", "rope_theta": 10.0}
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight[-1] *= 12.0
    policy = DMS(gates="model") if method == "dms" else DMC(gates="model")
    answers = together(model, policy)
    assert answers == alone(model, policy) != alone(model, Full())


def test_a_module_that_was_replaced() -> None:
    """Its gates are not asked any more, which is said."""
    model = models.tiny("llama", dtype=torch.float32)
    core = EngineCore(model, DMS(gates=gates_for(model)), kv_memory="1MiB", max_num_seqs=2, max_model_len=64)
    old, model.model.layers[1].self_attn = (
        model.model.layers[1].self_attn,
        copy.deepcopy(model.model.layers[1].self_attn),
    )
    model.model.layers[1].self_attn._forward_pre_hooks.clear()
    core.add(Request("x", (3, 4, 5), SamplingParams()))
    with pytest.raises(AttachError, match="layer 1 ran without its gates"):
        core.step()
    model.model.layers[1].self_attn = old
    core.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it where a graph breaks
def test_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens; layers share what is compiled, and nothing is left behind."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = models.tiny("llama", dtype=torch.float32, num_hidden_layers=4).requires_grad_(False)
    policy = DMS(gates=gates_for(model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert together(model, policy, compile=True) == together(model, policy)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 12, "each layer has its own"
    assert all(module._compiled_call_impl is None for module in model.modules())
