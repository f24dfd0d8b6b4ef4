"""What gates say: torch, and Triton (interpreted where there is no GPU), against the definition in float64."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import gate

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
gate_triton = importlib.import_module("kvpleat.kernels.gate_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(tokens: int, channels: int, heads: int, outputs: int, dtype: torch.dtype, rows: int = 1) -> list[Any]:
    """hidden [R, T, C], weight, bias, scale, outputs."""
    make = torch.Generator().manual_seed(tokens + channels + heads)
    hidden = torch.randn(rows, tokens, channels, generator=make).to(dtype)
    weight = torch.randn(outputs * heads, channels, generator=make) / channels**0.5
    bias = torch.randn(outputs * heads, generator=make)
    return [*(x.to(DEVICE) for x in (hidden, weight, bias)), 7.0, outputs]


def by_definition(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, outputs: int) -> Tensor:
    """[outputs, R, H, T] float64: output o of head h is number o * H + h of a gate."""
    heads = len(bias) // outputs
    said = torch.einsum("rtc,nc->nrt", hidden.double(), weight.double()) * scale + bias.double()[:, None, None]
    return torch.stack([said[o * heads : (o + 1) * heads].transpose(0, 1) for o in range(outputs)])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that take 128 channels at a time, so that small gates have several rounds; and Triton in any case."""
    monkeypatch.setattr(gate_triton, "WARPS", 1)
    monkeypatch.setattr(gate, "runs_on_triton", lambda *tensors: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "tokens", "channels", "heads", "outputs"),
    [(1, 1, 300, 1, 1), (1, 5, 256, 3, 2), (3, 4, 90, 5, 1), (1, 9, 131, 8, 1), (2, 1, 64, 48, 2)],
)
def test_triton_says_what_the_definition_says(
    rows: int, tokens: int, channels: int, heads: int, outputs: int, dtype: torch.dtype, small: None
) -> None:
    """Tokens, numbers and channels that do not fill programs; rows; channels that no vectors of 4 hold."""
    problem = made(tokens, channels, heads, outputs, dtype, rows)
    wanted = by_definition(*problem)
    for said in (gate.logits(*problem), gate.by_torch(*problem)):
        assert said.dtype == torch.float32
        assert said.shape == (outputs, rows, heads, tokens)
        torch.testing.assert_close(said.double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [300, 131])
def test_a_token_says_the_same_bits_alone_and_among_others(channels: int, small: None) -> None:
    """Wherever it stands."""
    hidden, *rest = made(23, channels, 3, 2, torch.bfloat16)
    together = gate.logits(hidden, *rest)
    for start, stop in [(0, 1), (6, 7), (22, 23), (1, 18), (5, 23)]:
        assert torch.equal(gate.logits(hidden[:, start:stop], *rest), together[..., start:stop])


@pytest.mark.parametrize("channels", [300, 131])
def test_any_strides(channels: int, small: None) -> None:
    """Rows that are not packed, that begin anywhere, that lie across, or are all the same one: the same bits."""
    hidden, *rest = made(6, channels, 3, 1, torch.bfloat16)
    wanted = gate.logits(hidden, *rest)
    for before, behind in ((0, 5), (8, 8), (1, 3), (3, 2)):
        wide = torch.nn.functional.pad(hidden, (before, behind), value=float("nan"))
        view = wide[:, :, before : before + channels]
        assert torch.equal(gate.logits(view, *rest), wanted), (before, behind)
    assert torch.equal(gate.logits(hidden.mT.contiguous().mT, *rest), wanted)
    same = gate.logits(hidden[:, :1].expand(1, 6, channels), *rest)
    assert torch.equal(same, wanted[..., :1].expand_as(same))


def test_no_tokens(small: None) -> None:
    assert gate.logits(*made(0, 64, 3, 2, torch.bfloat16)).shape == (2, 1, 3, 0)


def test_a_decode_step_reads_it_as_it_lies(small: None) -> None:
    """What engine/attention.py hands to `update.step`, [outputs, T, H], needs no copy."""
    said = gate.logits(*made(5, 64, 3, 2, torch.bfloat16))
    assert said[:, 0].transpose(1, 2).is_contiguous()


def test_compiled_as_one_graph(small: None) -> None:
    """torch.compile takes it as it is, for any number of tokens."""
    compiled = torch.compile(gate.logits, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        problem = made(tokens, 90, 3, 2, torch.float32)
        assert torch.equal(compiled(*problem), gate.logits(*problem))


def test_who_learns_stays_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule, on a GPU or what says that it is one; and torch's gradients."""

    class OnGPU:
        device = torch.device("cuda")

        def __init__(self, requires_grad: bool) -> None:
            self.requires_grad = requires_grad

    still, learned = OnGPU(False), OnGPU(True)
    runs: Any = gate.runs_on_triton
    assert runs(still, still, still)
    for place in range(3):
        given = [learned if i == place else still for i in range(3)]
        assert not runs(*given)
        with torch.no_grad():
            assert runs(*given)
    assert not runs(*(torch.zeros(1) for _ in range(3)))
    monkeypatch.setattr(gate, "HAS_TRITON", False)
    assert not runs(still, still, still)
    hidden, weight, *rest = made(4, 20, 3, 1, torch.float32)
    gate.logits(hidden, weight.requires_grad_(), *rest).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 7.0 * hidden.sum((0, 1)).expand(3, 20))


def test_checks_of_the_kernel_script_run() -> None:
    """As they do on a GPU."""
    from kvpleat.bench import kernels_gate
    from kvpleat.bench.kernel_timing import Machine

    checks = list(kernels_gate.check(Machine(DEVICE, quick=True)))
    assert len(checks) >= 12
    assert all(check.passed for check in checks)
