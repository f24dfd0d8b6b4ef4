"""The LoRA that comes with kvpleat, on the real model."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kvpleat import compress, policies
from kvpleat.hf import minilm, models
from kvpleat.hf.embed import pool

LORA = "all-minilm-l6-v2-merge"
TEXT = Path(__file__).parents[2] / "examples" / "kennedy-1961.txt"

pytestmark = pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="its package is not installed")


@torch.inference_mode()
def test_merged_texts_come_nearer_to_what_they_were() -> None:
    """Pieces of a speech that it has not seen: their vectors at ratio 4 are nearer to the full model's than without."""
    loaded = models.load_encoder(minilm.NAME, device="cpu", progress=False)
    text = loaded.tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False).input_ids
    first, last = loaded.tokenizer("").input_ids
    ids = torch.tensor([[first, *text[start : start + 254], last] for start in range(0, 1024, 256)])
    mask = torch.ones_like(ids)

    def vectors() -> torch.Tensor:
        return pool(loaded.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    full = vectors()
    with compress(loaded.model, policies.EncoderMerge(ratio=4.0)):
        without = F.cosine_similarity(vectors(), full)
    with compress(loaded.model, policies.EncoderMerge(ratio=4.0, lora=LORA)):
        learned = F.cosine_similarity(vectors(), full)
    assert learned.mean() > without.mean() + 0.03
    assert torch.equal(vectors(), full)
