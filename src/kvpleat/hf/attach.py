"""Attaching a policy to a transformers model, and taking it off again: `with compress(model, policy) as pleated`.

What happens on attach, all of it undone on detach: the model's attention implementation is set to kvpleat's through
transformers' own interface, one hook before and one after the decoder's forward are registered (and one before each
layer's attention where gates decide), and `generate` is shadowed on this one model object by a wrapper that states
where the prompt ends and refuses what cannot work. No class is touched.
"""

import inspect
import weakref
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask

from kvpleat.accounting import MemoryReport
from kvpleat.cache.pages import PagePool
from kvpleat.errors import AttachError, CacheError, UnsupportedError
from kvpleat.hf import adapters, attention, borrowed, calls, feed, gated
from kvpleat.hf.attention import IMPLEMENTATION, ForwardCall
from kvpleat.hf.block import SHARED_CONFIG, Attachment
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import ModelFacts, cache_argument, describe, given_cache
from kvpleat.hf.generate import wrap_generate
from kvpleat.policies.base import Policy
from kvpleat.types import Phase

_attached: "weakref.WeakKeyDictionary[nn.Module, Pleated]" = weakref.WeakKeyDictionary()  # decoder -> who is attached
_originals: dict[int, str] = {}  # id of an attached model's config -> its own attention implementation


class Pleated(Attachment):
    """A model with a policy attached. Made by `compress` or `attach`.

    Attributes:
        model: the model.
        policy: the policy.
        facts: what kvpleat knows of the model.
        pool: the page pool that all caches of this attachment share.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, page_size: int = 16, max_pages: int | None = None) -> None:
        self.model: Any = model
        facts = describe(model, page_size)
        self.policy = borrowed.gates_for(model, facts, policy)
        self.facts: ModelFacts = facts.stored_with(self.policy.fields, self.policy.bits)
        self._max_pages = max_pages
        self.pool: PagePool  # made on attach
        self.original: str = ""  # the model's own attention implementation
        # Read once, because inspecting a forward costs 65 microseconds and every decoded token is a call.
        self._signature = inspect.signature(self.facts.decoder.forward)
        self._cache_name = cache_argument(self.facts.decoder)
        self._handles: list[Any] = []
        self._merged: adapters.Merged | None = None  # weights that a LoRA changes
        self._own_generate: Any = None  # what the user had put over generate on this model object
        self._caches: weakref.WeakSet[PleatedCache] = weakref.WeakSet()
        self._last: PleatedCache | None = None
        self._last_report: MemoryReport | None = None

    # ---- attach and detach

    @property
    def attached(self) -> bool:
        """Whether the policy acts on the model now."""
        return _attached.get(self.facts.decoder) is self

    def attach(self) -> Self:
        """Put the policy on the model. Raises AttachError where one is attached already."""
        other = _attached.get(self.facts.decoder)
        if other is not None:
            raise AttachError(
                f"{type(self.model).__name__} already has {other.policy!r} attached; two policies cannot own one "
                "cache. Leave the first `with compress(...)` or call detach() before attaching again."
            )
        if self.model.training:
            raise UnsupportedError(
                "The model is in training mode, where dropout makes scores random. Call model.eval() first."
            )
        self.original = self.model.config._attn_implementation
        if self.original == IMPLEMENTATION:
            raise AttachError(SHARED_CONFIG)
        self.pool = PagePool(self.facts.shape, self.facts.device, self._max_pages)
        AttentionInterface.register(IMPLEMENTATION, attention.attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, _mask)
        _attached[self.facts.decoder] = self
        try:
            if self.policy.adapter is not None:
                self._merged = adapters.merge(self.model, self.policy.adapter)
            _originals[id(self.facts.decoder.config)] = self.original
            self.model.set_attn_implementation(IMPLEMENTATION)
            decoder = self.facts.decoder
            self._handles = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True),
                *gated.register(self.facts, self.policy),
                *borrowed.register(self.facts, self.policy),
            ]
            if hasattr(self.model, "generate"):
                self._own_generate = self.model.__dict__.get("generate")
                self.model.generate = wrap_generate(self, self.model.generate)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Take the policy off and return all memory: caches of this attachment are released. Twice is no error."""
        if not self.attached:
            return
        self._last_report = self.report() if self._last is not None and self._last.kv is not None else self._last_report
        del _attached[self.facts.decoder]
        _originals.pop(id(self.facts.decoder.config), None)
        if self._merged is not None:
            self._merged.undo()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.model.__dict__.pop("generate", None)
        if self._own_generate is not None:
            self.model.generate = self._own_generate
        self.model.set_attn_implementation(self.original)
        for cache in list(self._caches):
            cache.release()
        self._last = None
        self.pool.trim()  # now, even if somebody still holds a cache
        del self.pool

    # ---- caches

    def new_cache(self) -> PleatedCache:
        """An empty cache, to be passed as `cache` (before transformers 5.24: `past_key_values`) call after call."""
        self._check_attached()
        cache = PleatedCache(self)
        self.remember(cache)
        return cache

    def load_cache(self, path: str | Path) -> PleatedCache:
        """A cache that `PleatedCache.save` wrote. Raises CacheFileError unless model, policy, shapes and content
        fit."""
        from kvpleat.hf.snapshot import load

        self._check_attached()
        cache = load(self, Path(path))
        self.remember(cache)
        return cache

    def remember(self, cache: PleatedCache) -> None:
        """Note a cache as this attachment's; it becomes the most recent one."""
        self._caches.add(cache)
        self._last = cache

    def report(self) -> MemoryReport:
        """Memory of the most recent cache; after detach, its last state."""
        if self._last is not None:
            return self._last.report()
        if self._last_report is not None:
            return self._last_report
        raise CacheError("No cache has been used yet, so there is nothing to report. Call generate or the model first.")

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Feed a whole prompt, or the next turn, in pieces, and end the prompt there: see kvpleat.hf.feed.prefill."""
        self._check_attached()
        return feed.prefill(self.model, input_ids, attention_mask, **options)

    def continue_with(self, input_ids: Tensor, *, cache: PleatedCache) -> Tensor:
        """Feed known tokens as if they had been generated: see kvpleat.hf.feed.continue_with."""
        self._check_attached()
        return feed.continue_with(self.model, input_ids, cache=cache)

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("The policy is not attached to the model. Use it inside `with compress(model, policy)`.")

    # ---- hooks around the decoder

    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace a missing or empty cache by ours, check the input, and tell the layers what this call is."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        kwargs = {**{k: v for k, v in bound.items() if k not in ("kwargs", "args")}, **bound.get("kwargs", {})}
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        calls.check_mode(decoder, inputs)
        assert inputs is not None
        cache = self._cache_for(given_cache(kwargs))
        cache.check_usable()
        call = calls.plan(self, cache, inputs, kwargs)
        cache.interrupted = True
        kwargs |= {self._cache_name: cache, "kvpleat_call": call}
        return (), kwargs

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call: ForwardCall = kwargs["kvpleat_call"]
        cache = call.cache
        attention.finish(call)
        first = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cache.columns += first.shape[1]
        if call.ends_prompt:
            cache.prompt_end = None
        cache.prompt_open = call.phase is Phase.PREFILL and not call.ends_prompt
        cache.interrupted = False

    def _cache_for(self, given: Any) -> PleatedCache:
        if given is None or (type(given) is DynamicCache and given.get_seq_length() == 0):
            return self.new_cache()
        if not isinstance(given, PleatedCache):
            raise UnsupportedError(
                f"The cache that was passed is a {type(given).__name__} that kvpleat does not own, so its entries "
                "cannot be compressed. Pass nothing, or a cache made by pleated.new_cache()."
            )
        if given.pleated is not self:
            raise CacheError(
                "The cache belongs to another attachment, whose pages this one does not own. Make it with this "
                "attachment's new_cache(), or save it there and load_cache() it here."
            )
        self._last = given
        return given


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Behind transformers' AttentionMaskInterface: full layers need no mask; sliding-window layers get the model's
    own."""
    if kwargs.get("local_size") is None:
        return None
    makers = {"eager": eager_mask, "sdpa": sdpa_mask}
    original = _originals.get(id(kwargs["config"]), "sdpa")
    mask: Tensor | None = makers.get(original, flash_attention_mask)(*args, **kwargs)
    return mask
