"""vLLM on the CPU with kvpleat in it, over tiny models: what tests/vllm starts, asks and looks into.

Importing this skips a module's tests where vLLM is not installed. See `make test-vllm`.
"""

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Read when vLLM is imported. The engine runs in this process, so that tests can look into it.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and of what it imports
    pytest.importorskip("vllm")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.v1.core.block_pool import BlockPool as BlockPool

    import kvpleat.vllm.connector
    import kvpleat.vllm.models  # most of vLLM is imported by them
    from kvpleat.vllm.plugin import register

    register()  # vLLM does it by itself where kvpleat is installed, and in its other processes

import torch
from torch import Tensor

from kvpleat.hf import families
from kvpleat.kernels.device_pool import DevicePool, check_integrity
from kvpleat.policies import GateConfig, Gates, registry
from kvpleat.vllm.memory import Memory
from kvpleat.vllm.settings import ARCHITECTURES, CONNECTOR, PREFIX, ROLE
from tests import models, reference

Tokens = list[int]
PAGE = 16
CHUNK = 64  # tokens of a step, so that prompts above it come in chunks
DELAY = 24
WINDOW = {"budget": 40, "sinks": 2}
BROKEN = 2  # a token whose embedding is NaN, in the Llama; models.prompt never draws it
CLASSES = {family: PREFIX + name for name, family in ARCHITECTURES.items()}


def saved(folder: Path, family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model in float32, saved where vLLM finds it. Two heads at least for two workers: GPT-2 has four."""
    changes = {"n_embd": 64, "n_head": 4} | changes if family == "gpt2" else changes
    model = models.tiny(family, seed, torch.float32, **changes)
    model.save_pretrained(folder)
    return model


def gates_for(
    model: Any, folder: Path, method: str, delay: int = DELAY, spread: float = 0.05, bias: float = 0.0, **options: Any
) -> Gates:
    """Random gates that mark about half of the tokens, more or fewer by `bias`, saved to a folder."""
    family = families.describe(model)
    base = families.base_of(model, family)
    gates = Gates(
        GateConfig(
            method=method, num_layers=family.shape.num_layers, num_kv_heads=family.shape.num_kv_heads,
            hidden_size=base["hidden_size"], delay=0 if method == "dmc" else delay, base=base,
            **{"ratio": 2.0, "sinks": 1} | options,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for name, parameter in gates.named_parameters():
        drawn = torch.empty(parameter.shape).normal_(0, spread, generator=generator)
        parameter.data.copy_(drawn + (bias if name.endswith("bias") else 0.0))
    gates.save_pretrained(folder)
    return Gates.from_pretrained(str(folder))  # as they were rounded


def options(family: str, policy: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What vLLM is started with."""
    return {
        "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "block_size": PAGE, "seed": 0,
        "max_model_len": 384, "max_num_seqs": 8, "max_num_batched_tokens": CHUNK, "num_gpu_blocks_override": 160,
        "disable_log_stats": False, "async_scheduling": False,
        "hf_overrides": {"architectures": [CLASSES[family]], "kvpleat": policy},
        "kv_transfer_config": {"kv_connector": CONNECTOR, "kv_role": ROLE},
        **more,
    }  # fmt: skip


@contextlib.contextmanager
def started(folder: Path, **given: Any) -> Iterator[Any]:
    """A vLLM. In the end it is empty and whole, and what it took of this process is given back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm: Any = None
        try:
            llm = LLM(str(folder), **given)
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            ensure_kv_transfer_shutdown()  # an engine that failed to start has left its connector
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM schedule a step ahead of what workers have said, as it does on a GPU: its CPU platform never does."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def leave_it_on(config: Any) -> None:
        asked = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = asked

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(leave_it_on))


def told(tokens: int = 24, **more: Any) -> Any:
    """Greedy, unless more is said."""
    given = {"temperature": 0, "max_tokens": tokens, "detokenize": False, "ignore_eos": True} | more
    return SamplingParams(**given)


def answers(llm: Any, prompts: Sequence[Tokens], params: Any = None) -> list[Tokens]:
    """What vLLM says to each prompt."""
    asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    done = llm.generate(asked, params or told(), use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in done]


def prompts(sizes: Sequence[int], seed: int = 0) -> list[Tokens]:
    """Random ones of these sizes."""
    return [models.prompt(size, seed * 100 + i)[0].tolist() for i, size in enumerate(sizes)]


# ---- what it must say


def by_transformers(model: Any, policy: Any, asked: Sequence[Tokens], tokens: int = 24) -> list[Tokens]:
    """The same from transformers, one prompt after the other, with kvpleat attached; policy None: without."""
    attached: Any = contextlib.nullcontext() if policy is None else kvpleat.compress(model, policy)
    with torch.inference_mode(), attached:
        return [_greedy(model, prompt, tokens) for prompt in asked]


def _greedy(model: Any, prompt: Tokens, tokens: int) -> Tokens:
    given = torch.tensor([prompt])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return list(out[0, len(prompt) :].tolist())


def by_mask(model: Any, budget: int, sinks: int, asked: Sequence[Tokens], tokens: int = 24) -> list[Tokens]:
    """The same under a window that slides by one token, from full forwards without kvpleat and without a cache."""
    said = []
    for prompt in asked:
        text = list(prompt)
        for _ in range(tokens):
            logits = reference.forward(model, torch.tensor(text), window(len(text), budget, sinks))
            text.append(int(logits[-1].argmax()))
        said.append(text[len(prompt) :])
    return said


def window(length: int, budget: int, sinks: int) -> Tensor:
    """[T, T] bool: the first `sinks` entries and the newest, `budget` together."""
    at = torch.arange(length)
    return (at[:, None] - at < budget - sinks) | (at < sinks)


def policy_of(gates: Gates) -> Any:
    """The policy with these gates."""
    return registry()[gates.config.method](gates=gates)


# ---- what it looks like inside


def memory_of(llm: Any) -> Memory:
    """The worker's cache."""
    (found,) = llm.apply_model(lambda m: next(x.impl.memory for x in m.modules() if hasattr(x, "kv_cache_torch_dtype")))
    return found


def rest(llm: Any) -> DevicePool:
    """The pool after a step that has nothing to compute: of rows that ended nothing is left."""
    llm.llm_engine.engine_core.engine_core.step()
    pool = memory_of(llm).pool
    check_integrity(pool)
    return pool


def assert_empty(llm: Any) -> None:
    """Nobody is there: all blocks and all pages are free."""
    pool, blocks = rest(llm), block_pool(llm)
    assert int(pool.free_count) == pool.holders.numel()
    assert not bool(pool.lengths.any())
    assert not bool(pool.failed.any())
    assert blocks.get_num_free_blocks() == blocks.num_gpu_blocks - 1, "the first block is vLLM's own"


def scheduler(llm: Any) -> Any:
    """vLLM's scheduler, in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def block_pool(llm: Any) -> Any:
    """vLLM's pool of blocks."""
    return scheduler(llm).kv_cache_manager.block_pool


def counted(llm: Any, name: str) -> int:
    """A counter of vLLM's, over all engines of this process."""
    return sum(int(x.value) for x in llm.get_metrics() if x.name == name)


# ---- both together


@dataclass
class Case:
    """A model as transformers and as vLLM have it."""

    llm: Any
    model: Any
    policy: Any

    def want(self, asked: Sequence[Tokens], tokens: int = 24) -> list[Tokens]:
        """What must be said."""
        if self.policy is None:
            return by_mask(self.model, *WINDOW.values(), asked, tokens)
        return by_transformers(self.model, self.policy, asked, tokens)


def make(folder: Path, family: str, method: str, bias: float = 0.0, **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A model, the policy for transformers, and what vLLM is started with. bias: see `gates_for`;
    gates with one promise more than they keep."""
    model = saved(folder / "model", family)
    if family == "llama":
        model.model.embed_tokens.weight.data[BROKEN] = float("nan")
        model.lm_head.weight.data[BROKEN] = 0
        model.save_pretrained(folder / "model")
    policy, asked = None, {"policy": "window", **WINDOW}
    if method != "window":
        policy = policy_of(gates_for(model, folder / "gates", method, bias=bias, ratio=2.0 if bias == 0 else 16.0))
        asked = {"policy": method, "gates": str(folder / "gates")}
    return model, policy, options(family, asked, **more)
