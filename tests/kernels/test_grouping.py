"""Merging and unmerging rows of tokens against loops."""

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import grouping
from kvpleat.kernels.grouping import _product, group, merge, squares, taken, total, unmerge


def random_groups(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, real tokens (padding anywhere), sizes: who stays is drawn, the others join one of those."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(rows, tokens, generator=generator) < 0.8
    stays = real & (torch.rand(rows, tokens, generator=generator) < 0.4)
    target = torch.arange(tokens).repeat(rows, 1)
    for row in range(rows):
        leaders = stays[row].nonzero()[:, 0]
        for token in range(tokens):
            if real[row, token] and not stays[row, token] and len(leaders):
                target[row, token] = leaders[torch.randint(len(leaders), (), generator=generator)]
    sizes = torch.randint(1, 5, (rows, tokens), generator=generator).double() * real
    return target, real, sizes


@pytest.mark.parametrize("seed", range(4))
def test_like_loops(seed: int) -> None:
    """Groups in text order, means by size, sums; and every token gets its group's state back, padding 0."""
    rows, tokens, channels = 3, 19, 5
    target, real, sizes = random_groups(rows, tokens, seed)
    states = torch.randn(rows, tokens, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    width = int((real & (target == torch.arange(tokens))).sum(1).max()) + 2
    groups = group(target, real, width)
    merged, summed = merge(groups, states, sizes), total(groups, sizes)
    back = unmerge(groups.place, real, merged)
    product = _product(groups, states, sizes)  # what a GPU does
    torch.testing.assert_close(product, merged * summed[..., None])
    for row in range(rows):
        leaders = [t for t in range(tokens) if real[row, t] and target[row, t] == t]
        assert groups.real[row].tolist() == [i < len(leaders) for i in range(width)]
        for i, leader in enumerate(leaders):
            members = [t for t in range(tokens) if real[row, t] and target[row, t] == leader]
            want = sum(sizes[row, t] * states[row, t] for t in members) / sum(sizes[row, t] for t in members)
            torch.testing.assert_close(merged[row, i], want)
            assert summed[row, i] == sum(sizes[row, t] for t in members)
            assert groups.stays[row, i] == leader
            assert taken(groups, sizes)[row, i] == sizes[row, leader]
            assert all(torch.equal(back[row, t], merged[row, i]) for t in members)
        assert (merged[row, len(leaders) :] == 0).all()
        assert (back[row, ~real[row]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_like_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging groups of any members, unmerging and norms; channels apart, as those of heads are."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, real, sizes = (x.to(device) for x in random_groups(3, 37, seed=7))
    states = torch.randn(3, 11, 37, 3, device=device).to(dtype).transpose(1, 2).flatten(2)
    groups, sizes = group(target, real, 37), sizes.float()
    wanted = merge(groups, states.double(), sizes.double())
    undone, squared = unmerge(groups.place, real, wanted), squares(states.double())
    monkeypatch.setattr(grouping, "runs_on_triton", lambda states: True)
    close = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(merge(groups, states, sizes).double(), wanted, rtol=close, atol=close)
    assert torch.equal(unmerge(groups.place, real, wanted.float()), undone.float())
    torch.testing.assert_close(squares(states.expand(3, -1, -1)).double(), squared, rtol=1e-6, atol=1e-6)


def test_the_mean_of_a_text_stays() -> None:
    """Mean pooling over what is unmerged is the mean over the tokens before."""
    target, real, _ = random_groups(2, 23, seed=9)
    states = torch.randn(2, 23, 4, dtype=torch.float64) * real[..., None]
    groups = group(target, real, 23)
    back = unmerge(groups.place, real, merge(groups, states, real.double()))
    torch.testing.assert_close(back.sum(1), states.sum(1))


def test_gradients() -> None:
    """Of merging and unmerging, against finite differences."""
    target, real, sizes = random_groups(2, 7, seed=3)
    groups = group(target, real, 7)
    states = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unmerge(groups.place, real, merge(groups, x, sizes)), (states,))
