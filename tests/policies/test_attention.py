"""AttentionScore's parts against loops written from their definitions, and its options."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.policies import importance
from kvpleat.policies.fold import MAX_DISTANCE, fold
from kvpleat.policies.selection import Candidates, cover, rank, share_pages
from kvpleat.types import KVShape, Phase, PolicyInput, Rotary

HEADS, GROUP, DIM, ENTRIES = 2, 3, 8, 37


def moment(rotary: Rotary | None, softcap: float | None) -> PolicyInput:
    """A moment at position 90 with ragged streams, gaps, weights and 11 sampled queries."""
    random = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(90, generator=random)[:ENTRIES].sort().values for _ in range(HEADS)])
    live = torch.ones(HEADS, ENTRIES, dtype=torch.bool)
    live[1, 30:] = False
    return PolicyInput(
        position=90,
        layer=0,
        shape=KVShape(1, HEADS, HEADS * GROUP, DIM, torch.float64),
        positions=positions.int(),
        live=live,
        keys=torch.randn(HEADS, ENTRIES, DIM, generator=random),
        values=torch.randn(HEADS, ENTRIES, DIM, generator=random),
        log_weights=torch.rand(HEADS, ENTRIES, generator=random),
        scores=None,
        queries=torch.randn(HEADS * GROUP, 6, DIM, generator=random),
        query_positions=torch.arange(84, 90),
        samples=torch.randn(HEADS * GROUP, 11, DIM, generator=random),
        sample_positions=torch.arange(0, 88, 8),
        last_moment=0,
        scale=0.4,
        softcap=softcap,
        rotary=rotary,
        layer_share=1.0,
        competes=True,
    )


def turned(x: Tensor, distance: int, rotary: Rotary | None) -> Tensor:
    """A vector moved by `distance` positions, pair by pair."""
    if rotary is None:
        return x.double()
    out, half = x.double().clone(), len(rotary.inv_freq)
    for i, speed in enumerate(rotary.inv_freq.tolist()):
        a, b, angle = float(x[i]), float(x[i + half]), distance * speed
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def probabilities(inputs: PolicyInput, q: Tensor, head: int, keys: list[tuple[Tensor, float]]) -> Tensor:
    """Softmax of one query over (key, log-weight) pairs."""
    logits = []
    for key, weight in keys:
        logit = float(q.double() @ key.double()) * inputs.scale
        if inputs.softcap is not None:
            logit = inputs.softcap * math.tanh(logit / inputs.softcap)
        logits.append(logit + weight)
    return torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([1.0, 0.2, 0.03]))], ids=["learned", "rotary"])
def test_received_and_foreseen(rotary: Rotary | None, softcap: float | None) -> None:
    """Both importances equal loops over heads, queries and entries; without smoothing."""
    inputs, recent = moment(rotary, softcap), 20
    received = importance.received(inputs, last=4, smoothing=1)
    foreseen = importance.foreseen(inputs, recent, smoothing=1)
    for head in range(HEADS):
        n = int(inputs.live[head].sum())
        entries = [(inputs.keys[head, i], float(inputs.log_weights[head, i])) for i in range(n)]
        plain, squares = torch.zeros(GROUP, n, dtype=torch.float64), torch.zeros(GROUP, n, dtype=torch.float64)
        for g in range(GROUP):
            for j in range(2, 6):
                shown = [i for i in range(n) if inputs.positions[head, i] <= inputs.query_positions[j]]
                paid = probabilities(inputs, inputs.queries[head * GROUP + g, j], head, [entries[i] for i in shown])
                plain[g, shown] += paid / 4
            for j in range(11):
                ahead = 90 + (97 * j) % importance.HORIZON
                q = turned(inputs.samples[head * GROUP + g, j], ahead - 8 * j, rotary)
                copies = [i for i in range(n) if inputs.positions[head, i] >= 90 - recent]
                copies = [i for i in copies if inputs.positions[head, i] + recent <= ahead]
                shown = entries + [(turned(entries[i][0], recent, rotary), entries[i][1]) for i in copies]
                squares[g] += probabilities(inputs, q, head, shown)[:n] ** 2 / 11
        torch.testing.assert_close(received[head, :n].double(), plain.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(foreseen[head, :n].double(), squares.sqrt().mean(0), atol=1e-5, rtol=1e-4)
        assert not received[head, n:].any()
        assert not foreseen[head, n:].any()


def test_smoothing_and_carrying() -> None:
    """Means over live neighbours only; old scores halve every half-life; new entries take what they got."""
    live = torch.tensor([[True, True, True, False]])
    assert importance.smooth(torch.tensor([[3.0, 0.0, 6.0, 99.0]]), live, 3).tolist() == [[1.5, 3.0, 3.0, 0.0]]
    old = torch.tensor([[4.0, math.nan]])
    assert importance.carry(old, torch.tensor([[0.0, 1.0]]), tokens=20, half_life=10.0).tolist() == [[1.0, 1.0]]
    assert importance.carry(None, torch.tensor([[2.0]]), 5, 10.0).tolist() == [[2.0]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), budget=st.integers(8, 40), reserve=st.integers(0, 32), page=st.sampled_from([16, 32])
)
def test_streams_share_pages(seed: int, budget: int, reserve: int, page: int) -> None:
    """The budget holds, reserves included; nobody keeps an entry while a better one of the same stream leaves; and no
    single page could move to another stream for a better sum."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 150, (5,), generator=random)
    live = torch.arange(150) < lengths[:, None]
    protected = live & (torch.arange(150) < 6)
    scores = torch.rand(5, 150, generator=random) ** 4 * torch.rand(5, 1, generator=random)
    candidates = Candidates(scores, live, protected)
    ranking = rank(candidates)
    room = share_pages(candidates, ranking, budget, 0.0, reserve, page)
    kept = torch.minimum(room, ranking.count) + 6
    pages = -(-(kept + reserve) // page)
    least = -(-(6 + reserve) // page)
    assert int(pages.sum()) <= max(budget, 5 * least)

    def worth(stream: int, number: int) -> float:
        """Sum of scores that the stream's page of this number holds."""
        first, last = (max(0, n * page - reserve - 6) for n in (number, number + 1))
        return float(ranking.scores[stream, first:last].clamp(min=0).sum())

    given_up = [worth(s, int(pages[s])) for s in range(5) if kept[s] < lengths[s]]
    held = [worth(s, int(pages[s]) - 1) for s in range(5) if int(pages[s]) > least]
    if given_up and held and int(pages.sum()) == budget:
        assert max(given_up) <= min(held) + 1e-6


def test_cover_keeps_the_share() -> None:
    """The fewest entries, filled up to whole pages, that carry the share."""
    scores = torch.tensor([[8.0, 4.0, 2.0, 1.0] + [0.01] * 60])
    candidates = Candidates(scores, torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 64, dtype=torch.bool))
    assert cover(candidates, rank(candidates), 0.9, 0, 16).tolist() == [16]
    assert cover(candidates, rank(candidates), 1.0, 0, 16).tolist() == [64]


def test_fold_merges_neighbours_at_a_rate_that_follows_the_score() -> None:
    """Two to one, then four and eight to one; groups are neighbours; weights add up at most; far members leave."""
    n = 64
    scores = torch.linspace(1, 0.1, n)[None]
    order = torch.arange(n)[None]
    positions = order.clone().int()
    keep, target, weights = fold(order, torch.tensor([10]), torch.tensor([8]), scores, positions, torch.zeros(1, n))
    groups = {int(t): [i for i in range(n) if int(target[0, i]) == int(t)] for t in target[0].unique()}
    sizes = [len(groups[int(i)]) for i in torch.nonzero(keep[0]).flatten()]
    assert sizes == [2, 2, 2, 2, 4, 4, 8, 8]
    assert not keep[0, :10].any()
    for leader in torch.nonzero(keep[0]).flatten().tolist():
        members = groups[leader]
        assert leader == max(members, key=lambda i: float(scores[0, i]))
        mass = float(scores[0, members].sum() / scores[0, leader])
        assert float(weights[0, leader]) == pytest.approx(math.log(min(mass, len(members))), abs=1e-5)
    far = positions * (MAX_DISTANCE + 1)
    keep, target, _ = fold(order, torch.tensor([10]), torch.tensor([8]), scores, far, torch.zeros(1, n))
    assert torch.equal(target, order)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"ratio": 4.0, "coverage": 0.9}, "exactly one"),
        ({"ratio": 0.5}, "ratio=2"),
        ({"ratio": math.nan}, "outside"),
        ({"ratio": 1e9}, "outside"),
        ({"coverage": 1.5}, "share"),
        ({"ratio": 4.0, "fold": 2.0}, "share"),
        ({"ratio": 4.0, "smoothing": 4}, "odd"),
        ({"ratio": 4.0, "interval": 0}, "at least"),
        ({"ratio": 4.0, "slack": 0.5}, "at least"),
        ({"ratio": 4.0, "observation_window": 8}, "at least"),
    ],
)
def test_bad_options(options: dict[str, float], words: str) -> None:
    """Each is refused with the value, the consequence and the remedy."""
    with pytest.raises(OptionError, match=words):
        policies.AttentionScore(**options)


@settings(max_examples=50, deadline=None)
@given(interval=st.integers(1, 40), start=st.integers(0, 9000), size=st.integers(1, 3000), cut=st.floats(0, 1))
def test_moments_of_an_answer(interval: int, start: int, size: int, cut: float) -> None:
    """The same ones wherever one begins to look; `interval` apart, or a 64th to a 128th of a long text."""
    policy, decode = policies.AttentionScore(ratio=4.0, interval=interval), Phase.DECODE
    shape = KVShape(2, HEADS, HEADS * GROUP, DIM, torch.float32)
    found, middle = policy.moments(start, start + size, decode, start, shape), start + int(cut * size)
    parts = (start, middle), (middle, start + size)
    assert [x for first, stop in parts for x in policy.moments(first, stop, decode, start, shape)] == found
    everything = policy.moments(0, start + size, decode, 0, shape)
    assert found == [x for x in everything if x > start]
    for before, after in zip([0, *everything], everything, strict=False):
        apart = after - before
        assert apart == interval or before / 128 < apart <= before / 64
        assert apart % interval == 0
        assert after % apart == 0


def test_moments() -> None:
    """Token indices alone decide, and cutting a range in two gives the same moments."""
    shape = KVShape(4, 2, 6, 16, torch.float32, fields=policies.AttentionScore.fields)
    policy = policies.AttentionScore(ratio=4.0, slack=1.5)
    prefill, decode = Phase.PREFILL, Phase.DECODE
    assert policies.AttentionScore(ratio=4.0).moments(0, 5000, prefill, 0, shape) == []
    assert policy.moments(40, 130, decode, 40, shape) == [64, 96, 128]
    whole = policy.moments(0, 5000, prefill, 0, shape)
    assert len(whole) > 3
    assert all(m % 64 == 0 for m in whole)
    for cut in (100, whole[0], whole[1] + 7, 3333):
        first = policy.moments(0, cut, prefill, 0, shape)
        assert first + policy.moments(cut, 5000, prefill, max([0, *first]), shape) == whole
