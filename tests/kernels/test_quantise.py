"""Codes: the specification against a loop over single numbers, its error bound, and the decode kernel against it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat.kernels import cpu, reference

SIZES = (2, 6, 12, 16, 20, 64)


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed_by_loop(x: list[float]) -> list[float]:
    """Sums and differences of neighbours at distances 1, 2, 4, ... within the largest power of two (fast Hadamard)."""
    x, distance = list(x), 1
    while len(x) % (2 * distance) == 0:
        for i in range(len(x)):
            if not i & distance and (i // distance) % 2 == 0:
                a, b = x[i], x[i + distance]
                x[i], x[i + distance] = (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)
        distance *= 2
    return x


def unpacked(codes: list[int], head_dim: int) -> list[int]:
    """Codes one a channel."""
    if len(codes) == head_dim:
        return codes
    return [byte % 16 for byte in codes] + [byte // 16 for byte in codes]


@pytest.mark.parametrize("size", SIZES)
def test_spread(size: int) -> None:
    """Against sums and differences; its own inverse; products stay; a single large channel is shared out."""
    x, y = random(5, size, dtype=torch.float64), random(5, size, seed=1, dtype=torch.float64)
    mixed = reference.spread(x)
    torch.testing.assert_close(mixed, torch.tensor([mixed_by_loop(row) for row in x.tolist()], dtype=torch.float64))
    torch.testing.assert_close(reference.spread(mixed), x)
    torch.testing.assert_close((mixed * reference.spread(y)).sum(-1), (x * y).sum(-1))
    outlier = torch.zeros(size)
    outlier[-1] = 100.0
    assert reference.spread(outlier).abs().max() < 71  # 100 / sqrt(2): at least two channels share it


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES)
def test_quantize_against_a_loop(bits: int, size: int) -> None:
    """Every code is the nearest step above zero, for steps that reach from the smallest number to the largest."""
    x = random(7, size, dtype=torch.float64) * torch.tensor([1e-20, 1e-3, 1, 3, 50, 1e5, 1e30])[:, None].double()
    found = reference.quantize(x, bits)
    restored = reference.dequantize(found, size, torch.float64)
    for row, codes, (scale, zero), back in zip(
        x.tolist(), found.codes.tolist(), found.steps.tolist(), restored.tolist(), strict=True
    ):
        mixed = mixed_by_loop(row)
        assert zero <= min(mixed)
        assert zero + (2**bits - 1) * scale >= max(mixed)
        reach = max(mixed) - min(mixed)
        assert (2**bits - 1) * scale <= 1.02 * reach + 0.02 * abs(min(mixed))
        expected = [min(range(2**bits), key=lambda code: abs(zero + code * scale - number)) for number in mixed]
        assert unpacked(codes, size) == expected
        again = mixed_by_loop([zero + code * scale for code in expected])
        assert back == pytest.approx(again, rel=1e-9, abs=1e-9 * scale)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-65504, 65504, width=32), min_size=16, max_size=16),
    st.sampled_from([8, 4]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_error_is_half_a_step(numbers: list[float], bits: int, dtype: torch.dtype) -> None:
    """Round trip: off by at most half a step in each mixed channel, so by sqrt(D) / 2 steps in all; shape and dtype
    stay."""
    x = torch.tensor(numbers, dtype=dtype)
    coded = reference.quantize(x, bits)
    back = reference.dequantize(coded, 16, dtype)
    assert back.dtype == dtype
    rounding = 1e-5 * float(x.abs().max()) + 1e-37
    assert float((back - x).norm()) <= 0.5 * math.sqrt(16) * float(coded.steps[0]) + rounding


@pytest.mark.parametrize("bits", [8, 4])
def test_what_has_no_steps(bits: int) -> None:
    """Zeros and vectors of one repeated number come back; the range is float32's; nothing undefined is made finite."""
    assert torch.equal(
        reference.dequantize(reference.quantize(torch.zeros(3, 8), bits), 8, torch.float32), torch.zeros(3, 8)
    )
    constant = torch.full((8,), 7.3)
    torch.testing.assert_close(
        reference.dequantize(reference.quantize(constant, bits), 8, torch.float32), constant, rtol=0.02, atol=0
    )
    large = random(2, 8) * 1e37
    assert bool(reference.dequantize(reference.quantize(large, bits), 8, torch.float32).isfinite().all())
    for bad in (math.nan, math.inf, -math.inf):
        x = random(2, 8)
        x[0, 3] = bad
        back = reference.dequantize(reference.quantize(x, bits), 8, torch.float32)
        assert bool(back[0].isnan().all())
        assert bool(back[1].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sizes", [[1], [37], [16, 5], [3, 32, 1], [cpu.CODE_BLOCK + 3]], ids=str)
def test_attend_stream_over_codes(
    dtype: torch.dtype, bits: tuple[int, int], softcap: float | None, sizes: list[int]
) -> None:
    """The kernel on codes equals the reference on what the codes stand for, in one or several pieces, with the scratch
    full of NaN."""
    entries = sum(sizes)
    q, bias = random(3, 16, dtype=dtype), random(entries, seed=3)
    keys, values = (reference.quantize(random(entries, 16, seed=i, dtype=dtype), bits[i]) for i in range(2))
    pieces = [
        [reference.Quantised(*parts) for parts in zip(x.codes.split(sizes), x.steps.split(sizes), strict=True)]
        for x in (keys, values)
    ]
    asked = reference.spread(q)
    scratch = cpu.scratch_for(asked).fill_(math.nan)
    out = cpu.attend_stream(asked, *pieces, list(bias.split(sizes)), 0.3, softcap, scratch)
    k, v = (reference.dequantize(x, 16, dtype) for x in (keys, values))
    expected = reference.attend(q[None, :, None], k[None], v[None], bias[None], None, 0.3, softcap)
    torch.testing.assert_close(reference.spread(out), expected[0, :, 0], atol=2e-5, rtol=0)
