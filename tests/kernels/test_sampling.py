"""The race for a token: noise against the documented hash in Python's integers, and Triton (interpreted where there is
no GPU) against the specification."""

import importlib
import math

import pytest
import torch

from kvpleat.kernels import sampling

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
sampling_triton = importlib.import_module("kvpleat.kernels.sampling_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_noise_is_the_hash_that_is_documented() -> None:
    """SplitMix64 and the Gumbel transform once more."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z &= mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert mix(1234567 + golden) == 6457827717110365317, "the published first output of SplitMix64(1234567)"
    seeds, counters, size = [0, 1, -5, 2**63 - 1], [0, 1, 77, 123456], 6
    noise = sampling.gumbel(sampling.state_of(torch.tensor(seeds), torch.tensor(counters)), size)
    for row, (seed, counter) in enumerate(zip(seeds, counters, strict=True)):
        state = mix(mix(seed + golden) + counter * golden)
        for column in range(size):
            u = ((mix(state + (column + 1) * golden) >> 11) + 0.5) / 2**53
            assert float(noise[row, column]) == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 9001])
def test_triton_draws_what_the_specification_draws(size: int, dtype: torch.dtype) -> None:
    """Rows with and without noise and filter, at several temperatures; NaN and infinities in some."""
    rows = 12
    make = torch.Generator().manual_seed(size)
    logits = (torch.randn(rows, size + 3, generator=make) * 3).to(dtype)[:, 1 : size + 1]  # rows that are not packed
    logits[3], logits[4] = math.nan, -math.inf
    logits[5, : size // 2] = -math.inf
    largest = logits.amax(-1)
    temperature = torch.rand(rows, generator=make) * 2 + 0.1
    least = torch.where(torch.arange(rows) % 3 == 0, -2.0, -math.inf)
    noise = (torch.arange(rows) % 4 != 2).float()
    seeds, counters = (torch.randint(-(2**62), 2**62, (rows,), generator=make) for _ in range(2))
    arguments = [x.to(DEVICE) for x in (logits, largest, temperature, least, noise)]
    state = sampling.state_of(seeds, counters)
    found = sampling_triton.race(*arguments, state.to(DEVICE)).cpu()
    scores = (logits.double() - largest[:, None].double()).float() / temperature[:, None]
    scores = scores.masked_fill(scores < least[:, None], -math.inf) + sampling.gumbel(state, size) * noise[:, None]
    sound = [row for row in range(rows) if row not in (3, 4)]
    best = scores.amax(-1)
    for row in sound:
        assert scores[row, found[row]] >= best[row] - 1e-4, "no other token was clearly better"
        if not noise[row]:
            assert int(found[row]) == int(logits[row].float().argmax()), "of equal ones the first"
    if DEVICE.type == "cpu":
        expected = sampling.race(logits, largest, temperature, least, noise, seeds, counters)
        assert torch.equal(found[sound], expected[sound])


def test_triton_takes_the_first_of_equal_tokens() -> None:
    """Within a block of tokens, and over blocks."""
    logits = torch.zeros(3, 10_000)
    for row, places in enumerate(([9999, 5000], [4095, 4096], [17, 18])):
        logits[row, places] = 8.0
    zeros, ones = torch.zeros(3), torch.ones(3)
    least = torch.full((3,), -math.inf)
    arguments = [x.to(DEVICE) for x in (logits, logits.amax(-1), ones, least, zeros, zeros.long())]
    assert sampling_triton.race(*arguments).tolist() == [5000, 4095, 17]


def test_noise_of_triton_has_all_its_digits() -> None:
    """Also where it decides: the largest noise comes of the smallest numbers."""
    rows, size = 12, 4090
    states = sampling.state_of(torch.arange(rows), torch.zeros(rows, dtype=torch.int64))
    noise = sampling.gumbel(states, size)
    largest, where = noise.max(-1)
    ones = torch.ones(rows)
    for near in (1e-3, 3e-4):
        # A token that is as good as the noise of the winner, or a little less or more: digits decide.
        logits = torch.full((rows, size + 1), -100.0)
        logits[torch.arange(rows), where] = 0.0
        rival = sampling.gumbel(states, size + 1)[:, size]
        for sign in (-1, 1):
            logits[:, size] = largest - rival + sign * near
            top = logits.amax(-1)
            arguments = [x.to(DEVICE) for x in (logits, top, ones, torch.full((rows,), -math.inf), ones, states)]
            found = sampling_triton.race(*arguments).cpu()
            assert torch.equal(found, where if sign < 0 else torch.full_like(where, size)), near


@pytest.mark.parametrize(
    ("size", "grid", "choices"),
    [
        (1, None, [(0.0, 1, 0.5)]),
        (150, None, [(0.0, 150, 0.9), (0.02, 7, 1.0), (0.02, 20, 0.8), (0.0, 149, 1e-6), (0.5, 150, 1.0)]),
        (150, 1, [(0.0, 150, 0.4), (0.0, 5, 1.0), (0.1, 40, 0.7)]),
    ],
)
def test_triton_keeps_what_the_specification_keeps(
    size: int, grid: int | None, choices: list[tuple[float, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """min_p, top_k and top_p, alone and together, over several blocks, with ties at the border, beside a bad row."""
    monkeypatch.setattr(sampling_triton, "BLOCK", 128)
    make = torch.Generator().manual_seed(size)
    rows = len(choices) + 1
    logits = torch.randn(rows, size, generator=make) * 2
    logits = logits if grid is None else (logits * grid).round() / grid
    logits[-1] = math.nan
    min_p, top_k, top_p = (torch.tensor(each) for each in zip(*choices, (0.0, size, 1.0), strict=True))
    temperature = torch.rand(rows, generator=make) + 0.4
    arguments = logits, logits.amax(-1), temperature, min_p.log(), top_k, top_p.double()
    found = sampling_triton.least_score(*(x.to(DEVICE) for x in arguments)).cpu()
    expected = sampling.least_score(*arguments)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    for row, choice in enumerate(choices):
        stays = scores[row] >= found[row]
        assert torch.equal(stays, scores[row] >= expected[row]), choice
        assert stays.any()


def test_checks_of_the_kernel_script_run() -> None:
    """As they do on a GPU."""
    from kvpleat.bench import kernels_sampling
    from kvpleat.bench.kernel_timing import Machine

    checks = list(kernels_sampling.check(Machine(DEVICE, quick=True)))
    assert len(checks) >= 2
    assert all(check.passed for check in checks)
