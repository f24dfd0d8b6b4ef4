"""Judging gates: figures of hard decisions are those of the compressed cache."""

from typing import Any

import pytest
import torch
from torch import nn

from kvpleat import compress
from kvpleat.errors import OptionError
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.measure import Lesson, judge
from kvpleat.retrofit.student import Student
from tests import models
from tests.retrofit.rows import KINDS, packed, random_gates

LENGTH = 77


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_judged_as_the_cache_does(family: str, kind: str) -> None:
    """KL, agreement and perplexities from logits of the cache and the model; the ratio from the entries it holds."""
    model = models.tiny(family)
    gates = random_gates(model, kind)
    tokens = models.prompt(LENGTH, rows=3)
    batches = [whole_rows(tokens[:2]), whole_rows(tokens[2:])]  # the last batch has fewer rows
    student = Student(model, gates, KINDS[kind][0], temperature=0.5)
    with student.attached():
        found = judge(Lesson(student), batches)
    full = model(tokens).logits.log_softmax(-1)
    with compress(model, KINDS[kind][0](gates=gates)) as pleated:
        cache = pleated.new_cache()
        compressed = model(tokens, **models.given(cache)).logits.log_softmax(-1)
        assert cache.kv is not None
        entries = float(cache.kv.lengths.sum()) / cache.kv.lengths.numel()
    kl = (full.exp() * (full - compressed)).sum(-1)[:, :-1].mean()  # nothing is predicted at the last token
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["kl"] > 0.01
    assert found["agreement"] == pytest.approx(float((full.argmax(-1) == compressed.argmax(-1)).double().mean()))
    for name, logits in (("perplexity", compressed), ("full_perplexity", full)):
        nll = nn.functional.nll_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert found[name] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found["perplexity_change"] == pytest.approx(found["perplexity"] / found["full_perplexity"] - 1)
    assert found["ratio"] == pytest.approx(LENGTH / entries)
    assert student.temperature == 0.5


def whole_rows(tokens: torch.Tensor) -> Batch:
    weight = torch.ones(tokens.shape)
    weight[:, 0] = 0
    return Batch(tokens, torch.zeros(tokens.shape, dtype=torch.int32), weight)


def test_targets_end_with_their_document() -> None:
    """No document is asked to predict the first token of the next, and weights belong to what is predicted."""
    model: Any = models.tiny("llama")
    student = Student(model, random_gates(model, "dms"), KINDS["dms"][0])
    batch = packed(20, [8, 12], [5])
    batch.loss_weight[0, 13] = 7.0
    with student.attached(), torch.no_grad():
        found = Lesson(student)(batch, student.no_noise(1, 20), lm_weight=1.0)
        hidden, _ = student(batch.tokens, batch.doc_start, student.no_noise(1, 20))
        logits = student.head(hidden).log_softmax(-1)[0]
        nll = {t: -float(logits[t - 1, batch.tokens[0, t]]) for t in range(1, 20) if t != 8}
    weights = batch.loss_weight[0].tolist()
    total = sum(weights[t] for t in nll)
    wanted = sum(nll[t] * weights[t] for t in nll) / total
    assert float(found.distance.loss - found.distance.kl) == pytest.approx(wanted, rel=1e-5)
    assert float(found.distance.student_nll) == pytest.approx(sum(nll.values()) / len(nll), rel=1e-5)


def test_nothing_to_judge_on() -> None:
    model = models.tiny("llama")
    student = Student(model, random_gates(model, "dms"), KINDS["dms"][0], temperature=0.3)
    with student.attached(), pytest.raises(OptionError, match="no batch to judge with"):
        judge(Lesson(student), [])
    assert student.temperature == 0.3
