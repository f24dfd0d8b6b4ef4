"""Published checkpoints whose gates are channels of their own: against a dense forward in float64, written here from
the equations of DMS and DMC and from the model's weights alone.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat import compress, explain, policies
from kvpleat.errors import KvpleatError, ModelError, OptionError
from kvpleat.hf import borrowed
from kvpleat.hf.families import describe
from kvpleat.policies.learned import Learned
from tests import models

LENGTH, WINDOW, LOOK_BACK = 83, 9, 12
BASE = 10.0  # of rotation: the last channel lies in the slowest pair, which must turn far enough to be seen leaking
ROPE = {"rope_type": "default", "rope_theta": BASE}
PIECES = {"whole": [LENGTH], "pieces": [1, 30, 7, 2, 13, 30], "prompt, then steps": [40, *[1] * (LENGTH - 40)]}
CASES = [(family, method, seed) for family in ("llama", "qwen3") for method in ("dms", "dmc") for seed in (0, 1)]


@functools.cache
def checkpoint(family: str, method: str, seed: int = 0) -> Any:
    """A random model whose last channels decide something: about half of all tokens are marked."""
    dms = {"dms_window_size": WINDOW, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}
    model = models.tiny(family, seed=seed, attention_bias=method == "dmc", rope_parameters=ROPE, **dms)
    size, random = model.config.head_dim, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers if method == "dmc" else []:
            module = layer.self_attn
            for name, factor in (("q", 4.0), ("k", 12.0)):
                if family == "qwen3":
                    getattr(module, f"{name}_norm").weight[-1] *= factor
                else:
                    getattr(module, f"{name}_proj").weight[size - 1 :: size] *= factor
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                projection.bias.copy_(0.3 * torch.randn(projection.bias.shape, generator=random))
            module.k_proj.bias[size - 1] = 3.0 if family == "qwen3" else 30.0  # the first head merges long groups
    return model


def policy_for(method: str) -> Learned:
    return policies.DMS(gates="model") if method == "dms" else policies.DMC(gates="model")


# ---- the dense forward


def rms(x: Tensor, module: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def rotate(x: Tensor) -> Tensor:
    """x [heads, T, D] at positions 0 to T - 1: channels c and c + D / 2 turn by position * BASE^(-2 c / D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * BASE ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def visible_dms(evicted: Tensor) -> Tensor:
    """[H, T, T] query i, key j: within the window, or not evicted by what token j + 1 said; evicted is [H, T]."""
    heads, length = evicted.shape
    out = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        for i in range(length):
            for j in range(i + 1):
                out[head, i, j] = i - j <= WINDOW or not evicted[head, j + 1]
    return out


def pool(x: Tensor, merged: Tensor, weight: Tensor) -> Tensor:
    """x [H, T, D] -> weighted mean of the last LOOK_BACK members of each token's group up to itself."""
    out, longest = torch.zeros_like(x), 0
    for head in range(x.shape[0]):
        group: list[int] = []
        for t in range(x.shape[1]):
            group = [*group, t] if merged[head, t] and t else [t]
            members = group[-LOOK_BACK:]
            w = weight[head, members]
            out[head, t] = (w[:, None] * x[head, members]).sum(0) / w.sum()
            longest = max(longest, len(group))
    assert longest > LOOK_BACK
    return out


def attend(x: Tensor, module: Any, config: Any, method: str, marks: Tensor | None, clear_again: bool) -> Tensor:
    """Attention of one layer: x [T, hidden] -> [T, Q * D]; marks [H, T] of adapters; None: the last channels decide."""
    size, heads, groups = config.head_dim, config.num_key_value_heads, 3
    q, k, v = (getattr(module, f"{n}_proj")(x).view(len(x), -1, size).transpose(0, 1).clone() for n in "qkv")
    if hasattr(module, "q_norm"):
        q, k = rms(q, module.q_norm), rms(k, module.k_norm)
    step = groups if method == "dms" else 1
    said_q, said_k = q[..., -1].clone(), k[..., -1].clone()
    if marks is None:
        q[::step, :, -1] = 0
        if method == "dmc":
            k[..., -1] = 0
    if method == "dmc":
        marks = said_k - 5 > 0
        weight = torch.sigmoid(said_q.view(heads, groups, -1).mean(1) + 5) + torch.finfo(torch.float64).eps
        k, v = pool(k, marks, weight), pool(v, marks, weight)
        seen = torch.zeros(heads, len(x), len(x), dtype=torch.bool)
        for i in range(len(x)):
            for j in range(i + 1):
                seen[:, i, j] = i == j or ~marks[:, j + 1]
    else:
        borrows = marks is None
        marks = 100 * said_q[::groups] - 5 > 0 if borrows else marks
        seen = visible_dms(marks)
        clear_again = clear_again and borrows
    assert 0.1 < float(marks.double().mean()) < 0.97
    q, k = rotate(q), rotate(k)
    if clear_again:
        q[::step, :, -1] = 0
        if method == "dmc":
            k[..., -1] = 0
    scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) / size**0.5
    scores = scores.masked_fill(~seen.repeat_interleave(groups, 0), -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1).reshape(len(x), -1)


@torch.no_grad()
def dense(
    model: Any, tokens: Tensor, method: str, adapters: dict[str, Tensor] | None = None, clear_again: bool = True
) -> Tensor:
    """Logits [T, vocabulary] of tokens [T]."""
    x = model.model.embed_tokens.weight[tokens]
    for index, layer in enumerate(model.model.layers):
        marks = None
        if adapters is not None:
            name = f"model.layers.{index}.self_attn.dms_proj_alpha"
            mean = (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
            marks = ((x / mean * adapters[f"{name}_norm.weight"]) @ adapters[f"{name}.weight"].T * 100 - 5).T > 0
        attended = attend(rms(x, layer.input_layernorm), layer.self_attn, model.config, method, marks, clear_again)
        x = x + layer.self_attn.o_proj(attended)
        y, mlp = rms(x, layer.post_attention_layernorm), layer.mlp
        x = (
            x
            + (torch.nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T))
            @ mlp.down_proj.weight.T
        )
    return rms(x, model.model.norm) @ model.lm_head.weight.T


def fed(model: Any, policy: policies.Policy, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits [R, T, vocabulary] of tokens [R, T] in calls of these sizes over one cache."""
    with torch.no_grad(), compress(model, policy) as pleated:
        cache = pleated.new_cache()
        return torch.cat([model(part, **models.given(cache)).logits for part in tokens.split(sizes, 1)], 1)


# ---- equal to it


@pytest.mark.parametrize(("family", "method", "seed"), CASES)
@pytest.mark.parametrize("how", PIECES)
def test_logits_are_those_of_the_dense_forward(family: str, method: str, seed: int, how: str) -> None:
    model, tokens = checkpoint(family, method, seed), models.prompt(LENGTH, seed)
    got = fed(model, policy_for(method), tokens, PIECES[how])[0]
    torch.testing.assert_close(got, dense(model, tokens[0], method), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), [("llama", "dms"), ("qwen3", "dmc")])
def test_the_reference_notices_a_channel_that_leaks_after_rotation(family: str, method: str) -> None:
    model, tokens = checkpoint(family, method), models.prompt(LENGTH)
    got = fed(model, policy_for(method), tokens, [LENGTH])[0]
    leaking = dense(model, tokens[0], method, clear_again=False)
    assert float((got - leaking).abs().max()) > 1e-2


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_padded_rows_are_what_they_are_alone(method: str) -> None:
    """Rows of 83, 51 and 1 tokens, padded on the left, then steps. Positions are given, as generate gives them: without
    a channel that is cleared after rotation, attention depends on more than distances."""
    model, lengths = checkpoint("qwen3", method), (LENGTH, 51, 1)
    rows = [models.prompt(n + 5, seed=n) for n in lengths]
    prompt = torch.zeros(3, LENGTH, dtype=torch.long)
    mask = torch.zeros(3, LENGTH + 5, dtype=torch.long)
    for r, n in enumerate(lengths):
        prompt[r, LENGTH - n :], mask[r, LENGTH - n :] = rows[r][0, :n], 1
    after = torch.cat([row[:, -5:] for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    places[:, LENGTH:] = torch.tensor(lengths)[:, None] + torch.arange(5)
    with torch.no_grad(), compress(model, policy_for(method)) as pleated:
        cache = pleated.new_cache()
        mask[:, LENGTH:] = 1
        logits = []
        for start, stop in ((0, LENGTH), *((LENGTH + i, LENGTH + i + 1) for i in range(5))):
            ids = prompt if start == 0 else after[:, start - LENGTH : stop - LENGTH]
            options = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop], **models.given(cache)}
            logits.append(model(ids, **options).logits[:, -1:])
    got = torch.cat(logits, 1)
    for r, n in enumerate(lengths):
        alone = fed(model, policy_for(method), rows[r], [n, *[1] * 5])[0]
        torch.testing.assert_close(got[r], alone[n - 1 :], atol=1e-5, rtol=1e-4)


def test_memory_is_gone() -> None:
    model = checkpoint("llama", "dmc")
    with torch.no_grad(), compress(model, policies.DMC(gates="model")) as pleated:
        pleated.prefill(models.prompt(400), cache=pleated.new_cache())
        assert pleated.report().compression_ratio > 1.3


def test_the_first_head_decides_for_its_layer_where_the_config_says_so() -> None:
    model = models.tiny("llama", dms_window_size=WINDOW, dms_alpha_per="layer")
    facts = describe(model)
    hidden = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = borrowed.own_gates(model, facts, "dms")(1, hidden)
    model.config.dms_alpha_per = "head"
    each = borrowed.own_gates(model, facts, "dms")(1, hidden)
    assert torch.equal(shared, each[:, :, :1].expand_as(each))
    assert not torch.equal(shared, each)


# ---- adapters


def adapter_tensors(seed: int = 0) -> dict[str, Tensor]:
    """What a checkpoint of tiny qwen3 with dms_separate_alpha holds beside the model, in float32 as float64."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        tensors[f"{name}.weight"] = (0.03 * torch.randn(2, 48, generator=random)).double()
        tensors[f"{name}_norm.weight"] = (1 + 0.5 * torch.randn(48, generator=random)).double()
    return tensors


def with_norms(seed: int = 0) -> Any:
    """Tiny qwen3 whose layer norms weigh channels differently."""
    model = models.tiny(
        "qwen3", seed=seed, dms_window_size=WINDOW, dms_separate_alpha=True, dms_cr=8, rope_parameters=ROPE
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.copy_(0.3 + torch.rand(48, generator=random))
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("how", PIECES)
def test_adapters_are_gates_of_kvpleat(seed: int, how: str, tmp_path: Any) -> None:
    model, tokens, tensors = with_norms(seed), models.prompt(LENGTH, seed), adapter_tensors(seed)
    gates = borrowed.adapter_gates(model, describe(model), tensors)
    assert (gates.config.ratio, gates.config.delay) == (8.0, WINDOW)
    got = fed(model, policies.DMS(gates=gates), tokens, PIECES[how])[0]
    torch.testing.assert_close(got, dense(model, tokens[0], "dms", tensors), atol=1e-5, rtol=1e-4)
    gates.save_pretrained(tmp_path)
    assert policies.Gates.from_pretrained(tmp_path).config == gates.config


# ---- refused


@pytest.mark.parametrize(
    ("family", "config", "policy", "message"),
    [
        ("llama", {}, policies.DMS(gates="model"), "config has no dms_window_size"),
        ("llama", {}, policies.Fold(gates="model"), "with fold on a llama model"),
        ("gpt2", {}, policies.DMC(gates="model"), "with dmc on a gpt2 model"),
        ("gemma3_text", {"dms_window_size": 8}, policies.DMS(gates="model"), "with dms on a gemma3_text model"),
        ("qwen3", {"dms_window_size": 8, "dms_separate_alpha": True}, policies.DMS(gates="model"), "adapter_gates"),
        (
            "qwen3",
            {"dms_window_size": 8, "dms_alpha_per": "token"},
            policies.DMS(gates="model"),
            "dms_alpha_per='token'",
        ),
    ],
)
def test_what_holds_no_gates_is_refused(
    family: str, config: dict[str, Any], policy: policies.Policy, message: str
) -> None:
    model = models.tiny(family, **config)
    for use in (compress, explain):
        with pytest.raises(KvpleatError, match=message):
            use(model, policy)


def test_parts_of_adapters_are_refused() -> None:
    model, tensors = with_norms(), adapter_tensors()
    del tensors["model.layers.1.self_attn.dms_proj_alpha_norm.weight"]
    with pytest.raises(ModelError, match="layer 1 has no gate"):
        borrowed.adapter_gates(model, describe(model), tensors)


def test_own_gates_have_a_name_and_no_folder(tmp_path: Any) -> None:
    model = checkpoint("llama", "dms")
    assert "Gates('model': dms" in explain(model, policies.DMS(gates="model")).topics["policy"]
    with compress(model, policies.DMS(gates="model", bits=8)) as pleated:
        options = pleated.policy.to_dict()
        assert options == {"name": "dms", "ratio": None, "gates": "model", "bits": 8}
        assert policies.from_dict(options) == policies.DMS(gates="model", bits=8)
    gates = borrowed.own_gates(model, describe(model), "dms")
    assert not gates.state_dict()
    with pytest.raises(OptionError, match="gates='model'"):
        gates.save_pretrained(tmp_path)
