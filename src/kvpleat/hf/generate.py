"""What kvpleat adds to transformers' generate(): a cache of ours, where the prompt ends, and early refusals."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvpleat.errors import NumericsError, OptionError, UnsupportedError
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import cache_argument, given_cache

if TYPE_CHECKING:
    from kvpleat.hf.attach import Pleated

# option -> (whether a value is refused, what to do instead)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda x: x > 1, "beam search reorders the cache at every step; use num_beams=1"),
    "assistant_model": (lambda x: x is not None, "assisted generation takes tokens back, evicted entries are gone"),
    "prompt_lookup_num_tokens": (bool, "prompt lookup takes tokens back, evicted entries are gone"),
    "cache_implementation": (bool, "the cache is kvpleat's own; leave cache_implementation out"),
    "use_cache": (lambda x: x is False, "without a cache nothing is compressed; leave use_cache out"),
    "custom_generate": (bool, "a custom decoding loop may use the cache in ways kvpleat cannot check"),
}


class _RefuseNaN(LogitsProcessor):
    """Stops generation at the first logits that are not numbers, which would otherwise be sampled from."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(torch.isnan(scores).any()):
            raise NumericsError(
                f"The model's logits are NaN after {input_ids.shape[1]} tokens, so no token can be chosen. Check the "
                "weights and the dtype (float16 overflows where bfloat16 does not)."
            )
        return scores


def wrap_generate(pleated: "Pleated", generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` with kvpleat's cache and checks. Arguments and results are transformers' own."""

    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs).arguments
        kwargs = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        inputs = kwargs.pop("inputs", None)
        _refuse(pleated, kwargs)
        ids = next((x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        mask = kwargs.get("attention_mask")
        if ids is None or ids.shape[1] == 0 or (mask is not None and not bool(mask.any(dim=1).all())):
            raise OptionError(
                "The prompt is empty (0 tokens), so there is nothing to continue. Pass at least one token a row."
            )
        total = ids.shape[1] if mask is None else mask.shape[1]
        _check_length(pleated, ids, mask, kwargs)
        cache = given_cache(kwargs)
        cache = pleated.new_cache() if cache is None else cache
        kwargs[cache_argument(pleated.model)] = cache
        if isinstance(cache, PleatedCache):
            cache.check_usable()
            cache.expect_prompt(total)
        kwargs["logits_processor"] = LogitsProcessorList([_RefuseNaN(), *(kwargs.get("logits_processor") or [])])
        try:
            return generate(inputs, **kwargs)
        finally:
            if isinstance(cache, PleatedCache) and not cache.interrupted:
                cache.prompt_end = None

    return wrapped


def _setting(pleated: "Pleated", kwargs: dict[str, Any], name: str) -> Any:
    """An option of generate(), from the call or from the generation config in force."""
    config = kwargs.get("generation_config") or pleated.model.generation_config
    value = kwargs.get(name)
    return getattr(config, name, None) if value is None else value


def _refuse(pleated: "Pleated", kwargs: dict[str, Any]) -> None:
    for name, (refused, why) in REFUSED.items():
        value = _setting(pleated, kwargs, name)
        if value is not None and refused(value):
            raise UnsupportedError(f"generate({name}={value!r}) does not work with a compressed cache: {why}.")


def _check_length(pleated: "Pleated", ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    limit = pleated.facts.max_positions
    longest = ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
    new = _setting(pleated, kwargs, "max_new_tokens") or 1
    if longest + new - 1 > limit:
        raise OptionError(
            f"A prompt of {longest} tokens and {new} new ones need {longest + new - 1} positions and this "
            f"{pleated.facts.family} model knows {limit}; beyond them its output is noise. Shorten the prompt or "
            "max_new_tokens."
        )
