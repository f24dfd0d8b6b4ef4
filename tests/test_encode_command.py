"""`kvpleat encode`: a vector for each line, in every format, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from kvpleat import compress, policies
from kvpleat.cli import app
from kvpleat.hf.embed import embed, tokenize
from kvpleat.hf.models import load_encoder
from kvpleat.policies.lora import LoraWeights
from tests import encoders

LINES = ["w1 w2 w3", "", "w9 w8 w7 w6 w5 w4 w3 w2 w1 w0 " * 4, "w5"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encoders.save(tmp_path / "bert")


def encode(folder: Path, *arguments: str, stdin: str = "\n".join(LINES) + "\n") -> Result:
    fixed = ["encode", "--model", str(folder), "--device", "cpu"]
    return CliRunner().invoke(app, [*fixed, *arguments], input=stdin, catch_exceptions=False)


def vectors(result: Result) -> torch.Tensor:
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["line"] for one in found] == list(range(len(found)))
    return torch.tensor([one["embedding"] for one in found])


def known(folder: Path, pooling: str = "mean", ratio: float = 1.0) -> torch.Tensor:
    """The lines' vectors, without the command."""
    loaded = load_encoder(str(folder), device="cpu", progress=False)
    with compress(loaded.model, policies.EncoderMerge(ratio=ratio)):
        return embed(loaded, tokenize(loaded, LINES), pooling=pooling)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_full_model_as_json_lines(folder: Path, pooling: str) -> None:
    got = vectors(encode(folder, "--policy", "full", "--pooling", pooling))
    torch.testing.assert_close(got, known(folder, pooling))


@pytest.mark.parametrize("batch", ["1", "3"])
def test_merged_tokens(folder: Path, batch: str) -> None:
    """The third line has 42 tokens; the others are too short to shrink."""
    got = vectors(encode(folder, "--ratio", "2.5", "--batch", batch))
    torch.testing.assert_close(got, known(folder, ratio=2.5))
    full = known(folder)
    torch.testing.assert_close(got[[0, 1, 3]], full[[0, 1, 3]])
    assert not torch.allclose(got[2], full[2], atol=1e-3)
    torch.testing.assert_close(vectors(encode(folder, "--ratio", "1")), full)


def test_a_lora_from_a_folder(folder: Path, tmp_path: Path) -> None:
    name = "encoder.layer.1.output.dense"
    (tmp_path / "lora").mkdir()
    up = torch.cat([torch.ones(16, 2), torch.zeros(16, 2)])
    LoraWeights(2, 2.0, {name: (torch.ones(2, 48), up)}).save(tmp_path / "lora")
    got = vectors(encode(folder, "--ratio", "2.5", "--lora", str(tmp_path / "lora")))
    loaded = load_encoder(str(folder), device="cpu", progress=False)
    with torch.no_grad():
        loaded.model.get_submodule(name).weight[:16] += 2.0
    short = [0, 1, 3]  # lines that nothing merges in
    assert not torch.allclose(got[short], known(folder)[short], atol=1e-3)
    torch.testing.assert_close(got[short], embed(loaded, tokenize(loaded, LINES))[short])


def test_files_by_their_ending(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_bytes("\r\n".join(LINES).encode())  # no newline at the end, and those of Windows
    wanted = torch.nn.functional.normalize(known(folder), dim=1)
    for ending in (".npy", ".safetensors", ".jsonl"):
        out = tmp_path / f"vectors{ending}"
        result = encode(folder, str(texts), "--policy", "full", "--normalize", "--out", str(out), stdin="")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        assert "4 texts" in result.stderr
        if ending == ".npy":
            got = torch.from_numpy(np.load(out))
        elif ending == ".safetensors":
            got = load_file(out)["embeddings"]
        else:
            got = torch.tensor([json.loads(line)["embedding"] for line in out.read_text().splitlines()])
        torch.testing.assert_close(got, wanted)
    assert not list(tmp_path.glob("*.tmp"))


def test_long_texts_are_cut_and_it_says_so(folder: Path) -> None:
    result = encode(folder, "--policy", "full", stdin="w1 " * 100 + "\nw2\n")
    assert vectors(result).shape == (2, 32)
    assert "1 of 2 texts have more than 64 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "window"], "--policy window: there is no such policy for encoders. Known: merge, full."),
        (["--policy", "full", "--ratio", "2"], "--policy full merges nothing"),
        (["--ratio", "2", "--coverage", "0.9"], "both say how much to merge"),
        (["--ratio", "0.5"], "0.5"),
        (["--policy", "full", "--lora", "x"], "so --lora means nothing"),
        (["--lora", "/nowhere"], "/nowhere"),
        (["--pooling", "max"], "--pooling max: there are mean and cls."),
        (["--out", "vectors.txt"], "it is none of .jsonl, .npy, .safetensors"),
        (["nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be(folder: Path, arguments: list[str], message: str) -> None:
    result = encode(folder, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_nothing_to_encode(folder: Path, tmp_path: Path) -> None:
    assert "stdin is empty" in encode(folder, stdin="").stderr
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    assert "cannot be read as UTF-8" in encode(folder, str(tmp_path / "latin")).stderr


def test_an_output_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    result = encode(folder, "--policy", "full", "--out", str(tmp_path / "nowhere" / "x.npy"))
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
