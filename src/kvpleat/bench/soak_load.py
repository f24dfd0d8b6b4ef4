"""What a soak runs: a model, policies that fit it, pools that are too small, requests by chance."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpleat import accounting
from kvpleat.engine import reckoned, sizes
from kvpleat.engine.core import EngineCore
from kvpleat.engine.jobs import Job
from kvpleat.engine.params import SamplingParams
from kvpleat.hf import models
from kvpleat.hf.families import base_of, decoder_layers, describe
from kvpleat.policies import DMC, DMS, AttentionScore, Fold, Full, GateConfig, Gates, Window
from kvpleat.policies.base import Policy
from kvpleat.policies.learned import Learned

VOCABULARY = 97
LONGEST = 192  # tokens of a sequence
SEATS, STEP_TOKENS = 6, 48
ROOM = 1.3  # pages of a pool, over those that one sequence of the greatest length is expected to need
NAMES = ("full", "window", "attention", "dms", "fold", "dmc", "dmc-of-3")
LEARNED: dict[str, tuple[type[Learned], int, int | None]] = {
    "dms": (DMS, 16, None),
    "fold": (Fold, 8, None),
    "dmc": (DMC, 0, None),
    "dmc-of-3": (DMC, 0, 3),
}


class Served(NamedTuple):
    """A model, and whether its weights are real: policies then follow the gates that come along."""

    model: Any
    real: bool


def random_model(device: torch.device, dtype: torch.dtype) -> Any:
    """A small Llama with random weights and attention of some contrast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16 if device.type == "cpu" else 64,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


def served(name: str | None, device: torch.device, dtype: torch.dtype) -> Served:
    """The model with a name, or a random one."""
    if name is None:
        return Served(random_model(device, dtype), False)
    return Served(models.load(name, device=device, dtype=dtype, progress=False).model, True)


def policy_for(it: Served, name: str) -> Policy:
    """A policy that keeps about half; with the gates that come along, or with random ones."""
    plain: dict[str, Policy] = {
        "full": Full(),
        "window": Window(budget=64),
        "attention": AttentionScore(ratio=2.0, interval=16),
    }
    if name in plain:
        return plain[name]
    cls, delay, look_back = LEARNED[name]
    if it.real:
        return cls(ratio=2.0)
    base = base_of(it.model, describe(it.model))
    sizes_ = base["num_layers"], base["num_kv_heads"], base["hidden_size"]
    gates = Gates(GateConfig(cls.name, *sizes_, delay, look_back, scale=2.0, ratio=2.0))
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gates.outer:
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=chance) * 1.25 / sizes_[2] ** 0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=chance) / 2)
    return cls(gates=gates.requires_grad_(False))


def core_for(it: Served, name: str, room: float | None, seats: int = SEATS, **options: Any) -> EngineCore:
    """An engine. room: pages of its pool, over those that one sequence of LONGEST tokens is expected to need; None:
    as many as can ever be used."""
    policy = policy_for(it, name)
    defaults = {"max_num_seqs": seats, "max_num_batched_tokens": max(STEP_TOKENS, seats), "max_model_len": LONGEST}
    if room is not None:
        facts = describe(it.model).stored_with(policy.fields, policy.bits)
        fixed = sizes.fixed_bytes(policy, facts, seats, STEP_TOKENS, LONGEST)
        limits = sizes.limits(policy, facts, 2**40, seats, STEP_TOKENS, LONGEST)
        alone = max(limits.pages_for(LONGEST), limits.peak_pages(LONGEST)) + limits.streams
        page = accounting.page_bytes(facts.shape) + accounting.PAGE_OVERHEAD
        options["kv_memory"] = sum(fixed.values()) + math.ceil(room * alone) * page
    return EngineCore(it.model, policy, **{**defaults, **options})


@contextmanager
def failing(it: Served, fails: Callable[[], bool]) -> Iterator[None]:
    """Where `fails` says so there is no memory in the middle of a forward (but not in one that a graph replays)."""

    def look(*_: Any) -> None:
        if fails():
            raise torch.OutOfMemoryError("CUDA out of memory, or so a soak says.")

    layers: Any = decoder_layers(describe(it.model))
    handle = layers[len(layers) // 2].mlp.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def poisoned(it: Served) -> Iterator[None]:
    """The embedding of the last token is NaN; not its weight, which may be that of the output too."""
    last = int(it.model.config.vocab_size) - 1

    def poison(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.masked_fill((args[0] == last)[..., None], torch.nan)

    handle = it.model.get_input_embeddings().register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def careless() -> Iterator[None]:
    """Rows are let in with little thought for what they grow to, so that guesses are often wrong."""
    kept, reckoned.AHEAD = reckoned.AHEAD, 4
    try:
        yield
    finally:
        reckoned.AHEAD = kept


def job_by_chance(name: str, chance: random.Random, vocabulary: int) -> Job:
    """A request: any lengths, greedy or drawn, now and then several samples of one prompt, or a prompt with NaN."""
    prompt = [chance.randrange(3, vocabulary - 1) for _ in range(min(120, 1 + int(chance.expovariate(1 / 30))))]
    if chance.random() < 0.02:
        prompt[chance.randrange(len(prompt))] = vocabulary - 1
    drawn = chance.random() < 0.5
    tokens = chance.randrange(80, 160) if chance.random() < 0.3 else 1 + int(chance.expovariate(1 / 20))
    params = SamplingParams(
        n=chance.choice((2, 3)) if drawn and chance.random() < 0.3 else 1,
        temperature=0.8 if drawn else 0.0,
        top_p=0.95 if drawn else 1.0,
        seed=chance.randrange(2**31),
        max_tokens=min(LONGEST - len(prompt), tokens),
        detokenize=False,
        logprobs=2 if chance.random() < 0.1 else None,
    )
    return Job(name, None, tuple(prompt), params, None)


def arrivals(chance: random.Random, mean: float) -> int:
    """How many come in a step: Poisson."""
    count, left = 0, math.exp(-mean)
    product = chance.random()
    while product > left:
        count, product = count + 1, product * chance.random()
    return count
