"""The benchmark of vLLM's server, up to the server: commands, models, gates for dummy weights, figures.

Needs no vLLM.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvpleat.bench import vllm_serve, vllm_server
from kvpleat.bench.engine_models import profile
from kvpleat.policies import Gates
from kvpleat.vllm.settings import ARCHITECTURES, Settings, base_of

ROWS = 8192  # tokens of the rows that gates are made for
EXTRA = ["--max-num-seqs", "256"]


def flags(arm: str, shape: str = "llama-3-8b") -> dict[str, str | None]:
    """Of an arm's command, by name; None: one that stands alone."""
    words = vllm_serve.command(arm, Path("/model"), shape, 8100, 4096, EXTRA)
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == EXTRA, "what a user adds comes last, so that it wins"
    following = [*words[1:], "--"]
    return {
        word: None if after.startswith("--") else after
        for word, after in zip(words, following, strict=True)
        if word.startswith("--")
    }


def test_arms_differ_in_their_cache_and_in_nothing_else() -> None:
    """Or figures beside each other would not be about it."""
    dense, fp8, ours = (flags(arm) for arm in vllm_serve.ARMS)
    assert dense["--model"] == "/model"
    assert (dense["--load-format"], dense["--block-size"], dense["--max-model-len"]) == ("dummy", "16", "4096")
    assert "--no-enable-prefix-caching" in dense
    assert fp8 == dense | {"--kv-cache-dtype": "fp8"}
    assert ours.keys() - dense.keys() == {"--hf-overrides", "--kv-transfer-config"}
    assert {name: value for name, value in ours.items() if name in dense} == dense
    asked = json.loads(str(ours["--hf-overrides"]))
    assert asked["architectures"] == ["KvpleatLlamaForCausalLM"]
    assert Settings.parse(asked["kvpleat"]).policy is not None
    wire = json.loads(str(ours["--kv-transfer-config"]))
    assert wire == {"kv_connector": "KvpleatConnector", "kv_role": "kv_producer"}


@pytest.mark.parametrize(("shape", "dtype"), [("tiny", "float32"), ("llama-3-8b", "bfloat16")])
def test_dtypes(shape: str, dtype: str) -> None:
    """Those that vLLM has kernels for: in 32 bits on CPUs, in 16 on GPUs."""
    assert flags("dense", shape)["--dtype"] == dtype


@pytest.mark.parametrize("shape", vllm_serve.SHAPES)
def test_the_folder_is_a_model_without_weights(shape: str, tmp_path: Path) -> None:
    """Of a class that kvpleat serves, and with a tokenizer for which text and tokens are the same numbers."""
    vllm_serve.write_model(shape, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures[0] in ARCHITECTURES
    for name, value in vllm_serve.SHAPES[shape].items():
        if name != "rope_theta":  # transformers keeps it elsewhere
            assert getattr(config, name) == value
    assert config.max_position_embeddings == vllm_serve.POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    numbers = [5, 29_999, 17, 2, 100, 11_011]
    assert tokenizer(" ".join(map(str, numbers)))["input_ids"] == numbers
    assert tokenizer.decode(numbers) == "5 29999 17 2 100 11011"
    assert tokenizer.all_special_ids == [1, 0], "vLLM draws prompts of all others"
    longest = max(map(len, tokenizer.get_vocab()))
    assert len("29999 ") <= longest, "vLLM refuses a text of more characters than so many for each token"
    assert len(tokenizer) <= config.vocab_size
    assert not list(tmp_path.glob("*.safetensors"))


# ---- gates for dummy weights


def dummy(*shape: int, seed: int = 0) -> Tensor:
    """Weights as vLLM draws them for `--load-format dummy`."""
    return torch.empty(shape).uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(seed))


def gates_for(shape: str, ratio: float) -> tuple[Gates, Tensor]:
    """The gates, and the shares [L, H] that each head is meant to keep."""
    sizes = vllm_serve.SHAPES[shape]
    stays = profile(ratio, ROWS, sizes["num_hidden_layers"], sizes["num_key_value_heads"])
    return vllm_serve.gates_for_dummy_weights(shape, ratio, ROWS), stays.keep.mean(0)


def kept(gates: Gates, layer: int, hidden: Tensor) -> Tensor:
    """[H]: shares of tokens [T, C] that are not marked: a mark is a number above 0."""
    return (gates(layer, hidden[None])[0, 0] <= 0).float().mean(-1)


@pytest.mark.parametrize(("shape", "ratio"), [("llama-3-8b", 4.0), ("llama-3-8b", 8.0), ("qwen3-8b", 4.0)])
def test_gates_mark_as_many_as_they_are_meant_to(shape: str, ratio: float) -> None:
    """In every head: the embeddings of random tokens, normalised, with weights of the norm that are dummies too."""
    gates, wanted = gates_for(shape, ratio)
    tokens = 2000
    embedded = dummy(tokens, gates.config.hidden_size, seed=1)
    normalised = embedded * embedded.square().mean(-1, keepdim=True).rsqrt()
    got = torch.stack([
        kept(gates, layer, normalised * dummy(gates.config.hidden_size, seed=2 + layer)) for layer in range(len(wanted))
    ])  # fmt: skip
    assert wanted.max() > 3 * wanted.mean(), "heads are to be uneven"
    assert float(got.mean() / wanted.mean()) == pytest.approx(1, abs=0.01)
    assert float((got - wanted).abs().max()) < 0.05
    reached = ROWS / (gates.config.delay + 1 + (ROWS - gates.config.delay - 1) * float(got.mean()))
    assert reached == pytest.approx(ratio, rel=0.03)


def test_gates_mark_as_many_in_a_whole_model(tmp_path: Path) -> None:
    """Transformers' own, read from the folder, with dummy weights: what attention and MLPs add is next to nothing, and
    the config's eps is small enough beside the mean square of such embeddings, 3e-7."""
    vllm_serve.write_model("tiny", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    gates, wanted = gates_for("tiny", 4.0)
    assert gates.config.misfit(base_of(config)) == ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(dummy(*parameter.shape, seed=seed))
    got: dict[int, Tensor] = {}

    def listen(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            got[layer] = kept(gates, layer, kwargs["hidden_states"][0])

        return hook

    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(listen(layer), with_kwargs=True)
    with torch.inference_mode():
        model(torch.randint(vllm_serve.WORDS, (1, 2000), generator=torch.Generator().manual_seed(0)))
    found = torch.stack([got[layer] for layer in range(len(wanted))])
    assert float((found - wanted).abs().max()) < 0.05
    assert float(found.mean() / wanted.mean()) == pytest.approx(1, abs=0.1)


# ---- figures


METRICS = """\
# HELP kvpleat_compression_ratio Full bytes over allocated ones.
# TYPE kvpleat_compression_ratio gauge
kvpleat_compression_ratio{engine="0",model_name="m"} 3.5
kvpleat_allocated_bytes{engine="0"} 1e+06
kvpleat_allocated_bytes{engine="1"} 5e+05
vllm:num_preemptions_total{engine="0",model_name="m"} 7.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
python_info 1.0
"""


def test_metrics_are_summed_over_engines_and_others_are_left_out() -> None:
    """Names that begin alike are not taken for each other."""
    assert vllm_server.counted(METRICS) == {
        "kvpleat_compression_ratio": 3.5, "kvpleat_allocated_bytes": 1.5e6, "vllm:num_preemptions_total": 7.0,
    }  # fmt: skip
    assert vllm_server.counted("") == {}


def test_lines_of_the_table() -> None:
    """Milliseconds of first tokens are shown as seconds; a case that was cut has no figures."""
    record = {"arm": "dense", "prompt": 8192, "answer": 256, "clients": 8}
    figures = {
        "output_throughput": 492.9, "p50_ttft_ms": 1240, "p99_ttft_ms": 2500, "p50_tpot_ms": 11.3, "p99_tpot_ms": 12.0,
        "duration": 4.2, "preempted": 3.0, "failed": 0,
    }  # fmt: skip
    said = " ".join(vllm_serve.line(record | figures).split())
    assert said == (
        "dense 8192 + 256 tokens, 8 at once: 492.9 tokens/s, TTFT p50 1.24 s, p99 2.50 s, TPOT p50 11.30 ms, "
        "p99 12.00 ms, 4.2 s, 3 preempted"
    )
    failing = figures | {"failed": 2, "kvpleat_compression_ratio": 3.979}
    assert vllm_serve.line(record | failing).endswith("3 preempted, ratio 3.98, 2 FAILED")
    assert vllm_serve.line(record | {"cut": True}).endswith("8 at once: out of time")
    short = figures | {"missing_tokens": 71}
    assert vllm_serve.line(record | short).endswith("3 preempted, 71 tokens of answers MISSING")


def test_metrics_are_of_the_moment_with_most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end most requests are gone."""
    told = iter([{"kvpleat_full_bytes": 5.0, "x": 1}, {"kvpleat_full_bytes": 9.0, "x": 2}, {}])
    monkeypatch.setattr(vllm_server, "LOOKS", 0.001)
    monkeypatch.setattr(vllm_server, "metrics", lambda port: next(told, {"kvpleat_full_bytes": 3.0, "x": 3}))
    with vllm_server.watched(1) as fullest:
        time.sleep(0.2)
    assert next(told, None) is None, "it looked more than three times"
    assert fullest == {"kvpleat_full_bytes": 9.0, "x": 2}


# ---- what goes wrong


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    """The end of its log, not only that it is gone."""
    fails = [sys.executable, "-c", "raise SystemExit('no such device')"]
    server = vllm_server.Server(fails, 1, tmp_path / "log.txt")
    try:
        with pytest.raises(RuntimeError, match="did not start:\nno such device"):
            server.ready(60)
        assert vllm_server.metrics(1) == {}, "nobody listens there"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm", "sparse"], "invalid choice: 'sparse'"),
        ([], "--arm"),
        (["--arm", "dense", "--shape", "llama-4"], "invalid choice: 'llama-4'"),
        (["--arm", "dense", "--cases", "8192x256"], "'8192x256' is no case. Write PROMPTxANSWERxCLIENTS"),
        (["--arm", "dense", "--cases", "8192x256x8,"], "'' is no case"),
        (["--arm", "dense", "--cases", "8192x0x8"], "'8192x0x8' is no case"),
        (["--arm", "dense", "--cases", "40900x256x8"], "'40900x256x8': prompt and answer may have 40896 tokens"),
        (["--arm", "kvpleat", "--ratio", "1"], "'1' is no ratio above 1"),
        (["--arm", "kvpleat", "--ratio", "four"], "'four' is no ratio above 1"),
    ],
)
def test_what_cannot_be_asked_for(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit, match="2"):
        vllm_serve.main(words)
    assert said in capsys.readouterr().err
