"""Distilling a LoRA for merged tokens, on a tiny encoder; and serving it."""

import itertools
import json
import lzma
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvpleat import compress
from kvpleat.encoder.distill import Recipe, _texts, distill, main, read_texts
from kvpleat.errors import ModelError, OptionError, UnsupportedError
from kvpleat.policies import EncoderMerge
from kvpleat.policies.lora import LoraWeights
from tests.encoder.models import FIRST, LAST, VOCAB, texts, tiny


@pytest.mark.parametrize("more", [{}, {"bf16": 1}])
def test_it_brings_the_student_nearer(tmp_path: Path, more: dict[str, Any]) -> None:
    """Half the loss is gone on texts it has not seen; the model is as it was; served from a folder it is what was
    trained; and detaching takes it out."""
    model = tiny("bert", initializer_range=0.1).float()
    generator = torch.Generator().manual_seed(0)
    stream = 5 + (torch.rand(4000, generator=generator) ** 2 * (VOCAB - 6)).long()
    before = {name: p.clone() for name, p in model.named_parameters()}
    recipe = Recipe(ratios=(3.0,), rank=8, rate=5e-3, steps=80, batch=16, shortest=30, longest=60)
    recipe = replace(recipe, **more)
    lora = distill(model, stream, (FIRST, LAST), recipe, lambda line: None)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    lora.save(tmp_path)

    ids, _ = texts([50] * 8, seed=4)
    errors = {}
    with torch.no_grad():
        full = model(ids).last_hidden_state.mean(1)
        for name in ("", str(tmp_path)):
            with compress(model, EncoderMerge(ratio=3.0, lora=name)):
                got = model(ids).last_hidden_state.mean(1)
            errors[name] = float((1 - F.cosine_similarity(got, full, dim=-1)).mean())
    assert errors[str(tmp_path)] < 0.5 * errors[""]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_texts_of_a_batch() -> None:
    """Framed pieces as long as asked."""
    recipe = Recipe(batch=20, shortest=40, longest=40)
    ids = _texts(torch.arange(10_000, 90_000), (1, 2), recipe, torch.Generator().manual_seed(0))
    assert ids.shape == (20, 40)
    assert ids[:, 0].tolist() == [1] * 20
    assert ids[:, -1].tolist() == [2] * 20
    assert torch.equal(ids[:, 1:-1], ids[:, 1:2] + torch.arange(38))
    assert len(set(ids[:, 1].tolist())) > 15


def test_going_on_and_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA that nothing is added to is what comes out; seconds go before steps; another rank is refused."""
    model, stream = tiny("bert").float(), torch.arange(5, 90)
    recipe = Recipe(rank=2, rate=0.0, steps=1, batch=2, shortest=20, longest=30)
    plain = distill(model, stream, (FIRST, LAST), recipe, lambda line: None)
    given = LoraWeights(2, 4.0, {name: (a, torch.ones_like(b)) for name, (a, b) in plain.pairs.items()})
    lines, ticks = list[str](), itertools.count()
    monkeypatch.setattr("kvpleat.encoder.distill.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    lora = distill(model, stream, (FIRST, LAST), replace(recipe, seconds=1.0), lines.append, given)
    assert len(lines) == 5  # asked twice in each step
    for name, (a, b) in lora.pairs.items():
        torch.testing.assert_close(lora.scale * b @ a, given.scale * given.pairs[name][1] @ given.pairs[name][0])
    with pytest.raises(OptionError, match="rank=2"):
        distill(model, stream, (FIRST, LAST), replace(recipe, rank=3), lambda line: None, given)


def test_what_cannot_be() -> None:
    """A folder without a LoRA; a model in training mode."""
    model, policy = tiny("bert"), EncoderMerge(ratio=2.0, lora="nowhere")
    with pytest.raises(ModelError, match="nowhere"), compress(model, policy):
        pass
    assert "forward" not in vars(model)


def test_a_lora_hides_weights_from_an_optimizer(tmp_path: Path) -> None:
    """So training mode is refused."""
    model = tiny("bert")
    recipe = Recipe(rank=2, steps=1, batch=2, shortest=20, longest=30)
    distill(model.float(), torch.arange(5, 90), (FIRST, LAST), recipe, lambda line: None).save(tmp_path)
    model.train()
    with (
        pytest.raises(UnsupportedError, match="training mode"),
        compress(model, EncoderMerge(ratio=2.0, lora=str(tmp_path))),
    ):
        pass
    assert model.config._attn_implementation != "kvpleat_encoder"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder with a model and texts to a folder with a LoRA that can be served, and a card."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    tiny("bert").float().save_pretrained(tmp_path / "model")
    row = {"text": " ".join(f"w{i * i % 60}" for i in range(300))}
    (tmp_path / "texts.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    options = ["--steps", "2", "--batch", "2", "--longest", "40", "--rank", "3", "--ratios", "2", "3"]
    paths = ["--model", str(tmp_path / "model"), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["distill", *paths, *options])
    main()
    assert "300 tokens of 1 texts" in capsys.readouterr().out
    assert "4 pieces of texts of 300 tokens" in (out / "README.md").read_text()
    lora = EncoderMerge(ratio=2.0, lora=str(out)).adapter()
    assert lora is not None
    assert lora.rank == 3
    assert len(lora.pairs) == 3 * 6


def test_texts_of_a_file(tmp_path: Path) -> None:
    """Plain and .xz, at most so many characters of a source."""
    rows = [{"source": "a", "text": "x" * 60}, {"source": "a", "text": "y" * 60}, {"source": "a", "text": "z"}]
    rows += [{"text": "no source"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for name in ("t.jsonl", "t.jsonl.xz"):
        assert [t[0] for t in read_texts(tmp_path / name, 100)] == ["x", "y", "n"]
