"""Rounds of merging in Triton (interpreted where there is no GPU) against those in torch."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvpleat.encoder.tokens import Tokens, shorten
from kvpleat.kernels import grouping
from kvpleat.policies import EncoderMerge

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
kernels = importlib.import_module("kvpleat.kernels.grouping_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [37, 22, 3, 11]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a few tokens fill more than once; and Triton in any case."""
    for name, size in (("JOINERS", 16), ("OTHERS", 16), ("DEPTH", 64), ("LIST", 16), ("ROW", 16)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(grouping, "runs_on_triton", lambda states: True)


def batch(lengths: list[int], channels: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tokens, Tensor]:
    """Random rows, padding behind; both ends and some tokens in between never merge."""
    make = torch.Generator().manual_seed(seed)
    column = torch.arange(max(lengths)).expand(len(lengths), -1)
    real = column < torch.tensor(lengths)[:, None]
    inner = (column > 0) & (column < torch.tensor(lengths)[:, None] - 1)
    free = inner & (torch.rand(real.shape, generator=make) < 0.9)
    mass = torch.rand(real.shape, generator=make) * real
    states = torch.randn(*real.shape, channels, generator=make).to(dtype)
    sizes = torch.randint(1, 4, real.shape, generator=make) * real
    parts = (x.to(DEVICE) for x in (sizes.float(), mass, free, column))
    return Tokens(*parts, real.sum(1).tolist(), free.sum(1).tolist()), states.to(DEVICE)


def alone(tokens: Tokens, row: int) -> Tokens:
    """One row of a batch, without its padding."""
    n = tokens.counts[row]
    cut = {name: getattr(tokens, name)[row : row + 1, :n] for name in ("sizes", "mass", "free", "position")}
    return replace(tokens, **cut, counts=[n], free_counts=tokens.free_counts[row : row + 1])


def by_torch(tokens: Tokens, states: Tensor, *options: object) -> tuple[Tokens, Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "runs_on_triton", lambda states: False)
        return shorten(tokens, states, *options)


@pytest.mark.parametrize(
    ("ratio", "channels", "compared", "dtype"),
    [
        (2.0, 24, None, torch.float32),
        (3.8, 70, None, torch.float32),
        (40.0, 33, 20, torch.float32),
        (1.05, 8, None, torch.float32),
        (1.2, 48, None, torch.float16),  # one round: after it, means of 16 bits may be nearest to others
    ],
)
def test_like_torch(ratio: float, channels: int, compared: int | None, dtype: torch.dtype, small: None) -> None:
    """The same groups, sizes, places; means up to rounding. Random states have no ties."""
    policy = EncoderMerge(ratio=ratio, floor=4)
    tokens, states = batch(LENGTHS, channels, seed=channels, dtype=dtype)
    kept = [policy.kept(n, 1 / ratio) for n in tokens.counts]
    wide = states.double() if dtype == torch.float32 else states
    (got, merged, place), (want, means, where) = (
        run(tokens, x, policy, kept, compared) for run, x in ((shorten, states), (by_torch, wide))
    )
    assert (got.counts, got.free_counts, got.plain) == (want.counts, want.free_counts, False)
    real, close = tokens.real, 1e-5 if dtype == torch.float32 else 2**-6
    assert torch.equal(place[real], where[real])
    torch.testing.assert_close(merged.double(), means.double(), rtol=close, atol=close)
    width = want.sizes.shape[1]
    for name in ("sizes", "mass", "free"):
        torch.testing.assert_close(getattr(got, name)[:, :width], getattr(want, name))
    assert torch.equal(got.position[got.real], want.position[want.real])
    assert (merged[~got.real] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16 as integers
def test_a_row_alone_has_the_same_bits(dtype: torch.dtype, small: None) -> None:
    policy = EncoderMerge(ratio=3.0, floor=4)
    tokens, states = batch(LENGTHS, 40, seed=5, dtype=dtype)
    together, merged, place = shorten(tokens, states, policy, [policy.kept(n, 1 / 3) for n in tokens.counts])
    for row, n in enumerate(LENGTHS):
        one = alone(tokens, row)
        fewer, own, where = shorten(one, states[row : row + 1, :n], policy, [policy.kept(n, 1 / 3)])
        count = fewer.counts[0]
        assert count == together.counts[row]
        assert torch.equal(own[0, :count], merged[row, :count])
        assert torch.equal(where[0], place[row, :n])
        for name in ("sizes", "mass", "position"):
            assert torch.equal(getattr(fewer, name)[0, :count], getattr(together, name)[row, :count])


def test_what_nobody_joins_stays_bit_by_bit(small: None) -> None:
    tokens, states = batch(LENGTHS, 40, seed=2)
    fewer, merged, place = shorten(tokens, states, EncoderMerge(ratio=2.0), [25, 12, 3, 8])
    for row, count in enumerate(fewer.counts):
        for group in range(count):
            members = (place[row, : LENGTHS[row]] == group).nonzero()[:, 0]
            if len(members) == 1:
                assert torch.equal(merged[row, group], states[row, int(members)])


@pytest.mark.parametrize("joins", [[5, 3, 0], [8, 1, 4]])
def test_the_cheapest_join(joins: list[int]) -> None:
    """Equal ones in the order of the text; costs of zero; a row in which none joins."""
    rows, tokens = 3, 21
    free = torch.ones(rows, tokens, dtype=torch.bool)
    free[:, [0, 7, 20]] = False
    cost = torch.randint(0, 4, (rows, 9), generator=torch.Generator().manual_seed(1)).float()
    columns = [c for c in range(tokens) if free[0, c]]
    best = torch.tensor([columns[2 * (3 * j % 9)] for j in range(9)], dtype=torch.int32).repeat(rows, 1)
    column = torch.arange(tokens).repeat(rows, 1)
    given = (x.to(DEVICE) for x in (cost, best, torch.tensor(joins, dtype=torch.int32)))
    known = (x.to(DEVICE) for x in (free, torch.ones(rows, tokens), column, column))
    members, towards, leaders, left, index, stood, placed = kernels.choose(*given, max(joins), *known, tokens)
    for row, wanted in enumerate(joins):
        chosen = sorted(sorted(range(9), key=lambda j: (float(cost[row, j]), j))[:wanted])
        joiners = [columns[2 * j + 1] for j in chosen]
        stay = [c for c in range(tokens) if c not in joiners]
        assert members[row, :wanted].tolist() == joiners
        assert towards[row, :wanted].tolist() == [columns[2 * (3 * j % 9)] for j in chosen]
        assert leaders[row, : len(stay)].tolist() == stood[row, : len(stay)].tolist() == stay
        assert left[row].tolist() == [bool(free[row, c]) for c in stay] + [False] * wanted
        assert [stay[i] for i in index[row, : 18 - wanted].tolist()] == [c for c in stay if free[row, c]]
        to = {columns[2 * j + 1]: columns[2 * (3 * j % 9)] for j in chosen}
        assert placed[row].tolist() == [stay.index(to.get(c, c)) for c in range(tokens)]


def test_where_it_runs() -> None:
    """On a GPU, but not where something is learned, in float64, or for more tokens than a program holds."""
    here = {"device": torch.device("cuda"), "dtype": torch.float32, "shape": (2, 9, 8), "requires_grad": False}

    def runs(**changed: object) -> bool:
        return grouping.runs_on_triton(SimpleNamespace(**{**here, **changed}))  # type: ignore[arg-type]

    assert runs()
    assert not runs(requires_grad=True)
    with torch.no_grad():
        assert runs(requires_grad=True)
    for name, other in (("device", torch.device("cpu")), ("dtype", torch.float64), ("shape", (2, 16385, 8))):
        assert not runs(**{name: other})
