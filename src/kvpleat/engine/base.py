"""What `LLM` and `AsyncLLM` have in common: a model is found and an engine made for it, and requests are read."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvpleat.engine.jobs import Core, Desk, Job
from kvpleat.engine.params import SamplingParams
from kvpleat.engine.prompts import Prompt, read
from kvpleat.errors import OptionError
from kvpleat.hf import models
from kvpleat.policies import Full, Policy


def make_core(model: nn.Module, policy: Policy, **options: Any) -> Core:
    """The core of an engine."""
    from kvpleat.engine.core import EngineCore

    return EngineCore(model, policy, **options)


class Engine:
    """A model with a policy, ready for requests. The names of arguments are vLLM's where vLLM has them.

    Args:
        model: a name that `kvpleat.hf.models.load` knows (a folder, a hub name, smollm2-135m), what it returned, or a
            model of transformers in eval mode. It is the engine's until `close`, which leaves it as it was.
        policy: what is kept of the KV memory, with bits=None; None: Full().
        tokenizer: of transformers; None: the one that was loaded with the model.
        kv_memory: bytes for keys, values and all tensors that say where they are, as a number or as "20GiB"; never
            exceeded. Weights, and what a step computes with, come on top. None: four fifths of a GPU's free memory, a
            quarter of the machine's on a CPU, and no more than max_num_seqs sequences of max_model_len could use.
        max_num_seqs: requests that run at a time. Others wait.
        max_num_batched_tokens: tokens of one step, of prompts and of answers together.
        max_model_len: longest sequence, prompt and answer; None: what the model knows.
        max_logprobs: most log probabilities a token that a request may ask for; -1: any number.
        dtype: of the weights, if `model` is a name; None: that of the checkpoint.
        device: likewise; None: the first CUDA GPU if there is one, else the CPU.
        trust_remote_code: likewise: run Python code that comes with the model.
        seed: of requests that bring none: the same requests in the same order then give the same tokens.
        enforce_eager: no CUDA graphs. Slower, and easier to look into.
        compile: let torch.compile fuse what layers do around attention: up to a minute at the start, faster steps on a
            GPU.
        page_size: entries of a page, 16 (less waste) or 32.
        enable_prefix_caching: keep what was computed while nobody needs its memory: a request that begins with the
            same tokens starts from there.

    Raises:
        ModelError: the model cannot be loaded.
        OptionError: arguments that do not go together, or a kv_memory in which nothing could run.
        UnsupportedError: the engine does not serve this model or policy.
        AttachError: the model has a policy attached already.
        OutOfMemoryError: the device has too little memory for the cache, or for the graphs of steps.
    """

    def __init__(
        self,
        model: str | Path | models.LoadedModel | nn.Module,
        policy: Policy | None = None,
        *,
        tokenizer: Any = None,
        kv_memory: int | str | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        max_logprobs: int = 20,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        enforce_eager: bool = False,
        compile: bool = False,
        page_size: int = 16,
        enable_prefix_caching: bool = True,
    ) -> None:
        loaded = _load(model, dtype, device, trust_remote_code)
        if isinstance(loaded, models.LoadedModel):
            loaded, tokenizer = loaded.model, loaded.tokenizer if tokenizer is None else tokenizer
        self.tokenizer = tokenizer
        core = make_core(
            loaded,
            Full() if policy is None else policy,
            kv_memory=kv_memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_logprobs=max_logprobs,
            seed=seed,
            enforce_eager=enforce_eager,
            compile=compile,
            page_size=page_size,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._desk = Desk(core)
        self._encoder = tokenizer  # what prompts become tokens with
        self._numbers = itertools.count()  # of requests
        self._start()

    def _start(self) -> None:
        """What else an engine needs before its first request."""

    def _job(self, request_id: str, prompt: Prompt, params: SamplingParams | None, special: bool = True) -> Job:
        """A request that has been read.

        Args:
            request_id: of the request.
            prompt: text or tokens.
            params: None: the defaults.
            special: whether the tokenizer adds the tokens that it puts around a text.
        """
        params = checked(params)
        if params.detokenize and self.tokenizer is None:
            raise OptionError(
                "There is no tokenizer, so tokens cannot become text. Pass tokenizer= to the engine, or "
                "SamplingParams(detokenize=False)."
            )
        text, tokens = read(prompt, self._encoder, special)
        return Job(request_id, text, tokens, params, self.tokenizer)


def checked(params: Any) -> SamplingParams:
    """Sampling parameters, the defaults for None."""
    if params is not None and not isinstance(params, SamplingParams):
        raise OptionError(f"sampling_params={params!r} does not say how to sample. Pass SamplingParams(...).")
    return params or SamplingParams()


def _load(
    model: str | Path | models.LoadedModel | nn.Module,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    trust_remote_code: bool,
) -> models.LoadedModel | nn.Module:
    if isinstance(model, str | Path):
        return models.load(str(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=False)
    if dtype is not None or device is not None:
        raise OptionError(
            f"dtype={dtype} and device={device} say how to load a model, and this one is loaded. Leave them out, or "
            "pass its name."
        )
    return model
