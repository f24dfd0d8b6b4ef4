"""What is minimised, against autograd on the whole vocabulary and against counting."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvpleat.errors import OptionError
from kvpleat.retrofit import objective
from kvpleat.retrofit.objective import distill, marked_share, target_share, too_little

TOKENS, HIDDEN, VOCAB = 53, 12, 31


def problem(seed: int, bias: bool = False) -> dict[str, Any]:
    """A student's and a teacher's hidden states, heads, targets (some unknown) and weights, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = [nn.Linear(HIDDEN, VOCAB, bias=bias).double() for _ in range(2)]
        targets = torch.randint(0, VOCAB, (TOKENS,))
        targets[torch.rand(TOKENS) < 0.2] = -1
        student, teacher = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64) * 2
        return {
            "student": student.requires_grad_(),
            "teacher": teacher,
            "head": heads[0],
            "teacher_head": heads[1].requires_grad_(False),
            "targets": targets,
            "weight": torch.rand(TOKENS) * (torch.rand(TOKENS) < 0.8),
        }


def by_autograd(problem: dict[str, Any], lm_weight: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(loss, KL), each a weighted mean, in one piece, from the definition."""

    def probabilities(hidden: Tensor, head: nn.Module) -> Tensor:
        logits = head(hidden)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.softmax(logits, dim=-1)

    p = probabilities(problem["teacher"], problem["teacher_head"])
    q = probabilities(problem["student"], problem["head"])
    kl = (p * (p / q).log()).sum(-1)
    targets, weight = problem["targets"], problem["weight"].double()
    nll = torch.stack([-q[i, t].log() if t >= 0 else q.new_zeros(()) for i, t in enumerate(targets)])
    return ((kl + lm_weight * nll) * weight).sum() / weight.sum(), (kl * weight).sum() / weight.sum()


@pytest.mark.parametrize("chunk", [1, 7, 53, 4096])
@pytest.mark.parametrize("lm_weight", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_distill_is_the_definition(
    chunk: int, lm_weight: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, KL, and the gradients of hidden states and of the head's weights."""
    monkeypatch.setattr(objective, "CHUNK", chunk)
    for seed in range(3):
        case = problem(seed)
        leaves = [case["student"], case["head"].weight]
        loss, kl = by_autograd(case, lm_weight, softcap)
        found = distill(**case, lm_weight=lm_weight, softcap=softcap)
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(found.kl, kl)
        wanted = torch.autograd.grad(3 * loss, leaves)
        for mine, theirs in zip(torch.autograd.grad(3 * found.loss, leaves), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_figures_beside_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement over all tokens, likelihoods over those whose successor is known."""
    monkeypatch.setattr(objective, "CHUNK", 10)
    case = problem(4, bias=True)
    case["head"].requires_grad_(False)
    case["teacher_head"] = case["head"]
    case["teacher"] = case["student"].detach() + case["teacher"] / 2
    found = distill(**case)
    logits, wanted = (case["head"](case[name].detach()) for name in ("student", "teacher"))
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(logits, wanted, strict=True))
    assert 0.3 < same / TOKENS < 0.9
    assert float(found.agreement) == pytest.approx(same / TOKENS)
    for nll, of in ((found.student_nll, logits), (found.teacher_nll, wanted)):
        assert float(nll) == pytest.approx(float(nn.functional.cross_entropy(of, case["targets"], ignore_index=-1)))
    assert [x.requires_grad for x in found] == [True, False, False, False, False]


def test_another_total() -> None:
    """What several processes divide by is their common mean."""
    case = problem(5)
    alone, together = distill(**case), distill(**case, total=torch.tensor(10.0))
    factor = float(case["weight"].sum()) / 10
    assert float(together.loss.detach()) == pytest.approx(float(alone.loss.detach()) * factor, rel=1e-5)
    assert float(together.kl) == pytest.approx(float(alone.kl) * factor, rel=1e-5)


def test_no_weight_is_no_loss() -> None:
    case = problem(6)
    case["weight"].zero_()
    found = distill(**case)
    found.loss.backward()
    assert not found.loss
    assert not case["student"].grad.any()


def test_other_heads_are_refused() -> None:
    case = problem(7)
    case["head"] = nn.Sequential(case["head"])
    with pytest.raises(OptionError, match="head is a Sequential"):
        distill(**case)


def test_marked_share_is_a_count() -> None:
    """Of each row, over all layers, heads and tokens but the first ones of documents, which cannot mark any."""
    layers, rows, heads, tokens = 3, 2, 2, 11
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        marks = list((torch.rand(layers, rows, heads, tokens, generator=random) < 0.4).float())
        starts = [[0] * 4 + [4] * 7, [0] * 1 + [1] * 1 + [2] * 9]
        for sinks in range(3):
            found = marked_share(marks, torch.tensor(starts, dtype=torch.int32), sinks)
            for row in range(rows):
                places = [t for t in range(tokens) if t - sinks > starts[row][t]]
                count = sum(int(layer[row, head, t]) for layer in marks for head in range(heads) for t in places)
                assert float(found[row]) == pytest.approx(count / (layers * heads * len(places)))


def entries_left(marked: list[bool], delay: int) -> int:
    """Entries of a stream after its last token: gone is what the token after it marked, once it is old enough."""
    last = len(marked) - 1
    return sum(not (last - t > delay and marked[t + 1]) for t in range(len(marked)))


@given(
    delay=st.integers(1, 40), period=st.integers(2, 12), repeats=st.integers(1, 30), data=st.data()
)  # of tokens whose decision counts: those that mark an entry old enough
@settings(deadline=None, max_examples=60)
def test_target_share_against_counting(delay: int, period: int, repeats: int, data: st.DataObject) -> None:
    """Streams with that share of marks, evenly laid, hold 1 / ratio of their entries."""
    marks = data.draw(st.integers(1, period - 1))
    length = period * repeats + delay + 1
    marked = [False] + [i % period < marks for i in range(length - 1)]
    left = entries_left(marked, delay)
    assert target_share(length / left, delay, length) == pytest.approx(marks / period)


def test_target_share_without_delay() -> None:
    """Merging at once: nothing waits."""
    marked = [False, *[True, True, True, False] * 25]
    assert target_share(4.0, 0, 101) == pytest.approx(0.75)
    assert entries_left(marked, 0) == pytest.approx(101 / 4, abs=1)


def test_target_share_beyond_what_waits() -> None:
    with pytest.raises(OptionError, match=r"ratio=8 with delay=15 at length=128: the 16 entries that wait"):
        target_share(8.0, 15, 128)
    assert target_share(7.9, 15, 128) < 1


def test_too_little_is_per_row() -> None:
    """A row that is above its target does not pay for another."""
    share = torch.tensor([0.9, 0.2, 0.5], requires_grad=True)
    penalty = too_little(share, 0.6)
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx((0.4 + 0.1) / 3)
    torch.testing.assert_close(share.grad, torch.tensor([0.0, -1 / 3, -1 / 3]))
