"""Quantised weights: vLLM's matter, and none of the cache's. Run by `make test-vllm`; -s shows the figures."""

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)  # read when vLLM is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and of what it imports
    vllm: Any = pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvpleat.vllm.settings import CONNECTOR  # noqa: E402
from tests import models  # noqa: E402

SIZES = (5, 130, 77, 200, 33)
Answer = tuple[list[int], list[float]]  # tokens, their log probabilities


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose linear layers are W8A8 in the format of compressed-tensors."""
    folder = tmp_path_factory.mktemp("int8")
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=128, max_position_embeddings=2048, head_dim=32, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": bits | {"strategy": "channel", "dynamic": False},
        "input_activations": bits | {"strategy": "token", "dynamic": True},
    }
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def answers(folder: Path, policy: dict[str, Any] | None) -> list[Answer]:
    """What vLLM says to five prompts: by its own cache, or under a policy."""
    given: dict[str, Any] = {}
    if policy is not None:
        given["hf_overrides"] = {"architectures": ["KvpleatLlamaForCausalLM"], "kvpleat": policy}
        given["kv_transfer_config"] = {"kv_connector": CONNECTOR, "kv_role": "kv_both"}
    asked = [{"prompt_token_ids": models.prompt(size, seed)[0].tolist()} for seed, size in enumerate(SIZES)]
    params = vllm.SamplingParams(temperature=0, max_tokens=40, detokenize=False, ignore_eos=True, logprobs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, block_size=32,
            max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=False, **given,
        )  # fmt: skip
        kinds = {type(getattr(m, "quant_method", None)).__name__ for m in model_of(llm).modules()}
        assert "CompressedTensorsLinearMethod" in kinds
        done = [x.outputs[0] for x in llm.generate(asked, params, use_tqdm=False)]
        llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [
        (list(x.token_ids), [step[t].logprob for t, step in zip(x.token_ids, x.logprobs, strict=True)]) for x in done
    ]


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def common(a: Answer, b: Answer) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a[0], b[0], strict=True)) if x != y), len(a[0]))


def test_a_window_that_evicts_nothing_says_what_dense_says(int8: Path) -> None:
    """Up to rounding: activations are rounded to 8 bits, so the last digits of float32 can become the eighth bit."""
    dense, kept = answers(int8, None), answers(int8, {"policy": "window", "budget": 500})
    same = [common(a, b) for a, b in zip(dense, kept, strict=True)]
    gaps = [
        max(abs(x - y) for x, y in zip(a[1][:n], b[1][:n], strict=True))
        for a, b, n in zip(dense, kept, same, strict=True)
    ]
    print(f"\nequal tokens of 40: {same}; largest difference of log probabilities until then: {max(gaps):.4f}")
    assert sum(same) >= 0.6 * 40 * len(SIZES)
    assert max(gaps) < 0.05
    evicted = answers(int8, {"policy": "window", "budget": 48})
    assert sum(common(a, b) for a, b in zip(dense, evicted, strict=True)) < sum(same)
