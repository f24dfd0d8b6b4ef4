"""The sampler against a definition for one row in plain Python, and its draws against exact probabilities."""

import dataclasses
import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpleat.engine.params import RequestOutputKind, SamplingParams
from kvpleat.engine.sampling import (
    MAX_END_IDS,
    MAX_VOCAB,
    NO_TOKEN,
    Mode,
    Sampler,
    check,
    end_tokens,
    request_seed,
)
from kvpleat.errors import OptionError
from kvpleat.kernels.sampling import least_score

GREEDY = SamplingParams(temperature=0.0)
ALL_MODES = [
    Mode(draws, filters, holds, logprobs)
    for draws, filters in ((False, False), (True, False), (True, True))
    for holds in (False, True)
    for logprobs in (None, 0, 3)
]


def kept(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The tokens that stay for one row, and their probabilities: the definition, in Python's floats."""
    top = max(logits)
    scores = {i: (x - top) / params.temperature for i, x in enumerate(logits)}
    if params.min_p > 0:
        scores = {i: s for i, s in scores.items() if math.exp(s) >= params.min_p}
    if params.top_k > 0:
        scores = {i: s for i, s in scores.items() if sum(t > s for t in scores.values()) < params.top_k}
    total = math.fsum(math.exp(s) for s in scores.values())

    def above(score: float) -> float:
        return math.fsum(math.exp(t) for t in scores.values() if t > score) / total

    if params.top_p < 1:
        scores = {i: s for i, s in scores.items() if above(s) < params.top_p}
    weights = {i: math.exp(s) for i, s in scores.items()}
    return {i: w / math.fsum(weights.values()) for i, w in weights.items()}


def filters_of(params: list[SamplingParams], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log min_p, top_k and top_p as the kernels take them."""
    return (
        torch.tensor([math.log(p.min_p) if p.min_p else -math.inf for p in params]),
        torch.tensor([min(p.top_k, size) if p.top_k > 0 else size for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
    )


def draw(logits: torch.Tensor, params: list[SamplingParams], counters: list[int], seeds: list[int]) -> torch.Tensor:
    """A token for each row, each in a seat of its own."""
    rows = logits.shape[0]
    sampler = Sampler(rows, logits.shape[1], "cpu")
    for row in range(rows):
        sampler.seat(row, params[row], seeds[row])
    return sampler.sample(logits, torch.arange(rows), torch.tensor(counters)).tokens


def many(logits: list[float], params: SamplingParams, draws: int, seed: int = 0) -> torch.Tensor:
    """Draws from one row, with one seed and the counters 0, 1, ...: what one request would draw."""
    sampler = Sampler(1, len(logits), "cpu")
    sampler.seat(0, params, seed)
    rows = torch.tensor(logits).expand(draws, -1)
    return sampler.sample(rows, torch.zeros(draws, dtype=torch.int64), torch.arange(draws)).tokens


def assert_distributed(counts: torch.Tensor, probabilities: list[float]) -> None:
    """A chi-square test, five standard deviations wide: the seeds are fixed, so it fails always or never."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    assert bool((counts[expected == 0] == 0).all())
    small = expected < 10  # as one cell, because chi-square wants some in each
    cells = torch.cat([expected[~small], expected[small].sum()[None]])
    found = torch.cat([counts[~small], counts[small].sum()[None]])
    cells, found = cells[cells > 0], found[cells > 0]
    statistic, freedom = float(((found - cells) ** 2 / cells).sum()), len(cells) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=4),
    SamplingParams(top_k=-1),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.97, temperature=1.7),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(min_p=0.05, top_k=5, top_p=0.8),
    SamplingParams(top_k=3, top_p=0.6, temperature=0.7),
    SamplingParams(min_p=0.3, top_p=0.9, temperature=1.3),
]


# ---- who stays in the race


@pytest.mark.parametrize("grid", [None, 4, 1], ids=["distinct", "some tie", "most tie"])
@pytest.mark.parametrize("size", [1, 2, 7, 301])
def test_the_tokens_that_stay_are_those_of_the_definition(size: int, grid: int | None) -> None:
    """All filters, alone and together, in one batch, on rows with and without ties."""
    logits = torch.randn(len(PARAMS), size, generator=torch.Generator().manual_seed(size)) * 2
    logits = logits if grid is None else (logits * grid).round() / grid
    largest, temperature = logits.amax(-1), torch.tensor([p.temperature for p in PARAMS])
    least = least_score(logits, largest, temperature, *filters_of(PARAMS, size))
    scores = (logits - largest[:, None]) * temperature.reciprocal()[:, None]
    for row, params in enumerate(PARAMS):
        stays = (scores[row] >= least[row]).nonzero()[:, 0].tolist()
        assert stays == sorted(kept(logits[row].tolist(), params)), params


def test_top_p_looks_at_what_min_p_and_top_k_left() -> None:
    """0.4 + 0.3 of all is 0.7, but 0.4 alone is more than half of what two tokens hold."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    for params, stays in [
        (SamplingParams(top_p=0.55), {0, 1}),
        (SamplingParams(top_p=0.55, top_k=2), {0}),
        (SamplingParams(top_p=0.55, min_p=0.7), {0}),
        (SamplingParams(top_p=0.55, min_p=0.4), {0, 1}),
    ]:
        assert set(many(logits.tolist(), params, 400).tolist()) == stays, params


def test_the_nucleus_ends_where_the_share_is_reached() -> None:
    """Halves of halves, and a share just below and above what the first ones hold; equal tokens stay together."""
    half = math.log(2.0)
    row = [0.0, -half, -2 * half, -2 * half]  # 1/2, 1/4, 1/8, 1/8
    for top_p, stays in ((0.4999, {0}), (0.5001, {0, 1}), (0.7499, {0, 1}), (0.7501, {0, 1, 2, 3})):
        assert set(many(row, SamplingParams(top_p=top_p), 400).tolist()) == stays
    assert set(many([0.0, -1e9, 0.0, -1e9], SamplingParams(top_p=0.3), 200).tolist()) == {0, 2}


# ---- what is drawn


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"T{p.temperature} k{p.top_k} p{p.top_p} m{p.min_p}")
def test_draws_have_the_exact_probabilities(params: SamplingParams) -> None:
    """Of one request, token after token."""
    logits = [2.0, 0.5, 0.5, 1.9, -1.0, 0.0, 1.0, 0.2, -0.3]
    exact = kept(logits, params)
    tokens = many(logits, params, 20_000, seed=3)
    counts = torch.bincount(tokens, minlength=len(logits))
    assert_distributed(counts, [exact.get(i, 0.0) for i in range(len(logits))])


def test_requests_with_neighbouring_seeds_draw_independently() -> None:
    """First tokens over seeds, and pairs of tokens of neighbouring seeds and of neighbouring counters."""
    rows, logits = 20_000, torch.tensor([0.0, 0.7, 1.1])
    exact = logits.softmax(-1)
    sampler = Sampler(rows, 3, "cpu")
    sampler._seed.copy_(torch.arange(rows))
    sampler._noise.fill_(1.0)
    seats, zeros = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    first = sampler.sample(logits.expand(rows, -1), seats, zeros, Mode(draws=True)).tokens
    second = sampler.sample(logits.expand(rows, -1), seats, zeros + 1, Mode(draws=True)).tokens
    assert_distributed(torch.bincount(first, minlength=3), exact.tolist())
    joint = (exact[:, None] * exact).flatten().tolist()
    assert_distributed(torch.bincount(first * 3 + second, minlength=9), joint)
    assert_distributed(torch.bincount(first[:-1] * 3 + first[1:], minlength=9), joint)
    assert_distributed(torch.bincount(first[:-1] * 3 + second[1:], minlength=9), joint)


def test_a_large_flat_vocabulary_is_drawn_from_evenly() -> None:
    """Low and high ids, odd and even ones alike."""
    size = 30_011
    sampler = Sampler(1, size, "cpu")
    sampler.seat(0, SamplingParams(), 11)
    tokens = []
    for start in range(0, 1200, 100):
        counters = torch.arange(start, start + 100)
        tokens.append(sampler.sample(torch.zeros(100, size), torch.zeros_like(counters), counters).tokens)
    drawn = torch.cat(tokens)
    assert_distributed(torch.bincount(drawn * 20 // size, minlength=20), [1 / 20] * 20)
    assert_distributed(torch.bincount(drawn % 7, minlength=7), [len(range(i, size, 7)) / size for i in range(7)])


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """One in 20,000: noise of too few digits would never, or too often, let it win."""
    rare = math.log(1 / 20_000)
    tokens = many([0.0, rare], SamplingParams(), 400_000, seed=5)
    assert 5 <= int(tokens.sum()) <= 40  # 20 expected


# ---- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
def test_greedy_takes_the_lowest_of_the_likeliest_ids(mode: Mode, dtype: torch.dtype) -> None:
    """In every mode that a batch may ask for, whatever the seed."""
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(1)).to(dtype)
    for row, places in enumerate(([3, 7], [0, 60], [59, 60], [5], [1, 2, 3])):
        logits[row, places] = 9.0
    sampler = Sampler(5, 61, "cpu")
    for row in range(5):
        sampler.seat(row, GREEDY, row)
    tokens = sampler.sample(logits, torch.arange(5), torch.zeros(5, dtype=torch.int64), mode).tokens
    assert tokens.tolist() == [3, 0, 59, 5, 1]


@pytest.mark.parametrize("mode", [Mode(), Mode(draws=True), Mode(draws=True, filters=True, logprobs=1)], ids=str)
def test_float64_logits_keep_their_digits(mode: Mode) -> None:
    """A difference that float32 does not see decides."""
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    sampler = Sampler(1, 3, "cpu")
    sampler.seat(0, GREEDY, 0)
    zero = torch.zeros(1, dtype=torch.int64)
    assert sampler.sample(logits, zero, zero, mode).tokens.tolist() == [1]


def test_the_smallest_temperatures_are_fine() -> None:
    """Just above and below the border of greedy, with logits far apart."""
    for temperature in (1e-5, 9e-6, 1e-30):
        params = SamplingParams(temperature=temperature)
        assert set(many([3e4, -3e4, 2.9e4], params, 50).tolist()) == {0}


# ---- one row, one function


def test_neither_batch_nor_seat_nor_mode_changes_a_draw() -> None:
    """A request alone, among others, in other seats and orders, in a mode that others need: the same tokens."""
    generator = random.Random(4)
    size, count = 211, 9
    logits = torch.randn(count, size, generator=torch.Generator().manual_seed(2)) * 2
    logits = (logits * 8).round() / 8  # with ties
    params = [generator.choice([*PARAMS, GREEDY]) for _ in range(count)]
    counters = [generator.randrange(1000) for _ in range(count)]
    alone = [int(draw(logits[i : i + 1], [params[i]], [counters[i]], [i])) for i in range(count)]
    assert draw(logits, params, counters, list(range(count))).tolist() == alone
    for _ in range(5):
        seats = generator.sample(range(20), count)
        order = generator.sample(range(count), count - 3)
        sampler = Sampler(20, size, "cpu")
        for i, seat in enumerate(seats):
            sampler.seat(seat, params[i], i)
        places = torch.tensor([seats[i] for i in order])
        most = Mode(draws=True, filters=True, holds=True, logprobs=size)
        for mode in (None, most):
            got = sampler.sample(logits[order], places, torch.tensor([counters[i] for i in order]), mode)
            assert got.tokens.tolist() == [alone[i] for i in order]


def test_a_seat_takes_over_without_a_trace() -> None:
    """Every field of a seat is set anew, at the same address."""
    sampler = Sampler(2, 50, "cpu")
    tensors = {name: x.data_ptr() for name, x in vars(sampler).items() if isinstance(x, torch.Tensor)}
    busy = SamplingParams(temperature=0.5, top_k=2, top_p=0.3, min_p=0.4, min_tokens=5, logprobs=4, stop_token_ids=[3])
    sampler.seat(0, busy, 9, (7, 8))
    sampler.seat(1, GREEDY, 1)
    assert sampler.mode == Mode(True, True, True, 4)
    sampler.seat(0, SamplingParams(), 2)
    assert sampler.mode == Mode(draws=True)
    fresh = Sampler(2, 50, "cpu")
    fresh.seat(0, SamplingParams(), 2)
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    seats, counters = torch.zeros(40, dtype=torch.int64), torch.arange(40)
    most = Mode(True, True, True, 4)
    assert torch.equal(
        sampler.sample(logits, seats, counters, most).tokens, fresh.sample(logits, seats, counters).tokens
    )
    sampler.unseat(0)
    assert sampler.mode == Mode()
    assert tensors == {name: x.data_ptr() for name, x in vars(sampler).items() if isinstance(x, torch.Tensor)}


def test_logits_are_not_changed() -> None:
    """A caller may still need them."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sampler = Sampler(3, 40, "cpu")
    for row in range(3):
        sampler.seat(row, SamplingParams(top_k=5, min_tokens=3, logprobs=2), row, (1,))
    for mode in ALL_MODES:
        sampler.sample(logits, torch.arange(3), torch.zeros(3, dtype=torch.int64), mode)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
def test_nothing_is_read_by_the_host(mode: Mode) -> None:
    """Fake tensors have no values: any read of one, and any shape that depends on one, raises."""
    with FakeTensorMode():
        sampler = Sampler(4, 64, "cpu")
        sampler.seat(2, SamplingParams(top_p=0.5, min_tokens=1), 7, (1, 2))
        sampled = sampler.sample(
            torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), mode
        )
    assert sampled.tokens.shape == (3,)


# ---- rows that hold no distribution


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf", "one NaN", "NaN held back"])
def test_a_bad_row_gets_no_token_and_harms_no_other(mode: Mode, bad: float | str) -> None:
    """NaN, infinity or nothing to choose from: NO_TOKEN there, and the same as ever elsewhere."""
    logits = torch.randn(6, 83, generator=torch.Generator().manual_seed(6))
    sampler = Sampler(6, 83, "cpu")
    params = [GREEDY, GREEDY, SamplingParams(top_p=0.8), SamplingParams(top_p=0.8), PARAMS[1], PARAMS[-1]]
    for row in range(6):
        minimum = 2 if bad == "NaN held back" else 0
        sampler.seat(row, dataclasses.replace(params[row], min_tokens=minimum, max_tokens=5), row, (4,))
    seats, counters = torch.arange(6), torch.ones(6, dtype=torch.int64)
    most = mode.joined(Mode(draws=True, filters=True))
    clean = sampler.sample(logits, seats, counters, most)
    for row in (1, 3, 5):
        if isinstance(bad, float):
            logits[row] = bad
        elif bad == "all -inf":
            logits[row] = -math.inf
        else:
            logits[row, 4] = math.nan
    got = sampler.sample(logits, seats, counters, most)
    assert got.tokens[[1, 3, 5]].tolist() == [NO_TOKEN] * 3
    assert torch.equal(got.tokens[::2], clean.tokens[::2])
    if mode.logprobs is not None:
        assert got.ids is not None
        assert got.logprobs is not None
        assert clean.ids is not None
        assert clean.logprobs is not None
        assert torch.equal(got.ids[::2], clean.ids[::2])
        assert torch.equal(got.logprobs[::2], clean.logprobs[::2])


def test_tokens_that_the_logits_forbid_are_never_drawn() -> None:
    """-inf is a logit like others: never taken, also where few tokens are left."""
    logits = [-math.inf] * 20
    logits[3], logits[17] = 0.0, -2.0
    for params in (SamplingParams(), SamplingParams(top_k=10), SamplingParams(top_p=0.999), SamplingParams(min_p=0.01)):
        assert set(many(logits, params, 300).tolist()) == {3, 17}


# ---- min_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_wait_for_min_tokens(temperature: float) -> None:
    """The model's end tokens and stop_token_ids, also id 0, until min_tokens tokens are there; no other row's."""
    logits = torch.zeros(8, 12)
    logits[:, [0, 5, 11]] = 50.0
    logits[:, 7] = 20.0
    sampler = Sampler(2, 12, "cpu")
    sampler.seat(0, SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=[11]), 1, (5, 0))
    sampler.seat(1, SamplingParams(temperature=temperature, stop_token_ids=[11]), 1, (5, 0))
    seats, counters = torch.tensor([0] * 4 + [1] * 4), torch.arange(4).repeat(2)
    tokens = sampler.sample(logits, seats, counters).tokens.tolist()
    assert tokens[:3] == [7, 7, 7]
    assert set(tokens[3:]) <= {0, 5, 11}


def test_ignored_end_tokens_are_not_held_back() -> None:
    """ignore_eos makes the model's end tokens tokens like others; stop_token_ids still end."""
    params = SamplingParams(ignore_eos=True, min_tokens=2, stop_token_ids=[4, 4])
    assert end_tokens(params, (1, 2)) == (4,)
    assert end_tokens(SamplingParams(stop_token_ids=[4, 2]), (1, 2)) == (4, 2, 1)
    sampler = Sampler(1, 6, "cpu")
    sampler.seat(0, SamplingParams(temperature=0, ignore_eos=True, min_tokens=2), 0, (1,))
    assert not sampler.mode.holds
    zero = torch.zeros(1, dtype=torch.int64)
    assert sampler.sample(torch.tensor([[0.0, 9, 0, 0, 0, 0]]), zero, zero).tokens.tolist() == [1]


# ---- log probabilities


@pytest.mark.parametrize("count", [0, 1, 4, -1])
def test_log_probabilities_are_those_of_the_raw_logits(count: int) -> None:
    """Before temperature, filters and min_tokens; the token first, then the likeliest; ranks count the likelier."""
    size = 37
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(8)) * 3
    sampler = Sampler(5, size, "cpu")
    params = SamplingParams(temperature=3.0, min_p=0.01, min_tokens=4, logprobs=count)
    for row in range(4):
        sampler.seat(row, params, row, (int(logits[row].argmax()),))
    sampler.seat(4, GREEDY, 4)
    got = sampler.sample(logits, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    number = size if count == -1 else count
    exact = logits.double().log_softmax(-1)
    assert got.ids is not None
    assert got.logprobs is not None
    assert got.ranks is not None
    assert got.ids.shape == got.logprobs.shape == (5, number + 1)
    assert torch.equal(got.ids[:, 0], got.tokens)
    assert torch.equal(got.ids[:, 1:], exact.sort(descending=True).indices[:, :number])
    torch.testing.assert_close(got.logprobs.double(), exact.gather(1, got.ids), atol=1e-5, rtol=1e-5)
    for row in range(5):
        likelier = int((exact[row] > exact[row, got.tokens[row]]).sum())
        assert int(got.ranks[row]) == 1 + likelier
    assert int(got.ranks[4]) == 1


# ---- seeds


def test_seeds_of_requests() -> None:
    """A request's own seed is itself; without one it follows from the engine's seed and the number, all different."""
    for seed in (0, 5, -3, 2**63 - 1, -(2**63)):
        assert request_seed(99, SamplingParams(seed=seed), 7) == seed
    assert request_seed(0, SamplingParams(seed=2**64 + 5), 0) == 5
    made = {request_seed(engine, SamplingParams(), number) for engine in range(30) for number in range(100)}
    assert len(made) == 3000
    assert request_seed(3, SamplingParams(), 4) == request_seed(3, SamplingParams(), 4)
    assert min(abs(seed) for seed in made) > 1000, "not what people pass as seeds"
    sampler = Sampler(1, 9, "cpu")
    sampler.seat(0, SamplingParams(), 2**200 - 1)
    assert int(sampler._seed[0]) == -1


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 1.5}, "n=1.5"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_p": True}, "min_p=True"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 17}, "min_tokens=17 is more than max_tokens=16"),
        ({"logprobs": -2}, "logprobs=-2"),
        ({"stop": ""}, "found nowhere or everywhere"),
        ({"stop": ["a", ""]}, "found nowhere or everywhere"),
        ({"stop": [3]}, "found nowhere or everywhere"),
        ({"stop": "a", "detokenize": False}, "detokenize=False"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids='a'"),
    ],
    ids=lambda x: str(x),
)
def test_parameters_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    """With the value, and what to pass."""
    with pytest.raises(OptionError) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    with pytest.raises(TypeError, match="presence_penalty"):
        SamplingParams(presence_penalty=1.0)  # type: ignore[call-arg]


def test_defaults_are_those_of_vllm() -> None:
    """As vLLM documents them, so that code can move over."""
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.seed, params.max_tokens, params.min_tokens, params.logprobs) == (None, 16, 0, None)
    assert (params.ignore_eos, params.detokenize, params.skip_special_tokens) == (False, True, True)
    assert params.include_stop_str_in_output is False
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert SamplingParams(stop="x").stop_strings == SamplingParams(stop=["x"]).stop_strings == ("x",)
    assert hash(SamplingParams(stop=["a"], stop_token_ids=[1])) == hash(SamplingParams(stop=["a"], stop_token_ids=[1]))


def test_what_this_model_or_engine_cannot_do_is_refused() -> None:
    """Tokens beyond the vocabulary, more log probabilities than the engine gives, too many tokens held back."""
    check(SamplingParams(stop_token_ids=[96], logprobs=20, min_tokens=1), 97, (1, 2), 20)
    check(SamplingParams(logprobs=-1), 97)
    with pytest.raises(OptionError, match="stop_token_ids holds 97"):
        check(SamplingParams(stop_token_ids=[3, 97]), 97)
    with pytest.raises(OptionError, match="logprobs=21"):
        check(SamplingParams(logprobs=21), 97, (), 20)
    with pytest.raises(OptionError, match="logprobs=-1"):
        check(SamplingParams(logprobs=-1), 97, (), 20)
    ids = list(range(MAX_END_IDS))
    check(SamplingParams(stop_token_ids=ids, min_tokens=1), 97, (0, 1))
    with pytest.raises(OptionError, match=f"{MAX_END_IDS + 1} end tokens"):
        check(SamplingParams(stop_token_ids=ids, min_tokens=1), 97, (90,))
    with pytest.raises(OptionError, match=str(MAX_VOCAB)):
        Sampler(1, MAX_VOCAB, "cpu")
