"""LoRA on a model: merged as PEFT merges it, and the weights put back bit for bit, whatever happened in between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvpleat import compress, policies
from kvpleat.errors import KvpleatError, ModelError, OptionError, UnsupportedError
from kvpleat.hf import adapters
from kvpleat.hf.families import base_of, describe
from kvpleat.policies import lora
from kvpleat.policies.learned import new_gates
from kvpleat.policies.lora import LoraWeights
from tests import models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen3": ["k_proj", "o_proj"]}
Weights = dict[str, Tensor]


def adapted(family: str, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """PEFT's own model of `family` with a random LoRA, which it has saved in `folder`."""
    model = models.tiny(family, dtype=dtype)
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **options
    )
    wrapped = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=random)
                parameter.copy_(noise.half())  # what 16 bits can hold
    wrapped.save_pretrained(folder)
    return wrapped


def copy(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def random_lora(model: Any, *names: str, rank: int = 3) -> LoraWeights:
    random = torch.Generator().manual_seed(2)
    pairs = {}
    for name in names:
        size = model.get_submodule(name).weight.shape
        out, inner = reversed(size) if isinstance(model.get_submodule(name), adapters.Conv1D) else size
        pairs[name] = (
            torch.randn(rank, inner, generator=random).half(),
            torch.randn(out, rank, generator=random).half(),
        )
    return LoraWeights(rank, 2.0, pairs)


def gates_for(model: Any, adapter: LoraWeights | None) -> policies.Gates:
    base = base_of(model, describe(model))
    shape = {name: base[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    gates = new_gates(policies.DMS, delay=8, base=base, **shape)
    gates.adapter = adapter
    return gates


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_merged_weights_are_those_of_peft(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = adapted(family, tmp_path, torch.float64, **options)
    model = models.tiny(family)
    before = copy(model.state_dict())
    merged = adapters.merge(model, LoraWeights.load(tmp_path))
    expected = theirs.merge_and_unload().state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert len(changed) == 3 * (len(TARGETS[family]) + (family == "gpt2"))  # GPT-2 has a c_proj in its MLP too
    assert set(model.state_dict()) == set(expected)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6, msg=name)  # PEFT adds in float32
    merged.undo()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_in_16_bits(dtype: torch.dtype) -> None:
    """The nearest number of the dtype to what float64 gives."""
    model = models.tiny("llama", dtype=dtype)
    name = "model.layers.1.mlp.up_proj"
    lora_weights = random_lora(model, name)
    a, b = (x.double() for x in lora_weights.pairs[name])
    before = model.get_submodule(name).weight.double()
    adapters.merge(model, lora_weights)
    expected = before + 2.0 / 3 * (b @ a)
    step = torch.finfo(dtype).eps * expected.abs()
    assert bool(((model.get_submodule(name).weight.double() - expected).abs() <= 0.5001 * step + 1e-6).all())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sees for itself how Conv1D stores a weight
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_what_is_saved(family: str, tmp_path: Path) -> None:
    """A LoRA from memory, saved and loaded by PEFT, gives the logits that it gives when merged."""
    model = models.tiny(family, dtype=torch.float32)
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(TARGETS[family]))][1:]
    weights = random_lora(model, *names)
    weights.save(tmp_path)
    ids = models.prompt(23)
    wrapped = peft.PeftModel.from_pretrained(models.tiny(family, dtype=torch.float32), tmp_path)
    adapters.merge(model, weights)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, atol=2e-4, rtol=2e-4)
    read = LoraWeights.load(tmp_path)
    assert (read.rank, read.scale) == (3, 2.0 / 3)
    assert all(
        torch.equal(got, pair)
        for name in names
        for got, pair in zip(read.pairs[name], weights.pairs[name], strict=True)
    )


def test_attached_logits_are_those_of_peft_and_detached_ones_the_model_s_own(tmp_path: Path) -> None:
    theirs = adapted("llama", tmp_path, torch.float64)
    model, ids = models.tiny("llama"), models.prompt(40)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        own, expected = model(ids).logits, theirs(ids).logits
        with compress(model, policies.DMS(gates=gates_for(model, LoraWeights.load(tmp_path)))):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
            assert not torch.equal(model(ids).logits, own)
        assert torch.equal(model(ids).logits, own)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}


def test_weights_come_back_when_attaching_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of merging, and after it."""
    model = models.tiny("llama")
    before, parameters = copy(model.state_dict()), [id(p) for p in model.parameters()]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    policy = policies.DMS(gates=gates_for(model, random_lora(model, *names)))
    real, calls = adapters._sum, []

    def breaks(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "_sum", breaks)
        with pytest.raises(MemoryError), compress(model, policy):
            pass
    assert len(calls) == 3
    with monkeypatch.context() as patch:
        patch.setattr("kvpleat.hf.attach.wrap_generate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError), compress(model, policy):
            pass
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_tied_weight_changes_in_one_place() -> None:
    """A LoRA on the head leaves the embedding that shares its weight alone, as PEFT's own forward does."""
    model = models.tiny("llama", tie_word_embeddings=True)
    shared = model.model.embed_tokens.weight
    assert model.lm_head.weight is shared
    before = shared.clone()
    merged = adapters.merge(model, random_lora(model, "lm_head"))
    assert not torch.equal(model.lm_head.weight, before)
    assert model.model.embed_tokens.weight is shared
    assert torch.equal(shared, before)
    merged.undo()
    assert model.lm_head.weight is shared


def shared_module(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj


def quantised(model: Any) -> None:
    class Packed(nn.Linear):
        """As quantising libraries do it."""

    model.model.layers[0].self_attn.q_proj = Packed(48, 96)


def integers(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj
    weight.weight = nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)


def wrapped(model: Any) -> None:
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def other_shape(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(48, 24)


def gone(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shared_module, UnsupportedError, "one module under 2 names"),
        (quantised, UnsupportedError, "q_proj is a Packed with a Parameter, quantised, wrapped or offloaded"),
        (integers, UnsupportedError, "then quantise"),
        (wrapped, UnsupportedError, "q_proj is a Linear with a Parameter"),
        (other_shape, OptionError, r"from 48 to 96 channels, and the model's weight is \(24, 48\)"),
        (gone, OptionError, "has no such module"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(change: Any, error: type[KvpleatError], message: str) -> None:
    model = models.tiny("llama")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 0)]
    weights = random_lora(model, *names)
    change(model)
    before = copy(model.state_dict())
    with pytest.raises(error, match=message):
        adapters.merge(model, weights)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---- files


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / lora.CONFIG_FILE).read_text())
    (folder / lora.CONFIG_FILE).write_text(json.dumps(config | changes))


def drop(folder: Path, ending: str) -> None:
    tensors = load_file(folder / lora.WEIGHTS_FILE)
    save_file({k: v for k, v in tensors.items() if not k.endswith(ending)}, folder / lora.WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, use_dora=True), "does not know: use_dora=True"),
        (lambda f: change_config(f, rank_pattern={"q_proj": 2}), "rank_pattern"),
        (lambda f: change_config(f, bias="all"), "bias='all'"),
        (lambda f: change_config(f, peft_type="IA3"), "is no LoRA"),
        (lambda f: change_config(f, init_lora_weights="pissa"), "changes base weights"),
        (lambda f: change_config(f, r=4), "not of rank 4"),
        (lambda f: drop(f, "layers.0.self_attn.q_proj.lora_B.weight"), "q_proj.lora_B"),
        (lambda f: drop(f, "weight"), "there are no pairs"),
        (lambda f: (f / lora.WEIGHTS_FILE).write_bytes(b"nonsense"), "header"),
        (lambda f: (f / lora.WEIGHTS_FILE).unlink(), "adapter_model.safetensors"),
    ],
)
def test_files_that_say_more_or_less_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    adapted("llama", tmp_path, torch.float32)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        LoraWeights.load(tmp_path)


def test_gates_and_their_adapter_travel_together(tmp_path: Path) -> None:
    """Saved and loaded; a label that knows both; and no adapter left from gates that were there before."""
    model = models.tiny("llama")
    plain, both = gates_for(model, None), gates_for(model, random_lora(model, "model.layers.0.self_attn.q_proj"))
    assert plain.label != both.label
    (tmp_path / "README.md").write_text("about")
    both.save_pretrained(tmp_path)
    read = policies.Gates.from_pretrained(tmp_path)
    assert read.adapter is not None
    assert read.adapter.scale == 2.0 / 3
    assert "LoRA of rank 3" in repr(read)
    (tmp_path / lora.WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(ModelError, match="No gates can be loaded"):
        policies.Gates.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    assert policies.Gates.from_pretrained(tmp_path).adapter is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "gates.safetensors"]
