"""What kvpleat must know of a model: which layers have entries to compress, their shape, and how their keys rotate.

Everything is read from the model's config and modules; a family that is not listed, or a feature that changes what an
entry means, is refused by name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.errors import UnsupportedError
from kvpleat.types import KVShape, Rotary

CACHE_ARGUMENTS = ("cache", "past_key_values")  # names of a forward's cache, the newer one first
MOVABLE_ROPE = {"default", "linear", "llama3", "yarn"}  # the angle is linear in the position, so keys can be moved


@dataclass(frozen=True)
class Family:
    """How one family names things.

    Args:
        decoder: attribute path from the causal LM to the module that runs the layers.
        attention: attribute path from a layer to its attention module.
        layers: attribute of the decoder that lists its layers.
        rotary: whether keys are rotated (False: learned positions in the embedding).
    """

    decoder: str
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: bool = True


FAMILIES = {
    "gpt2": Family(decoder="transformer", layers="h", attention="attn", rotary=False),
    "llama": Family(decoder="model"),
    "mistral": Family(decoder="model"),
    "qwen2": Family(decoder="model"),
    "qwen3": Family(decoder="model"),
    "gemma2": Family(decoder="model"),
    "gemma3_text": Family(decoder="model"),
}


@dataclass(frozen=True)
class ModelFacts:
    """A model as kvpleat sees it.

    Args:
        family: transformers' model_type.
        decoder: the module that runs the layers and takes the cache.
        layers: index of each compressed layer in the model, in order; its place here is the layer index of the cache.
        sliding: index -> window of the layers with sliding-window attention, which stay as they are.
        shape: KV shape of the compressed layers.
        rotary: how their keys rotate, or None.
        logits: per compressed layer the factor on q.k and the soft cap (or None) of its logits.
        max_positions: longest sequence the model knows (tokens).
        device: of the weights.
    """

    family: str
    decoder: nn.Module
    layers: tuple[int, ...]
    sliding: dict[int, int]
    shape: KVShape
    rotary: Rotary | None
    logits: tuple[tuple[float, float | None], ...]
    max_positions: int
    device: torch.device

    def stored_with(self, fields: tuple[str, ...], bits: int | None) -> "ModelFacts":
        """The same model with entries as a policy wants them stored: its side arrays, and bits of a number."""
        return replace(self, shape=replace(self.shape, fields=fields, bits=bits))


def describe(model: nn.Module, page_size: int = 16) -> ModelFacts:
    """Read the facts of a causal LM. Raises UnsupportedError, naming the family or feature, where kvpleat cannot serve
    it."""
    config: Any = getattr(model, "config", None)
    family_name = getattr(config, "model_type", None)
    if config is None or not isinstance(family_name, str):
        raise UnsupportedError(
            f"{type(model).__name__} has no transformers config, so its KV shape is unknown. Pass a transformers "
            "causal LM."
        )
    family = FAMILIES.get(family_name)
    decoder = getattr(model, family.decoder, None) if family else None
    if family is None or not isinstance(decoder, nn.Module):
        raise UnsupportedError(
            f"{type(model).__name__} (model_type {family_name!r}) is not among the families kvpleat serves: "
            f"{', '.join(FAMILIES)}. Load one of them with AutoModelForCausalLM."
        )
    _refuse_features(config, family_name)
    sliding, layers = _split_layers(config, family_name)
    attention = _attention(decoder, family)
    parameter = next(decoder.parameters())
    _refuse_mixed_dtypes(decoder, parameter)
    num_q_heads: int = config.num_attention_heads
    shape = KVShape(
        num_layers=len(layers),
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_q_heads,
        num_q_heads=num_q_heads,
        head_dim=attention[0].head_dim,
        dtype=parameter.dtype,
        page_size=page_size,
    )
    rotary = _rotary(decoder, config, family_name) if family.rotary else None
    logits = tuple((float(attention[i].scaling), getattr(attention[i], "attn_logit_softcapping", None)) for i in layers)
    return ModelFacts(
        family=family_name,
        decoder=decoder,
        layers=layers,
        sliding=sliding,
        shape=shape,
        rotary=rotary,
        logits=logits,
        max_positions=config.max_position_embeddings,
        device=parameter.device,
    )


def _attention(decoder: nn.Module, family: Family) -> list[Any]:
    return [getattr(layer, family.attention) for layer in getattr(decoder, family.layers)]


def attention_modules(facts: ModelFacts) -> list[nn.Module]:
    """The attention module of every layer of the model, sliding-window layers too."""
    return _attention(facts.decoder, FAMILIES[facts.family])


def decoder_layers(facts: ModelFacts) -> list[nn.Module]:
    """Every layer of the model, sliding-window layers too."""
    return list(getattr(facts.decoder, FAMILIES[facts.family].layers))


def base_of(model: nn.Module, facts: ModelFacts) -> dict[str, Any]:
    """What tells a model from others as far as gates go: the keys of `kvpleat.policies.gates.BASE`."""
    config: Any = model.config
    shape = facts.shape
    return {
        "family": facts.family,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "num_q_heads": shape.num_q_heads,
        "head_dim": shape.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def _refuse_features(config: Any, family: str) -> None:
    refused = {
        "is_encoder_decoder": "encoder-decoder attention",
        "add_cross_attention": "cross-attention",
        "use_bidirectional_attention": "bidirectional attention",
    }
    for name, feature in refused.items():
        if getattr(config, name, False):
            raise UnsupportedError(
                f"{family} with {feature} ({name}) keeps no growing causal cache; kvpleat cannot serve it."
            )


def _refuse_mixed_dtypes(decoder: nn.Module, parameter: Tensor) -> None:
    devices = {p.device for p in decoder.parameters()}
    if len(devices) > 1:
        raise UnsupportedError(
            f"The model is spread over {sorted(map(str, devices))}; the page pool lives on one device. Load it without "
            "device_map, on one device."
        )


def _split_layers(config: Any, family: str) -> tuple[dict[int, int], tuple[int, ...]]:
    """Sliding-window layers (index -> window) and the others."""
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and family == "mistral" else "full_attention"] * count
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedError(f"{family} has layers of type {sorted(unknown)}, which kvpleat does not know.")
    sliding = {i: int(window or 0) for i, kind in enumerate(types) if kind == "sliding_attention"}
    layers = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    if not layers:
        raise UnsupportedError(
            f"All {count} layers of this {family} model use a sliding window of {window} tokens, so its cache does not "
            "grow and there is nothing to compress. Set config.sliding_window=None if the checkpoint was trained "
            "without it."
        )
    return sliding, layers


def _rotary(decoder: nn.Module, config: Any, family: str) -> Rotary:
    """The rotation of the full-attention layers, from the model's own rotary module."""
    module: Any = decoder.get_submodule("rotary_emb")
    per_type = hasattr(module, "full_attention_inv_freq")  # Gemma 3 rotates its two kinds of layers differently
    kind = module.rope_type["full_attention"] if per_type else module.rope_type
    if kind not in MOVABLE_ROPE:
        raise UnsupportedError(
            f"{family} with rope_type {kind!r} rotates a key by an angle that depends on the length of the text, so a "
            f"stored key cannot be moved. Supported: {', '.join(sorted(MOVABLE_ROPE))}."
        )
    return Rotary((module.full_attention_inv_freq if per_type else module.inv_freq).detach().float())


def cache_argument(module: nn.Module) -> str:
    """What `module.forward` calls its cache: transformers renamed past_key_values to cache in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def given_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of a call's keyword arguments, whichever of its two names the caller used.

    Where both names give one, `cache` wins, as in transformers. None: there is none.
    """
    given = [kwargs.pop(name, None) for name in CACHE_ARGUMENTS]
    return next((cache for cache in given if cache is not None), None)


def sliding_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function that transformers would have called for `module` under `implementation`."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "eager":
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
