"""Where the hooks go in each family of encoders, and which tokens of a text are special."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpleat.errors import UnsupportedError

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")


@dataclass(frozen=True)
class Family:
    """How one family names things.

    Args:
        layers: path from the base model to the list of its layers.
        attention: path from a layer to the module that calls the attention function.
        keys_from_longer: whether the keys and values of a layer can come from the tokens before they merged. That
            needs a layer that hands its input to attention as it is, and queries that merge like states: no norm in
            between and no rotation (ModernBERT has both).
    """

    layers: str
    attention: str
    keys_from_longer: bool = True


_BERT = Family("encoder.layer", "attention.self")
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Family("transformer.layer", "attention"),
    "modernbert": Family("layers", "attn", keys_from_longer=False),
}


@dataclass(frozen=True)
class Encoder:
    """An encoder as kvpleat sees it.

    Args:
        base: the model without its head, whose outputs keep their shape.
        family: how it names things.
        layers: its layers.
        special_ids: token ids that its config calls special.
    """

    base: Any
    family: Family
    layers: tuple[Any, ...]
    special_ids: tuple[int, ...]


def transformer_in(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model that `model` is or holds (a SentenceTransformer does), if there is just one."""
    if isinstance(model, PreTrainedModel):
        return model
    inside: list[PreTrainedModel] = []
    for module in model.modules():  # outer ones first
        if isinstance(module, PreTrainedModel) and not any(module in set(other.modules()) for other in inside):
            inside.append(module)
    return inside[0] if len(inside) == 1 else None


def is_encoder(model: nn.Module) -> bool:
    """Whether a policy for encoders fits this model."""
    found = transformer_in(model)
    return found is not None and found.config.model_type in FAMILIES and not getattr(found.config, "is_decoder", False)


def describe(model: nn.Module) -> Encoder:
    """Where an encoder's hooks go. Raises UnsupportedError, naming the family, where kvpleat cannot serve it."""
    found = transformer_in(model)
    if found is None or not is_encoder(model):
        kind = f" (model_type {found.config.model_type!r})" if found is not None else ""
        raise UnsupportedError(
            f"{type(model).__name__}{kind} is no encoder that kvpleat knows ({', '.join(FAMILIES)}), so its tokens "
            "cannot merge. Pass one of those, or a SentenceTransformer that holds one; for causal LMs there are the "
            "policies of `kvpleat policies`."
        )
    config: Any = found.config
    family, base = FAMILIES[config.model_type], found.base_model
    named = [getattr(config, name, None) for name in SPECIAL_IDS]
    special = tuple(sorted({token for token in named if isinstance(token, int)}))
    return Encoder(base, family, tuple(base.get_submodule(family.layers)), special)


def special_tokens(input_ids: Tensor | None, real: Tensor, ids: tuple[int, ...]) -> Tensor:
    """[B, T] bool: the first and the last token of each row, tokens equal to one of these two, and tokens in `ids`.

    Tokenizers frame a text with special tokens and put the same ones between two texts, so no config has to name them.

    Args:
        input_ids: [B, T]; None where the caller passes embeddings: only the first and last tokens are special then.
        real: [B, T] bool, no padding.
        ids: token ids.
    """
    order = real.cumsum(1)
    edge = real & ((order == 1) | (order == order[:, -1:]))
    if input_ids is None:
        return edge
    column = torch.arange(real.shape[1], device=real.device).expand_as(real)
    first = torch.where(edge, column, real.shape[1] - 1).min(1, keepdim=True).values
    last = torch.where(edge, column, 0).max(1, keepdim=True).values
    alike = (input_ids == input_ids.gather(1, first)) | (input_ids == input_ids.gather(1, last))
    return real & (alike | torch.isin(input_ids, _on(ids, input_ids.dtype, real.device)))


@functools.lru_cache(maxsize=64)
def _on(ids: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ids on a device. Sending them waits for all that it does, so they stay there."""
    return torch.tensor(ids, dtype=dtype, device=device)
