"""Feeding tokens to an attached model beside generate(): whole prompts in pieces, and continuations that are known
already.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpleat.errors import NumericsError, OptionError
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import cache_argument
from kvpleat.types import Phase


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cache: PleatedCache,
    chunk_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Feed a whole prompt, or the next turn of a conversation, in pieces, and end the prompt there.

    Args:
        input_ids: [R, T] the new tokens only.
        attention_mask: [R, columns + T], zeros for padding; None: no padding.
        cache: what they are appended to.
        chunk_size: tokens a piece; None: all at once. The result is the same, up to rounding.
        on_progress: called with the number of tokens done after each piece.

    Returns:
        [R, vocabulary] logits of each row's last token.
    """
    start, total = cache.columns, input_ids.shape[1]
    if total == 0:
        raise OptionError("The prompt is empty (0 tokens), so there is nothing to continue. Pass at least one token.")
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size={chunk_size}: at least 1 token a piece is needed. Leave it out for one piece.")
    cache.expect_prompt(start + total)
    step = chunk_size or total
    last = [total - 1] * input_ids.shape[0] if attention_mask is None else _last_tokens(attention_mask[:, start:])
    logits: dict[int, Tensor] = {}
    for first in range(0, total, step):
        stop = min(first + step, total)
        mask = None if attention_mask is None else attention_mask[:, : start + stop]
        columns = sorted({column for column in last if first <= column < stop}) or [stop - 1]
        out = model(
            input_ids[:, first:stop],
            attention_mask=mask,
            logits_to_keep=torch.tensor(columns, device=input_ids.device) - first,
            **{cache_argument(model): cache},
            **_positions(mask, start + first, start + stop),
        )
        for row, column in enumerate(last):
            if first <= column < stop:
                logits[row] = out.logits[row, columns.index(column)]
        if on_progress is not None:
            on_progress(stop)
    result = torch.stack([logits[row] for row in range(len(last))])
    if bool(torch.isnan(result).any()):
        raise NumericsError(
            f"The model's logits are NaN after {start + total} tokens. Check the weights and the dtype (float16 "
            "overflows where bfloat16 does not)."
        )
    return result


@torch.no_grad()
def continue_with(model: Any, input_ids: Tensor, *, cache: PleatedCache) -> Tensor:
    """Feed known tokens as if they had been generated: the cache and logits of decoding them one by one, much faster.

    Args:
        input_ids: [R, T] the tokens, without padding.
        cache: after a prompt has ended.

    Returns:
        [R, T, vocabulary] logits.
    """
    cache.check_usable()
    logits, shape = [], cache.pleated.facts.shape
    cache.decoding = True
    try:
        while input_ids.shape[1]:
            step = input_ids.shape[1]
            for start, last in zip(cache.positions, cache.last_moments, strict=True):
                moments = cache.pleated.policy.moments(start, start + step, Phase.DECODE, last, shape)
                step = min([step, *(moment - start for moment in moments)])
            logits.append(model(input_ids[:, :step], **{cache_argument(model): cache}).logits)
            input_ids = input_ids[:, step:]
    finally:
        cache.decoding = False
    return torch.cat(logits, dim=1)


def _positions(mask: Tensor | None, first: int, stop: int) -> dict[str, Tensor]:
    """Position ids that count tokens and not padding, as generate() makes them."""
    if mask is None:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)[:, first:stop]}


def _last_tokens(mask: Tensor) -> list[int]:
    """Column of each row's last token: [R, T] mask; the last column for a row without any."""
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask.bool(), index, -1).amax(1)
    columns: list[int] = torch.where(last < 0, mask.shape[1] - 1, last).tolist()
    return columns
