"""The fast paths, SDPA in blocks and the CPU's decode, compute what the reference computes."""

import math

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import cpu, reference, sdpa

# The reference computes in float32; bfloat16 rounds the weights to 8 bits.
ROUNDING = {torch.float32: 1e-5, torch.float64: 5e-6, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=ROUNDING[found.dtype], rtol=0)


# ---- prefill


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(1, 1, 1), (2, 3, 37), (3, 1, 5)])
def test_attend_causal(dtype: torch.dtype, heads: int, groups: int, tokens: int) -> None:
    """Causal attention without a past, grouped queries."""
    q = random(2, heads * groups, tokens, 8, dtype=dtype)
    k, v = (random(2, heads, tokens, 8, seed=s, dtype=dtype) for s in (1, 2))
    found = sdpa.attend_causal(q, k, v, 0.4)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for row in range(2):
        expected = reference.attend(q[row].view(heads, groups, tokens, 8), k[row], v[row], None, visible, 0.4)
        check(found[row], expected.reshape(-1, tokens, 8))


def chunk(
    heads: int,
    groups: int,
    past: int,
    tokens: int,
    dtype: torch.dtype,
    softcap: float | None,
    bias: Tensor | None,
    visible_past: Tensor | None,
    visible_new: Tensor | None,
) -> None:
    """attend_chunk against the reference with one mask over past and chunk."""
    q = random(heads * groups, tokens, 16, dtype=dtype)
    k, v = (random(heads, past + tokens, 16, seed=s, dtype=dtype) for s in (1, 2))
    found = sdpa.attend_chunk(
        q, (k[:, :past], v[:, :past]), (k[:, past:], v[:, past:]), bias, visible_past, visible_new, 0.3, softcap
    )
    old = torch.ones(heads, tokens, past, dtype=torch.bool)
    if visible_past is not None:
        old = visible_past.expand(heads, tokens, past)
    new = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if visible_new is not None:
        new = new & visible_new
    visible = torch.cat([old, new.expand(heads, tokens, tokens)], dim=-1)
    whole_bias = None if bias is None else torch.cat([bias, torch.zeros(heads, tokens)], dim=1)
    expected = reference.attend(q.view(heads, groups, tokens, 16), k, v, whole_bias, visible, 0.3, softcap)
    check(found, expected.reshape(-1, tokens, 16))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    ("heads", "groups", "past", "tokens"),
    [(1, 1, 0, 1), (2, 3, 33, 1), (2, 1, 0, 300), (2, 2, 45, 257), (1, 3, 7, 256)],
)
def test_attend_chunk(
    dtype: torch.dtype, softcap: float | None, heads: int, groups: int, past: int, tokens: int
) -> None:
    """Chunks shorter and longer than a block of queries, with and without a past."""
    chunk(heads, groups, past, tokens, dtype, softcap, None, None, None)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("masks", ["none", "shared", "per head"])
def test_attend_chunk_with_weights_holes_and_masks(dtype: torch.dtype, softcap: float | None, masks: str) -> None:
    """Log-weights, ragged streams of which one is empty, and windows over past and chunk."""
    heads, past, tokens = 3, 41, 270
    bias = random(heads, past, seed=5)
    bias[torch.arange(past) >= torch.tensor([41, 13, 0])[:, None]] = -math.inf
    visible_past = visible_new = None
    if masks != "none":
        visible_past = random(1 if masks == "shared" else heads, tokens, past, seed=6) > 0
        visible_new = (random(tokens, tokens, seed=7) > 0) | torch.eye(tokens, dtype=torch.bool)
    chunk(heads, 2, past, tokens, dtype, softcap, bias, visible_past, visible_new)


def test_attend_chunk_never_reads_ahead() -> None:
    """Later entries of the chunk are not seen: changing them changes nothing before them."""
    q, k, v = random(4, 300, 8), random(2, 310, 8, seed=1), random(2, 310, 8, seed=2)

    def run(k: Tensor, v: Tensor) -> Tensor:
        return sdpa.attend_chunk(q, (k[:, :10], v[:, :10]), (k[:, 10:], v[:, 10:]), None, None, None, 0.3, None)

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, 290:], v[:, 290:] = 100.0, -100.0
    after = run(k, v)
    assert torch.equal(after[:, :280], before[:, :280])
    assert not torch.equal(after[:, 280:], before[:, 280:])


# ---- decode


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", [[1], [37], [16, 5], [3, 32, 1], [0, 7]], ids=str)
def test_attend_stream(dtype: torch.dtype, softcap: float | None, with_bias: bool, sizes: list[int]) -> None:
    """One query per head of a group over a stream in one or several pieces."""
    entries = sum(sizes)
    q, k, v = (
        random(3, 16, dtype=dtype),
        random(entries, 16, seed=1, dtype=dtype),
        random(entries, 16, seed=2, dtype=dtype),
    )
    bias = random(entries, seed=3) if with_bias else None
    found = cpu.attend_stream(
        q, list(k.split(sizes)), list(v.split(sizes)), None if bias is None else list(bias.split(sizes)), 0.3, softcap
    )
    expected = reference.attend(
        q[None, :, None], k[None], v[None], None if bias is None else bias[None], None, 0.3, softcap
    )
    check(found, expected[0, :, 0])


def test_attend_stream_order_of_pieces_does_not_matter() -> None:
    """Attention has no order: pieces may come in any."""
    q, k, v, bias = random(3, 8), random(50, 8, seed=1), random(50, 8, seed=2), random(50, seed=3)
    forth = cpu.attend_stream(q, [k[:20], k[20:]], [v[:20], v[20:]], [bias[:20], bias[20:]], 0.5, None)
    back = cpu.attend_stream(q, [k[20:], k[:20]], [v[20:], v[:20]], [bias[20:], bias[:20]], 0.5, None)
    torch.testing.assert_close(forth, back, atol=1e-6, rtol=0)


def test_attend_stream_leaves_the_cache_alone() -> None:
    """Keys, values and log-weights are read in place and must not change."""
    q, k, v, bias = random(3, 8), random(50, 8, seed=1), random(50, 8, seed=2), random(50, seed=3)
    copies = k.clone(), v.clone(), bias.clone(), q.clone()
    cpu.attend_stream(q, [k], [v], [bias], 0.5, 2.0)
    assert all(torch.equal(now, then) for now, then in zip((k, v, bias, q), copies, strict=True))
