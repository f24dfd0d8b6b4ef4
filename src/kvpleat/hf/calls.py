"""Planning one forward: what is fed, where each row stands, which moments fall into it, and what must be refused."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.hf import attention
from kvpleat.hf.attention import ForwardCall
from kvpleat.hf.cache import PleatedCache
from kvpleat.types import Phase

if TYPE_CHECKING:
    from kvpleat.hf.attach import Pleated


def check_mode(decoder: nn.Module, inputs: Tensor | None) -> None:
    """Refuse what entries in pages cannot serve, before anything is changed."""
    if inputs is None or inputs.shape[1] == 0:
        raise OptionError("The input is empty (0 tokens), so there is nothing to attend. Pass at least one token.")
    if decoder.training:
        raise UnsupportedError(
            "The model is in training mode, where dropout makes scores random. Call model.eval() first."
        )
    wants_gradients = inputs.requires_grad or any(p.requires_grad for p in decoder.parameters())
    if torch.is_grad_enabled() and wants_gradients:
        raise UnsupportedError("Gradients are on and entries in pages carry none. Wrap the call in torch.no_grad().")
    if torch.is_autocast_enabled(inputs.device.type):
        raise UnsupportedError(
            f"Autocast to {torch.get_autocast_dtype(inputs.device.type)} is on, so keys and values would not fit the "
            "cache's dtype. Leave autocast, and load the model in the dtype it is to run in."
        )


def plan(pleated: "Pleated", cache: PleatedCache, inputs: Tensor, kwargs: dict[str, Any]) -> ForwardCall:
    """The call that feeds `inputs` [R, T, ...] into `cache`; `kwargs` are the decoder's."""
    num_rows, num_new = inputs.shape[:2]
    tokens = _new_tokens(kwargs.get("attention_mask"), cache.columns, num_rows, num_new)
    cache.start(num_rows)
    counts = [num_new] * num_rows if tokens is None else tokens.sum(1).tolist()
    _check_positions(pleated, cache, counts, tokens, kwargs.get("position_ids"))
    if cache.prompt_end is not None and cache.columns + num_new > cache.prompt_end:
        raise OptionError(
            f"The prompt was declared to end at {cache.prompt_end} tokens and this call goes to "
            f"{cache.columns + num_new}; the cache is compressed at the end of the prompt. Cut the call there."
        )
    is_prompt = cache.prompt_end is not None or (num_new > 1 and not cache.decoding)
    phase = Phase.PREFILL if is_prompt else Phase.DECODE
    if phase is Phase.DECODE and cache.prompt_open and pleated.policy.uses_prompt_end:
        _end_open_prompt(pleated, cache)
    ends_prompt = cache.prompt_end is not None and cache.columns + num_new == cache.prompt_end
    call = ForwardCall(cache, pleated.original, tokens, counts, phase, ends_prompt)
    for start, count, last in zip(cache.positions, counts, cache.last_moments, strict=True):
        moments = pleated.policy.moments(start, start + count, phase, last, pleated.facts.shape)
        end = start + count
        # A row whose tokens ended in an earlier call (right padding) has its prompt's end here too.
        if pleated.policy.uses_prompt_end and ends_prompt and end > max([last, *moments]):
            moments = [*moments, end]
        call.moments.append(moments)
    return call


def _end_open_prompt(pleated: "Pleated", cache: PleatedCache) -> None:
    """The prompt whose end nobody declared has ended: do now what its last call would have done."""
    assert cache.kv is not None
    call = ForwardCall(cache, pleated.original, None, [0] * cache.kv.num_rows, Phase.PREFILL, ends_prompt=True)
    call.moments = [
        [position] if position > last else []
        for position, last in zip(cache.positions, cache.last_moments, strict=True)
    ]
    for layer, (scale, softcap) in enumerate(pleated.facts.logits):
        for row, moments in enumerate(call.moments):
            for moment in moments:
                attention.decide(call, layer, row, moment, cache.last_moments[row], scale, softcap)
    attention.finish(call)
    cache.prompt_open = False


def _check_positions(
    pleated: "Pleated", cache: PleatedCache, counts: list[int], tokens: Tensor | None, position_ids: Tensor | None
) -> None:
    longest, facts = max(p + c for p, c in zip(cache.positions, counts, strict=True)), pleated.facts
    if longest > facts.max_positions:
        raise OptionError(
            f"{longest} tokens are more than the {facts.max_positions} positions this {facts.family} model knows; "
            "beyond them its output is noise. Shorten the prompt or generate less."
        )
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        steps = position_ids.diff(dim=1)
        allowed = steps == 1 if tokens is None else (steps == 1) | ~tokens[:, :-1] | ~tokens[:, 1:]
        if not bool(allowed.all()):
            raise UnsupportedError(
                "position_ids jump within a row, as in packed sequences; entries of one sequence would be compressed "
                "with another's. Pass each sequence as a row of its own."
            )


def _new_tokens(mask: Tensor | None, columns: int, num_rows: int, num_new: int) -> Tensor | None:
    """[R, T] bool: which of the new columns are tokens; None: all."""
    if mask is None:
        return None
    if mask.dim() != 2 or tuple(mask.shape) != (num_rows, columns + num_new):
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({num_rows}, {columns + num_new}): one number per "
            "token seen so far and now. Masks of more dimensions cannot be applied to compressed entries."
        )
    new = mask[:, columns:].bool()
    return None if bool(new.all()) else new
