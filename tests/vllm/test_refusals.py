"""What vLLM says at its start to settings that cannot work beside kvpleat, and what it may leave on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed
from kvpleat.errors import CacheError, UnsupportedError
from kvpleat.vllm import models
from kvpleat.vllm.connector import KvpleatConnector

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # of vLLM's

WINDOW = {"policy": "window", **engines.WINDOW}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"kv_transfer_config": None}, "kv_connector is None", id="no-connector"),
        pytest.param(
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_connector is 'ExampleConnector'.*token positions",
            id="another-connector",
        ),
        pytest.param(
            {"kv_transfer_config": {"kv_connector": engines.CONNECTOR, "kv_role": "kv_both"}},
            "kv_role is 'kv_both'.*kv_producer",
            id="another-role",
        ),
        pytest.param({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8.*--kv-cache-dtype", id="fp8"),
        pytest.param({"block_size": 128}, "block_size=128.*--block-size 16", id="block-size"),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            r"speculative decoding \(ngram\).*--speculative-config",
            id="speculative",
        ),
        pytest.param({"kv_offloading_size": 1.0}, r"kv_offloading_size=1\.0.*--kv-offloading-size", id="offloading"),
        pytest.param({"attention_backend": "TRITON_ATTN"}, "attention_backend=TRITON_ATTN", id="attention-backend"),
        pytest.param({"policy": {"policy": "attention", "ratio": 4}}, "policy='attention' inside vLLM", id="attention"),
        pytest.param({"policy": {"policy": "dms", "gates": "model"}}, "gates='model'", id="borrowed-gates"),
        pytest.param({"policy": None}, "kvpleat=None, so there is no policy", id="no-policy"),
    ],
)
def test_it_is_said_before_anything_is_started(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """In the process of who asked, as the error itself: not among the traces of workers that died."""
    engines.saved(tmp_path / "model", "llama")
    changes = dict(changes)
    given = engines.options("llama", changes.pop("policy", WINDOW), **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):  # noqa: SIM117
        with engines.started(tmp_path / "model", **given):
            pass


@pytest.mark.parametrize("case", ["sliding", "gates", "pool"])
def test_what_is_known_only_when_the_model_is_there(case: str, tmp_path: Path) -> None:
    """Sliding windows of the model's own, gates of another model, and memory for less than one request."""
    message = {
        "sliding": "sliding window of 24 tokens of the model's own",
        "gates": "are for another model",
        "pool": "KV cache has 20 blocks.*Lower --max-model-len to 288",
    }[case]
    model = engines.saved(tmp_path / "model", "mistral", sliding_window=24 if case == "sliding" else None)
    policy = WINDOW
    if case == "gates":
        engines.gates_for(model, tmp_path / "gates", "dms")
        model = engines.saved(tmp_path / "model", "mistral", hidden_size=96)
        policy = {"policy": "dms", "gates": str(tmp_path / "gates")}
    given = engines.options("mistral", policy, **({"num_gpu_blocks_override": 20} if case == "pool" else {}))
    with pytest.raises(ValueError, match=f"(?s){message}"):  # noqa: SIM117
        with engines.started(tmp_path / "model", **given):
            pass


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "no attention layers on this worker.*--pipeline-parallel-size"),
        ({"a.attn": SimpleNamespace(sliding_window=24, has_sink=False)}, r"a\.attn.*24 tokens.*kvpleat\.LLM.*Pass"),
        ({"a.attn": SimpleNamespace(sliding_window=None, has_sink=True)}, r"a\.attn.*sinks.*others.*without kvpleat"),
    ],
    ids=["none", "sliding", "sinks"],
)
def test_layers_that_cannot_be(layers: dict[str, Any], message: str) -> None:
    """The layer by its name, what would come of it, and what to do."""
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        models._refuse(layers)


def test_a_connector_that_an_engine_left_behind_serves_no_other() -> None:
    """vLLM keeps it in the process; the new model's cache would never be filled, and nobody would notice."""
    left = object.__new__(KvpleatConnector)
    left._memory = object()  # type: ignore[assignment]
    with pytest.raises(CacheError, match=r"second KV cache.*answers would be wrong.*new process"):
        left.register_kv_caches({})


def test_prefix_caching_is_off_although_vllm_has_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in one line, and by vLLM's own configuration. The same prompt twice, and one that begins like it."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.kvpleat"), "warning", lambda text, *args: said.append(text % args))
    model, policy, given = engines.make(tmp_path, "llama", "dms")
    with engines.started(tmp_path / "model", **given) as llm:
        assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        (prompt,) = engines.prompts((100,))
        asked = [prompt, prompt, [*prompt[:64], *prompt[10:30]]]
        want = engines.Case(llm, model, policy).want(asked)
        assert [engines.answers(llm, [x])[0] for x in asked] == want
        assert engines.answers(llm, asked) == want
        assert engines.counted(llm, "vllm:prefix_cache_queries") == 0
        engines.assert_empty(llm)
    (line,) = said
    assert "switched prefix caching off" in line
