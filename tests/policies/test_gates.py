"""Gates: what they compute, what their folders hold, and which of those that come with kvpleat serve a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat import policies
from kvpleat.errors import KvpleatError, ModelError, OptionError
from kvpleat.policies import gates as gates_module
from kvpleat.policies.gates import CONFIG_FILE, WEIGHTS_FILE, GateConfig, Gates, find_shipped
from kvpleat.policies.learned import new_gates

BASE: dict[str, Any] = {
    "family": "llama",
    "num_layers": 3,
    "num_kv_heads": 2,
    "num_q_heads": 6,
    "head_dim": 16,
    "hidden_size": 48,
    "vocab_size": 97,
}
METHODS = {"dms": policies.DMS, "fold": policies.Fold, "dmc": policies.DMC}


def make(method: str = "dms", seed: int | None = None, **changes: Any) -> Gates:
    """Gates for BASE; random ones with a seed."""
    shape = {name: BASE[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    options = {"delay": 0 if method == "dmc" else 8, "base": BASE, **shape, **changes}
    gates = new_gates(METHODS[method], **options)
    if seed is not None:
        random = torch.Generator().manual_seed(seed)
        for tensor in gates.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=random).half())  # what the file can hold
    return gates


def logits_by_hand(gates: Gates, layer: int, token: Tensor) -> list[list[float]]:
    """[outputs][H] of one token, number by number, from the definition in the module and in GateConfig."""
    weights = {name: tensor.double().tolist() for name, tensor in gates.state_dict().items()}
    x = token.double().tolist()
    if gates.config.mlp_size is not None:
        rows, bias = weights[f"inner.{layer}.weight"], weights[f"inner.{layer}.bias"]
        inner = [sum(w * c for w, c in zip(row, x, strict=True)) + b for row, b in zip(rows, bias, strict=True)]
        x = [value / (1 + 2.718281828459045**-value) for value in inner]
    rows, bias = weights[f"outer.{layer}.weight"], weights[f"outer.{layer}.bias"]
    flat = [
        gates.config.scale * sum(w * c for w, c in zip(row, x, strict=True)) + b
        for row, b in zip(rows, bias, strict=True)
    ]
    heads = gates.config.num_kv_heads
    return [flat[output * heads : (output + 1) * heads] for output in range(gates.config.outputs)]


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_saves_and_loads_its_gates(method: str, tmp_path: Path) -> None:
    gates = make(method, seed=3)
    METHODS[method](gates=gates).save_pretrained(tmp_path / "gates")
    policy = METHODS[method].from_pretrained(str(tmp_path / "gates"))
    hidden = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(policy.marks(1, hidden).marked, METHODS[method](gates=gates).marks(1, hidden).marked)
    with pytest.raises(OptionError, match="no gates before it meets a model"):
        METHODS[method](ratio=4.0).save_pretrained(tmp_path / "none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mlp_size", [None, 5])
def test_logits(method: str, mlp_size: int | None) -> None:
    gates = make(method, seed=1, mlp_size=mlp_size, scale=3.0)
    hidden = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(2))
    got = gates(1, hidden)
    assert tuple(got.shape) == (gates.config.outputs, 2, 2, 7)
    for row, token in ((0, 0), (1, 4), (1, 6)):
        expected = torch.tensor(logits_by_hand(gates, 1, hidden[row, token]))
        torch.testing.assert_close(got[:, row, :, token], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_do_not_depend_on_how_many_tokens_come_at_once(dtype: torch.dtype) -> None:
    gates = make("fold", seed=3)
    hidden = torch.randn(1, 33, 48, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = gates(0, hidden)
    steps = torch.cat([gates(0, hidden[:, i : i + 1]) for i in range(33)], dim=-1)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, steps, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_untrained_gates_mark_nothing(method: str) -> None:
    policy = METHODS[method](gates=make(method))
    marks = policy.judge(policy.gates(0, torch.randn(1, 9, 48)))
    assert not bool(marks.marked.any())


# ---- folders


def test_a_folder_holds_the_same_gates_in_16_bits(tmp_path: Path) -> None:
    gates = make("fold", seed=5, mlp_size=7, ratio=4.0, look_back=3, training={"steps": 10})
    gates.save_pretrained(tmp_path / "a" / "b")
    read = Gates.from_pretrained(tmp_path / "a" / "b")
    assert read.config == gates.config
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in gates.state_dict().items())
    numbers = sum(tensor.numel() for tensor in gates.state_dict().values())
    assert (tmp_path / "a" / "b" / WEIGHTS_FILE).stat().st_size < 2 * numbers + 2000
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_labels_and_options() -> None:
    """A label tells gates apart; to_dict is JSON, and from_dict takes it."""
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert one.label == same.label != other.label
    for policy in (policies.DMS(gates=one, bits=8), policies.DMS(ratio=4.0), policies.DMS(gates="somewhere")):
        options = policy.to_dict()
        assert policies.from_dict(json.loads(json.dumps(options))).to_dict() == options
    assert policies.DMS(gates=one).to_dict()["gates"] == one.label
    assert set(policies.DMS(ratio=4.0).to_dict()) == {"name", "ratio", "gates", "bits"}


def damaged(folder: Path, change: str) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    if change == "weights":
        (folder / WEIGHTS_FILE).write_bytes(b"nothing")
    elif change == "layers":
        path.write_text(json.dumps({**config, "num_layers": 2}))
    elif change == "option":
        path.write_text(json.dumps({**config, "colour": "red"}))
    elif change == "delay":
        path.write_text(json.dumps({**config, "delay": 0}))
    elif change == "format":
        path.write_text(json.dumps({**config, "format": "other-1"}))
    else:
        path.write_text("[")


@pytest.mark.parametrize("change", ["weights", "layers", "option", "delay", "format", "json"])
def test_damaged_folders(tmp_path: Path, change: str) -> None:
    make().save_pretrained(tmp_path)
    assert Gates.from_pretrained(tmp_path).config.method == "dms"
    damaged(tmp_path, change)
    with pytest.raises(ModelError, match="kvpleat retrofit"):
        Gates.from_pretrained(tmp_path)


@pytest.mark.parametrize(("method", "delay"), [("dms", 0), ("fold", -1), ("dmc", 4), ("magic", 4)])
def test_configs_that_mean_nothing(method: str, delay: int) -> None:
    with pytest.raises(OptionError):
        GateConfig(method=method, delay=delay, num_layers=1, num_kv_heads=1, hidden_size=8)


# ---- for a model


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the one with the gates that come with kvpleat."""
    monkeypatch.setattr(gates_module, "SHIPPED", tmp_path)
    return tmp_path


def put(shelf: Path, name: str, method: str = "dms", ratio: float = 4.0, **base: Any) -> None:
    make(method, ratio=ratio, base={**BASE, **base}).save_pretrained(shelf / name)


def test_a_ratio_finds_gates_of_the_method_the_ratio_and_the_model(shelf: Path) -> None:
    put(shelf, "right-4x")
    put(shelf, "right-4x-gates")
    put(shelf, "a-right-4x-too")
    put(shelf, "right-8x", ratio=8.0)
    put(shelf, "fold-4x", method="fold")
    for key, value in {"family": "qwen2", "num_q_heads": 2, "head_dim": 24, "vocab_size": 98}.items():
        put(shelf, key[0], **{key: value})
    for policy, name in (
        (policies.DMS(ratio=4.0), "right-4x"),
        (policies.DMS(ratio=3.97), "right-4x"),
        (policies.DMS(ratio=8.05), "right-8x"),
        (policies.Fold(ratio=4.0), "fold-4x"),
    ):
        found = policy.for_model(BASE)
        assert isinstance(found.gates, Gates)
        assert found.to_dict() == {"name": policy.name, "ratio": None, "gates": name, "bits": None}
        assert policies.from_dict(found.to_dict()).for_model(BASE).to_dict() == found.to_dict()


def test_the_nearest_ratio_wins(shelf: Path) -> None:
    put(shelf, "a", ratio=4.0)
    put(shelf, "b", ratio=4.03)
    assert [find_shipped("dms", ratio, BASE) for ratio in (4.0, 4.01, 4.02, 4.06)] == ["a", "a", "b", "b"]


def test_what_a_policy_needs_beside_its_gates_stays(shelf: Path) -> None:
    put(shelf, "a")
    found = policies.DMS(ratio=4.0, bits=8).for_model(BASE)
    assert (found.bits, found.for_model(BASE)) == (8, found)
    gates = make()
    assert policies.DMS(gates=gates).for_model(BASE).gates is gates
    assert policies.Window(ratio=2.0).for_model(BASE) == policies.Window(ratio=2.0)


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (
            policies.DMS(ratio=3.9),
            {},
            "dms with ratio=3.9: .*llama, 3 layers.* some for ratio 4, 8. .*kvpleat retrofit",
        ),
        (policies.DMS(ratio=4.0), {"vocab_size": 98}, "are none at any ratio. .*kvpleat retrofit"),
        (policies.DMC(ratio=4.0), {}, "are none at any ratio"),
        (policies.Fold(gates="a"), {}, "trained for dms"),
        (policies.DMS(gates="a"), {"hidden_size": 40}, "hidden_size 48 .the model has 40."),
        (policies.DMS(gates=make(base={})), {"num_kv_heads": 6}, "num_kv_heads 2 .the model has 6."),
        (policies.DMS(gates="nowhere"), {}, "'nowhere': .*that come with kvpleat: a, b;"),
    ],
)
def test_gates_that_do_not_fit(shelf: Path, policy: policies.Policy, changes: dict[str, Any], message: str) -> None:
    put(shelf, "a")
    put(shelf, "b", ratio=8.0)
    with pytest.raises(KvpleatError, match=message):
        policy.for_model({**BASE, **changes})


@pytest.mark.parametrize("options", [{}, {"ratio": 4.0, "gates": "a"}, {"ratio": 0.25}])
def test_options_that_do_not_fit_together(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        policies.DMS(**options)
