"""Attention among tokens that stand for many, in Triton (interpreted where there is no GPU) against SDPA in float64."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvpleat.kernels import sized

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
kernels = importlib.import_module("kvpleat.kernels.sized_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 queries, steps of 16 keys."""
    for name, value in (("NEAR", (16, 16, 1, 1)), ("FEW", (16, 16, 1, 1)), ("MANY", (32, 16, 1, 1)), ("SHORT", 20)):
        monkeypatch.setattr(kernels, name, value)


def made(queries: int, keys: int, channels: int, counts: list[int], seed: int) -> tuple[Tensor, ...]:
    """query, key, value as projections of states lie, sizes [B, S], and places of queries and keys in the text."""
    make, heads = torch.Generator().manual_seed(seed), 2
    rows, most = len(counts), 4 * max(queries, keys)

    def states(tokens: int) -> Tensor:
        return torch.randn(rows, tokens, heads, channels, generator=make).transpose(1, 2)

    def places(tokens: int) -> Tensor:
        return torch.stack([torch.randperm(most, generator=make)[:tokens].sort().values for _ in range(rows)])

    sizes = torch.randint(1, 9, (rows, keys), generator=make).float()
    sizes[torch.arange(keys) >= torch.tensor(counts)[:, None]] = 0.0
    return states(queries), states(keys), states(keys), sizes, places(queries), places(keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "channels", "counts", "window"),
    [
        (37, 37, 16, [37, 9, 1], None),
        (15, 50, 12, [50, 33], None),
        (43, 43, 16, [43, 16], 9),
        (18, 70, 32, [70, 64, 5], 40),
    ],
)
def test_like_sdpa(
    queries: int, keys: int, channels: int, counts: list[int], window: int | None, dtype: torch.dtype, small: None
) -> None:
    q, k, v, sizes, stands, stood = (x.to(DEVICE) for x in made(queries, keys, channels, counts, seed=keys))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    bias = sizes.clamp(min=1.0).log().masked_fill(sizes == 0, torch.finfo(torch.float32).min)
    visible = (sizes > 0)[:, None].expand(-1, queries, -1)
    near = None
    if window is not None:
        near = window, stands, stood
        visible = visible & ((stands[:, :, None] - stood[:, None]).abs() < window)
    pairs = sizes.double().log()[:, None].masked_fill(~visible, -torch.inf)
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=pairs[:, None], scale=0.3)
    number = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    got = sized.attend(q, k, v, bias, number, near, 0.3, queries + 3)
    assert got.shape == (len(counts), queries + 3, 2, channels)
    seen = visible.any(2)
    close = 1e-5 if dtype == torch.float32 else 4e-3
    got, want = got[:, :queries].double(), want.transpose(1, 2)
    torch.testing.assert_close(got[seen], want[seen], rtol=close, atol=close)
    assert (got[~seen] == 0).all()


def test_flops_are_counted(small: None) -> None:
    """Those of a product with all keys; with a window those that two tokens in every place would see."""
    q, k, v, sizes, stands, stood = (x.to(DEVICE) for x in made(9, 40, 16, [40], seed=0))
    number = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    for near, keys in ((None, 40), ((7, stands, stood), 13)):
        with FlopCounterMode(display=False) as counter:
            sized.attend(q, k, v, sizes.log(), number, near, 1.0, 9)
        assert counter.get_total_flops() == 4 * 2 * 9 * keys * 16


def test_where_it_runs() -> None:
    """On a GPU, but not where something is learned or dropped, in float64, or for heads of more channels."""

    def runs(dropout: float = 0.0, **changed: object) -> bool:
        here = {"device": torch.device("cuda"), "dtype": torch.float32, "shape": (1, 2, 9, 64), "requires_grad": False}
        one = SimpleNamespace(**{**here, **changed})
        return sized.runs_on_triton(one, one, dropout)  # type: ignore[arg-type]

    assert runs()
    assert not runs(dropout=0.1)
    assert not runs(requires_grad=True)
    with torch.no_grad():
        assert runs(requires_grad=True)
    for name, other in (("device", torch.device("cpu")), ("dtype", torch.float64), ("shape", (1, 2, 9, 256))):
        assert not runs(**{name: other})
