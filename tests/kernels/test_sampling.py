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
    scores = (logits.double() - largest[:, None].double()).float() * temperature.reciprocal()[:, None]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 129, 1000])
def test_triton_finds_the_largest_logits(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of equals, over parts; rows with NaN, and with nothing finite, say so."""
    monkeypatch.setattr(sampling_triton, "BLOCK", 128)
    logits = torch.randn(6, size + 3, generator=torch.Generator().manual_seed(size)).to(dtype)[:, 2 : size + 2]
    logits[1, [size // 3, size - 1]] = 9.0
    logits[2, size // 2], logits[3] = math.nan, -math.inf
    logits[4, : size - 1] = -math.inf
    values, tokens = sampling_triton.highest(logits.to(DEVICE))
    wanted = sampling.highest(logits)
    assert values.dtype == dtype
    assert tokens.dtype == torch.int64
    sound = [0, 1, 4, 5]
    for found, expected in zip((values, tokens), wanted, strict=True):
        assert torch.equal(found.cpu()[sound], expected[sound])
    assert not values.cpu()[[2, 3]].isfinite().any()


CHOICES = [  # min_p, top_k (0: all), top_p
    (0.0, 0, 0.9), (0.02, 7, 1.0), (0.02, 20, 0.8), (0.0, -1, 1e-6), (0.5, 0, 1.0), (0.0, 1, 1.0), (0.0, 1, 0.3),
    (0.0, 0, 0.999999), (0.3, 0, 0.99), (1.0, 0, 0.5), (0.0, 40, 0.95), (1e-30, 3, 0.999), (0.0, -1, 0.4),
    (0.0, 0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "kind", "room", "choices"),
    [(1, "", 64, CHOICES[:3]), (127, "bf16", 64, CHOICES), (385, "", 512, CHOICES), (300, "few", 64, CHOICES[::2]),
     (257, "all", 300, CHOICES[::3]), (260, "wide", 64, CHOICES[::2]), (150, "ties", 9, CHOICES),
     (130, "", 9, CHOICES[1::2]), (1300, "flat", 300, CHOICES[::3]), (700, "peaked", 300, CHOICES[1::3]),
     (900, "crowd", 64, CHOICES[::2])],
)  # fmt: skip
def test_triton_keeps_what_the_specification_keeps(
    size: int, kind: str, room: int, choices: list[tuple[float, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """min_p, top_k and top_p, alone and together, over several parts, with equals at the border, beside rows that are
    not sound; and the same when `find` has no room for what is left."""
    for name, value in (("BLOCK", 128), ("FOUND", 128), ("ROOM", room), ("RUNGS", 32)):
        monkeypatch.setattr(sampling_triton, name, value)
    make = torch.Generator().manual_seed(size)
    rows = len(choices) + 2
    logits = torch.randn(rows, size, generator=make) * 2
    if kind == "ties":
        logits = logits.round()
    elif kind == "bf16":
        logits = logits.bfloat16()
    elif kind == "few":  # the others were forbidden
        logits[:, 5:] = -math.inf
    elif kind == "all":
        logits[:] = 3.25
    elif kind == "flat":
        logits = (logits / 100 - 9).bfloat16()
    elif kind == "peaked":
        logits[:, size // 3] = 30.0
    elif kind == "crowd":  # a value that more tokens have than there is room for
        logits[:, ::2] = 0.5
    elif kind == "wide":  # from next to nothing to more than exp can tell
        logits = logits.sign() * 10 ** (logits * 3)
    logits[-2], logits[-1, size // 2] = -math.inf, math.nan
    min_p, top_k, top_p = (torch.tensor(each) for each in zip(*choices, (0.1, 3, 0.9), (0.1, 3, 0.9), strict=True))
    top_k = torch.where(top_k > 0, top_k, size + top_k).clamp(1, size)
    temperature = torch.rand(rows, generator=make) + 0.4
    arguments = logits, logits.amax(-1), temperature, min_p.log(), top_k, top_p.double()
    found = sampling_triton.least_score(*(x.to(DEVICE) for x in arguments)).cpu()
    expected = sampling.least_score(*arguments)
    scores = (logits.float() - logits.float().amax(-1, keepdim=True)) * temperature.reciprocal()[:, None]
    for row, choice in enumerate(choices):
        stays = scores[row] >= found[row]
        assert torch.equal(stays, scores[row] >= expected[row]), choice
        assert stays.any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled kernels keep their constants")
def test_wrong_brackets_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the sums of `look` been wrong by far, `find` would still say what stays."""
    kernels = importlib.import_module("kvpleat.kernels.sampling_kernels_triton")
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3)) * 2
    top_p = torch.tensor([0.3, 0.6, 0.9, 0.99], dtype=torch.float64)
    given = logits, logits.amax(-1), torch.ones(4), torch.full((4,), -math.inf), torch.full((4,), 300), top_p
    monkeypatch.setattr(sampling_triton, "RUNGS", 32)
    for wrong in (-0.5, -3.0):
        monkeypatch.setattr(kernels, "MARGIN", type(kernels.MARGIN)(wrong))
        assert torch.equal(sampling_triton.least_score(*given), sampling.least_score(*given)), wrong


def test_what_stays_is_what_plain_sums_say() -> None:
    """The specification itself, token by token in Python."""
    make = torch.Generator().manual_seed(5)
    logits = (torch.randn(20, 40, generator=make) * 2).round() / 2
    for row, (top_k, top_p, min_p) in enumerate(((40, 0.7, 0.0), (5, 1.0, 0.0), (9, 0.8, 0.0), (40, 0.9, 0.1)) * 5):
        given = logits[row : row + 1]
        least = sampling.least_score(
            given, given.amax(-1), torch.ones(1), torch.tensor([min_p]).log(), torch.tensor([top_k]),
            torch.tensor([top_p], dtype=torch.float64),
        )  # fmt: skip
        weights = (given[0].double() - given.max()).exp()
        stays = weights >= min_p
        stays &= torch.tensor([int((given[0] > x).sum()) < top_k for x in given[0]])
        share = top_p * weights[stays].sum() * (1 - 1e-12)
        stays &= torch.tensor([bool(weights[stays & (given[0] > x)].sum() < share) for x in given[0]])
        assert torch.equal(given[0] - given.max() >= least, stays), (top_k, top_p, min_p)


def test_checks_of_the_kernel_script_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on a GPU."""
    from kvpleat.bench import kernels_sampling
    from kvpleat.bench.kernel_timing import Machine

    monkeypatch.setattr(sampling_triton, "RUNGS", 32)  # the interpreter sorts slowly
    checks = list(kernels_sampling.check(Machine(DEVICE, quick=True)))
    assert len(checks) >= 2
    assert all(check.passed for check in checks)
