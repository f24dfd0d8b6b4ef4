"""Models of known shapes with random weights, and gates for them that keep in each head what trained gates keep.

Nothing is learned here: speed depends on shapes and on which entries stay. Which ones do is drawn by chance, as many in
each head as gates that come with kvpleat were measured to keep (`engine_kept`), scaled to the ratio that is wanted.
"""

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvpleat.bench import corpus
from kvpleat.hf.families import attention_modules, describe
from kvpleat.policies import DMC, DMS, Full, GateConfig, Gates
from kvpleat.policies.base import Policy

POSITIONS = 132_096  # 128k and an answer
_SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def _llama(layers: int, hidden: int, heads: int, kv: int, inter: int, vocab: int, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inter, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=POSITIONS,
        **_SPECIAL,
    )  # fmt: skip


def _gpt2(layers: int, hidden: int, heads: int, vocab: int = 50257, positions: int = 1024) -> GPT2Config:
    return GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=heads, vocab_size=vocab, n_positions=positions, **_SPECIAL
    )  # fmt: skip


SHAPES: dict[str, Any] = {
    "llama-3-8b": _llama(32, 4096, 32, 8, 14336, 128256),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, tied=True),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
}
TINY: dict[str, Any] = {"llama": _llama(3, 48, 6, 2, 64, 97), "gpt2": _gpt2(3, 48, 3, 97)}


def random_model(name: str, device: torch.device, tiny: bool = False) -> Any:
    """A model of this shape, made on the device: bfloat16 on a GPU, float32 on a CPU. tiny: one of the same family."""
    config = copy.deepcopy(TINY[name.split("-")[0]] if tiny else SHAPES[name])
    config.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with device:
            model = (GPT2LMHeadModel if config.model_type == "gpt2" else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Profile:
    """What stays.

    Args:
        delay: tokens of which all stay (W, and the one that is fed).
        keep: [documents, L, H] share of the tokens before them that stay; rows are like one document or another.
    """

    delay: int
    keep: Tensor

    def lengths(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Entries [r, L, H] of rows that have seen tokens [r]; rows [r]: their numbers, which say like what document
        they are."""
        waiting = tokens.clamp(max=self.delay + 1)
        keep = self.keep.to(tokens.device)[rows % self.keep.shape[0]]
        rest = (tokens - waiting)[:, None, None]
        return (waiting[:, None, None] + rest * keep).int()


def profile(ratio: float, tokens: int, layers: int, heads: int, skewed: bool = True, merges: bool = False) -> Profile:
    """What stays at this ratio of the tokens seen to the entries held, once `tokens` tokens were seen.

    Args:
        skewed: as much in each head as trained gates keep; else the same in all.
        merges: whether tokens merge at once, so that none wait.
    """
    if ratio == 1:
        return Profile(0, torch.ones(1, layers, heads))
    measured = json.loads(corpus.shipped("kept.json").read_text())["ratios"]
    nearest = measured[min(measured, key=lambda key: abs(torch.tensor(float(key) / ratio).log().item()))]
    delay = 0 if merges else min(nearest["delay"], tokens // 16)
    wanted = (tokens / ratio - delay - 1) / (tokens - delay - 1)
    if not skewed:
        return Profile(delay, torch.full((1, layers, heads), wanted))
    keep = spread(torch.tensor(nearest["documents"]), layers, heads)
    return Profile(delay, torch.stack([scaled(document, wanted) for document in keep]))


def spread(keep: Tensor, layers: int, heads: int) -> Tensor:
    """Shares [documents, l, h] for another number of layers and heads: those of the layer at the same depth, and
    between its heads by quantiles."""
    keep = keep[:, torch.arange(layers) * keep.shape[1] // layers]
    order = keep.mean(0, keepdim=True).argsort(-1).expand_as(keep)
    keep = keep.gather(-1, order)
    place = ((torch.arange(heads) + 0.5) / heads * keep.shape[-1] - 0.5).clamp(0, keep.shape[-1] - 1)
    low = place.floor().long().clamp(max=max(0, keep.shape[-1] - 2))
    high = (low + 1).clamp(max=keep.shape[-1] - 1)
    return torch.lerp(keep[..., low], keep[..., high], place - low)


def scaled(keep: Tensor, mean: float) -> Tensor:
    """Shares to one power, so that their mean is `mean` and heads that keep everything still do."""
    low, high = 0.01, 100.0
    for _ in range(60):
        power = (low * high) ** 0.5
        low, high = (power, high) if float(keep.pow(power).mean()) > mean else (low, power)
    return keep.pow(high)


def policy_for(model: Any, stays: Profile | None, method: type[DMS] | type[DMC] = DMS) -> Policy:
    """A policy under which as much stays in each head as the profile says; None: everything.

    Gates look in random directions, and their biases are set by what a few random tokens give in the model.
    """
    if stays is None or bool((stays.keep == 1).all()):
        return Full()
    shape, config = describe(model).shape, model.config
    keep = stays.keep.mean(0)
    gates = Gates(
        GateConfig(
            method.name, shape.num_layers, shape.num_kv_heads, config.hidden_size, stays.delay, sinks=1, scale=1.0,
            ratio=1 / float(keep.mean()),
        )
    )  # fmt: skip
    torch.manual_seed(0)
    layer: Any
    for layer in gates.outer:
        torch.nn.init.normal_(layer.weight, std=config.hidden_size**-0.5)
    calibrate(model, gates.requires_grad_(False), keep)
    return method(gates=gates)


@torch.no_grad()
def calibrate(model: Any, gates: Gates, keep: Tensor) -> None:
    """Set biases so that a share keep [L, H] of random tokens is not marked."""
    facts, heads = describe(model), keep.shape[1]
    gates.to(facts.device)

    def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = int(module.layer_idx)
        said = gates(layer, args[0] if args else kwargs["hidden_states"])[0]  # [R, H, T]
        ranked = said.transpose(0, 1).flatten(1).sort().values
        last = (keep[layer].to(ranked.device) * (ranked.shape[1] - 1)).round().long()
        outer: Any = gates.outer[layer]
        outer.bias.data[:heads] -= ranked.gather(1, last[:, None])[:, 0]

    hooks = [m.register_forward_pre_hook(listen, with_kwargs=True) for m in attention_modules(facts)]
    try:
        size = 8, min(256, facts.max_positions)
        model(torch.randint(3, model.config.vocab_size, size, device=facts.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
