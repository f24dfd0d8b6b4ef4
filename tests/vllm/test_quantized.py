"""Quantised weights: vLLM's matter, and none of the cache's. Run by `make test-vllm`; -s shows the figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.policies.lora import LoraWeights

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # of vLLM's

GROUP = 32  # input channels that share a scale in formats of 4 bits
SIZES = (5, 130, 77, 200, 33)
TOKENS = 40
Answer = tuple[list[int], list[float]]  # tokens, their log probabilities


class Format(NamedTuple):
    """How a checkpoint holds linear layers.

    Args:
        config: `quantization_config` of config.json. method: vLLM's class that multiplies by such weights.
        split: a weight [N, K] float32 to tensors by name, and the weight that they stand for.
    """

    config: dict[str, Any]
    method: str
    split: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A scale for each output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A scale for each output channel."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] of 0 to 15, of which 8 is zero; scales [N, K / GROUP]; and what they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()  # as most checkpoints keep them
    codes = (groups / scale).round().clamp(-8, 7)
    return (codes + 8).flatten(1).int(), scale.squeeze(-1), (codes * scale).flatten(1)


def packed(codes: Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight of 4 bits in an int32, the first in the lowest bits."""
    eights = codes.unflatten(axis, (-1, 8)).movedim(axis + 1, -1)[..., list(order)].long()
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return (words - (words >= 2**31).long() * 2**32).to(torch.int32).contiguous()


def int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Packed along the inputs."""
    codes, scale, meant = grouped(weight)
    return {
        "weight_packed": packed(codes, 1), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape),
    }, meant  # fmt: skip


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Packed along the inputs, transposed; zeros are stored less one."""
    codes, scale, meant = grouped(weight)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 7)
    return {
        "qweight": packed(codes.T, 0), "qzeros": packed(zeros, 1), "scales": scale.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, meant  # fmt: skip


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Packed along the outputs, in an order of its own."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, scale, meant = grouped(weight)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 8)
    return {
        "qweight": packed(codes.T, 1, order), "qzeros": packed(zeros, 1, order), "scales": scale.T.contiguous(),
    }, meant  # fmt: skip


def compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights | {"symmetric": True, "dynamic": False}}
    if inputs is not None:
        group["input_activations"] = inputs | {"symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


INT8, FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FOUR = {"bits": 4, "group_size": GROUP}
FORMATS = {
    "compressed-w8a8": Format(
        compressed("int-quantized", INT8 | {"strategy": "channel"}, INT8), "CompressedTensorsLinearMethod", int8
    ),
    "compressed-w4a16": Format(compressed("pack-quantized", INT4, None), "CompressedTensorsLinearMethod", int4),
    "compressed-fp8": Format(
        compressed("float-quantized", FP8 | {"strategy": "channel"}, FP8), "CompressedTensorsLinearMethod", fp8
    ),
    "gptq": Format({"quant_method": "gptq", "desc_act": False, "sym": True, **FOUR}, "AutoGPTQLinearMethod", gptq),
    "awq": Format(
        {"quant_method": "awq", "zero_point": True, "version": "gemm", **FOUR}, "AutoAWQMarlinLinearMethod", awq
    ),
}


def saved(folder: Path, how: Format) -> Any:
    """A tiny Llama in this format; what comes back has the weights that it stands for."""
    model = engines.saved(
        folder,
        "llama",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
    )
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer = name.removesuffix(".weight")
        parts, meant = how.split(tensors.pop(name))
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        model.get_submodule(layer).weight.data.copy_(meant)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": how.config}))
    return model


def said(folder: Path, how: Format, policy: dict[str, Any] | None, **more: Any) -> list[Answer]:
    """What vLLM says to five prompts: by its own cache, or under a policy."""
    given = engines.options("llama", policy or {}, block_size=32, enable_prefix_caching=False, **more)
    if policy is None:
        given = {name: value for name, value in given.items() if name not in ("hf_overrides", "kv_transfer_config")}
    asked: Any = [{"prompt_token_ids": prompt} for prompt in engines.prompts(SIZES)]
    with engines.started(folder, **given) as llm:
        (kinds,) = llm.apply_model(
            lambda model: {type(getattr(x, "quant_method", None)).__name__ for x in model.modules()}
        )
        assert how.method in kinds, kinds
        done = [x.outputs[0] for x in llm.generate(asked, engines.told(TOKENS, logprobs=0), use_tqdm=False)]
    return [
        (list(x.token_ids), [step[t].logprob for t, step in zip(x.token_ids, x.logprobs, strict=True)]) for x in done
    ]


def common(a: Answer, b: Answer) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a[0], b[0], strict=True)) if x != y), len(a[0]))


@pytest.mark.parametrize(("name", "gap"), [("compressed-w8a8", 0.1), ("compressed-fp8", 0.2)])
def test_a_window_that_evicts_nothing_says_what_dense_says(name: str, gap: float, tmp_path: Path) -> None:
    """Up to rounding: activations are rounded to 8 bits, so the last digits of float32 can become the eighth bit, of
    which a floating point number spends four on its exponent. One such bit makes the largest difference, and CPUs
    differ in where it falls; a wrong entry would show in the mean."""
    how = FORMATS[name]
    saved(tmp_path, how)
    dense, kept = said(tmp_path, how, None), said(tmp_path, how, {"policy": "window", "budget": 300})
    same = [common(a, b) for a, b in zip(dense, kept, strict=True)]
    gaps = [
        abs(x - y) for a, b, n in zip(dense, kept, same, strict=True) for x, y in zip(a[1][:n], b[1][:n], strict=True)
    ]
    most, mean = max(gaps), sum(gaps) / len(gaps)
    print(f"\n{name}: equal tokens of {TOKENS}: {same}; log probabilities until then {most:.4f}, mean {mean:.4f}")
    assert sum(same) >= 0.6 * TOKENS * len(SIZES)
    assert most < gap
    assert mean < gap / 20
    evicted = said(tmp_path, how, {"policy": "window", "budget": 48})
    assert sum(common(a, b) for a, b in zip(dense, evicted, strict=True)) < sum(same)


def multiplied(x: Tensor, q_weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """[T, K] times 4 bits as vLLM repacks them for CPUs: of 16 outputs at a time [N / 16, K, 2] int32; zero is 8."""
    assert zeros is None or not (zeros != -(2**31) + 0x08888888).any(), "a zero point other than 8"
    codes = (q_weight.view(q_weight.shape[0], -1, 2, 1) >> torch.arange(0, 32, 4)) & 15
    codes = codes.flatten(2).permute(1, 0, 2).flatten(1) - 8  # [K, N]
    weight = codes * scales.repeat_interleave(codes.shape[0] // scales.shape[0], 0)
    return x @ weight.to(x.dtype) + (0 if bias is None else bias)


@pytest.fixture
def four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel for CPUs needs AVX-512, and 16 bits for some formats, whose rounding would hide what this is about:
    torch multiplies in float32 instead. Reading and repacking stay vLLM's."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq

    def gemm(input: Tensor, q_weight: Tensor, scales: Tensor, zeros: Any, bias: Any, **_: Any) -> Tensor:
        return multiplied(input, q_weight, scales, zeros, bias)

    monkeypatch.setattr(_custom_ops, "cpu_gemm_wna16", gemm)
    for config in (auto_awq.AutoAWQConfig, auto_gptq.AutoGPTQConfig):
        monkeypatch.setattr(config, "get_supported_act_dtypes", lambda *_: [torch.float32])


@pytest.mark.usefixtures("four_bits")
@pytest.mark.parametrize("name", ["compressed-w4a16", "gptq", "awq"])
def test_what_a_policy_says_beside_weights_of_four_bits(name: str, tmp_path: Path) -> None:
    """Token for token what transformers says under the same gates, with the weights that the checkpoint stands for."""
    how = FORMATS[name]
    model = saved(tmp_path / "model", how)
    policy = engines.policy_of(engines.gates_for(model, tmp_path / "gates", "fold"))
    asked = engines.prompts(SIZES)
    want, dense = (engines.by_transformers(model, x, asked, TOKENS) for x in (policy, None))
    assert want != dense
    got = said(tmp_path / "model", how, {"policy": "fold", "gates": str(tmp_path / "gates")})
    assert [tokens for tokens, _ in got] == want


@pytest.mark.usefixtures("four_bits")
@pytest.mark.parametrize("name", FORMATS)
def test_gates_with_a_lora_need_plain_weights(name: str, tmp_path: Path) -> None:
    """They are added while weights are loaded: said by name, and what to do; also where 8-bit codes are called what
    plain weights are."""
    model = saved(tmp_path / "model", FORMATS[name])
    gates = engines.gates_for(model, tmp_path / "gates", "dms")
    layer = "model.layers.0.self_attn.q_proj"
    shape = model.get_submodule(layer).weight.shape
    gates.adapter = LoraWeights(2, 2.0, {layer: (torch.zeros(2, shape[1]), torch.zeros(shape[0], 2))})
    gates.save_pretrained(tmp_path / "gates")
    given = engines.options("llama", {"policy": "dms", "gates": str(tmp_path / "gates")})
    with pytest.raises(OptionError, match=r"LoRA changes model\.layers\.0\.self_attn\.q_proj.*quantised.*Merge"):  # noqa: SIM117
        with engines.started(tmp_path / "model", **given):
            pass
