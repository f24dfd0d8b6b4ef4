"""Texts to vectors: tokens, batches of texts of like length, one forward each, pooling.

Works on any encoder that `load_encoder` loads, as it is or with a policy attached: outputs keep their shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.errors import NumericsError, OptionError
from kvpleat.hf.models import LoadedModel

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class Batch:
    """Texts that are encoded together.

    Args:
        ids: [R, T] tokens, padded on the right. mask: [R, T] 1 where there is a token.
        places: R places of these texts in the list that they came from.
    """

    ids: Tensor
    mask: Tensor
    places: list[int]


def max_tokens(loaded: LoadedModel) -> int:
    """Tokens that a text may have at most, special ones included."""
    config = loaded.model.config
    positions = int(config.max_position_embeddings)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= int(config.pad_token_id) + 1  # their positions begin after that of padding
    return min(positions, int(loaded.tokenizer.model_max_length))


def pad_of(loaded: LoadedModel) -> int:
    """The token that fills up."""
    return int(loaded.tokenizer.pad_token_id or 0)


def tokenize(loaded: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, special ones included, however many there are."""
    found: list[list[int]] = loaded.tokenizer(list(texts), verbose=False)["input_ids"]
    return found


def cut(rows: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Rows of `limit` tokens at most: the first ones of a row, and its last, which is a special one."""
    return [list(row) if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]


def batches(rows: Sequence[Sequence[int]], size: int, pad: int, device: torch.device) -> Iterator[Batch]:
    """Batches of texts of like length, the longest first, so that memory that lacks lacks at once.

    Args:
        rows: tokens of each text. size: texts of a batch at most. pad: the token that fills up.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for start in range(0, len(order), size):
        yield batch_of(rows, order[start : start + size], pad, device)


def batch_of(rows: Sequence[Sequence[int]], places: list[int], pad: int, device: torch.device) -> Batch:
    """The batch of the texts at these places."""
    lengths = torch.tensor([len(rows[place]) for place in places])
    longest = int(lengths.max())
    ids = torch.tensor([[*rows[place], *[pad] * (longest - len(rows[place]))] for place in places])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return Batch(ids.to(device), mask.to(device), places)


def pool(hidden: Tensor, mask: Tensor, how: str = "mean") -> Tensor:
    """One vector of each text: the mean over its tokens, or its first token.

    Args:
        hidden: [R, T, C] last hidden states. mask: [R, T]. how: one of POOLINGS.

    Returns:
        [R, C].
    """
    if how not in POOLINGS:
        raise OptionError(f"pooling {how!r}: there are {' and '.join(POOLINGS)}.")
    if how == "cls":
        return hidden[:, 0]
    weight = mask.to(hidden.dtype)
    return torch.einsum("rtc,rt->rc", hidden, weight) / weight.sum(1, keepdim=True)


@torch.inference_mode()
def embed(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    model: Any = None,
    pooling: str = "mean",
    normalize: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """Vectors of texts, in their order.

    Args:
        loaded: an encoder. rows: tokens of each text (`tokenize`).
        model: runs in place of `loaded.model`, such as a second one on the same weights.
        pooling: one of POOLINGS. normalize: to length 1. batch_size: texts of a forward.

    Returns:
        [texts, C] float32 on the CPU.

    Raises:
        NumericsError: a vector is not finite.
    """
    runs = loaded.model if model is None else model
    found = torch.empty(len(rows), loaded.model.config.hidden_size)
    for batch in batches(rows, batch_size, pad_of(loaded), loaded.model.device):
        hidden = runs(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        found[batch.places] = pool(hidden, batch.mask, pooling).float().cpu()
    if not bool(found.isfinite().all()):
        bad = int((~found.isfinite().all(1)).nonzero()[0])
        raise NumericsError(
            f"Text {bad} has a vector that is not finite, so nothing can be compared with it. Pass --dtype float32 "
            "if the model runs in 16 bits, and look for NaN in its weights otherwise."
        )
    return F.normalize(found, dim=1) if normalize else found
