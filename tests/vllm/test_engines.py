"""The same tokens in pools that are too small, on two workers, compiled, in another process, and with real weights.

Each test starts an engine of its own, and ends it.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed

import torch

from kvpleat.hf import smollm2
from kvpleat.policies import registry

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # of vLLM's


@pytest.mark.parametrize(
    ("family", "method", "overlap"),
    [("qwen3", "fold", False), ("gpt2", "dms", False), ("llama", "window", False), ("llama", "dms", True),
     ("qwen3", "fold", True)],
)  # fmt: skip
def test_preempted_requests_say_the_same(
    family: str, method: str, overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool for one request of the maximum length and little more, with eight that want to run, and gates that promise
    more than they keep: too many are let in. overlap: the scheduler is a step ahead, as it is on a GPU."""
    if overlap:
        engines.overlap(monkeypatch)
    options = {"num_gpu_blocks_override": 28, "async_scheduling": overlap}
    model, policy, options = engines.make(tmp_path, family, method, -2.0, **options)
    with engines.started(tmp_path / "model", **options) as llm:
        assert (type(engines.scheduler(llm)).__name__ == "AsyncScheduler") == overlap
        asked = engines.prompts((20, 30, 100, 25, 40, 110, 33, 15))  # short ones are let in, and grow
        before = engines.counted(llm, "vllm:num_preemptions")
        assert engines.answers(llm, asked, engines.told(96)) == engines.Case(llm, model, policy).want(asked, 96)
        assert engines.counted(llm, "vllm:num_preemptions") - before > 0, "nobody was preempted: a weak test"
        engines.assert_empty(llm)


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        pytest.param("llama", "fold", {"tensor_parallel_size": 2}, id="llama-fold-tp2"),
        pytest.param("gpt2", "dms", {"tensor_parallel_size": 2}, id="gpt2-dms-tp2"),
        # vLLM's runner for CPUs learns what goes from stage to stage in a rehearsal, which it leaves out if eager.
        pytest.param("llama", "dmc", {"pipeline_parallel_size": 2, "enforce_eager": False}, id="llama-dmc-pp2"),
        pytest.param("qwen3", "fold", {"enforce_eager": False}, id="qwen3-fold-compiled"),
        pytest.param("llama", "dms", {}, id="llama-dms-own-process"),
    ],
)
def test_other_ways_to_run(
    family: str, method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that share heads or layers; compiled; an engine in a process of its own."""
    if not options:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if len(set(options) & {"tensor_parallel_size", "pipeline_parallel_size"}):
        options = options | {"distributed_executor_backend": "mp"}
    monkeypatch.setenv("PYTHONPATH", str(Path(engines.__file__).parents[2] / "src"), prepend=os.pathsep)
    model, policy, given = engines.make(tmp_path, family, method, num_gpu_blocks_override=40, **options)
    with engines.started(tmp_path / "model", **given) as llm:
        asked = engines.prompts((1, 17, 64, 130, 90, 100))
        assert engines.answers(llm, asked) == engines.Case(llm, model, policy).want(asked)
        assert engines.answers(llm, asked[::-1]) == engines.Case(llm, model, policy).want(asked[::-1])


@pytest.fixture(scope="module")
def smol() -> Path:
    """Real weights, in float32."""
    if not smollm2.target_folder().is_dir() and smollm2.package_folder() is None:
        pytest.skip(f"SmolLM2 is not installed: {smollm2.INSTALL}")
    return smollm2.converted(progress=False)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dms", "fold", "dmc"])
def test_smollm2_with_its_shipped_gates_and_their_lora(name: str, smol: Path) -> None:
    """At ratio 4, past the gates' delay of 256 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (Path(__file__).parents[2] / "examples" / "kennedy-1961.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(smol)(text)["input_ids"]
    asked = [tokens[:340], tokens[500:610], tokens[900:915]]
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    want = engines.by_transformers(model, registry()[name](ratio=4.0), asked)
    del model
    given = engines.options("llama", {"policy": name, "ratio": 4}, max_num_batched_tokens=256)
    with engines.started(smol, **given) as llm:
        assert engines.answers(llm, asked) == want
        engines.assert_empty(llm)
