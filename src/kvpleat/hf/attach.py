"""Attaching a policy to a transformers model, and taking it off again: `with compress(model, policy) as pleated`.

What happens on attach, all of it undone on detach: the model's attention implementation is set to kvpleat's through
transformers' own interface, one hook before and one after the decoder's forward are registered, and `generate` is shadowed on
this one model object by a wrapper that states where the prompt ends and refuses what cannot work. No class is touched.
"""

import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask

from kvpleat.accounting import MemoryReport
from kvpleat.cache.pages import PagePool
from kvpleat.errors import AttachError, CacheError, OptionError, UnsupportedError
from kvpleat.hf import attention
from kvpleat.hf.attention import IMPLEMENTATION, ForwardCall
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import ModelFacts, describe
from kvpleat.hf.generate import wrap_generate
from kvpleat.policies.base import Policy
from kvpleat.types import Phase

_attached: "weakref.WeakKeyDictionary[nn.Module, Pleated]" = weakref.WeakKeyDictionary()  # decoder -> who is attached
_originals: dict[int, str] = {}  # id of an attached model's config -> its own attention implementation


class Pleated:
    """A model with a policy attached. Made by `compress` or `attach`.

    Attributes:
        model: the model.
        policy: the policy.
        facts: what kvpleat knows of the model.
        pool: the page pool that all caches of this attachment share.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, page_size: int = 16, max_pages: int | None = None) -> None:
        self.model: Any = model
        self.policy = policy
        self.facts: ModelFacts = describe(model, page_size).with_fields(policy.fields)
        self.pool = PagePool(self.facts.shape, self.facts.device, max_pages)
        self._handles: list[Any] = []
        self._original: str = ""
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
                f"{type(self.model).__name__} already has {other.policy!r} attached; two policies cannot own one cache. "
                "Leave the first `with compress(...)` or call detach() before attaching again."
            )
        if self.model.training:
            raise UnsupportedError("The model is in training mode, where dropout makes scores random. Call model.eval() first.")
        self._original = self.model.config._attn_implementation
        AttentionInterface.register(IMPLEMENTATION, attention.attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, _mask)
        _attached[self.facts.decoder] = self
        try:
            _originals[id(self.facts.decoder.config)] = self._original
            self.model.set_attn_implementation(IMPLEMENTATION)
            decoder = self.facts.decoder
            self._handles = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True),
            ]
            if hasattr(self.model, "generate"):
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
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.model.__dict__.pop("generate", None)
        self.model.set_attn_implementation(self._original)
        for cache in list(self._caches):
            cache.release()
        self._last = None
        self.pool = PagePool(self.facts.shape, self.facts.device, self.pool.max_pages)

    def __enter__(self) -> Self:
        return self if self.attached else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- caches

    def new_cache(self) -> PleatedCache:
        """An empty cache, to be passed as `past_key_values` call after call."""
        self._check_attached()
        cache = PleatedCache(self)
        self.remember(cache)
        return cache

    def load_cache(self, path: str | Path) -> PleatedCache:
        """A cache that `PleatedCache.save` wrote. Raises CacheFileError unless model, policy, shapes and content fit."""
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

    def prefill(
        self,
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
            [R, vocabulary] logits of the last position.
        """
        self._check_attached()
        start, total = cache.columns, input_ids.shape[1]
        if total == 0:
            raise OptionError("The prompt is empty (0 tokens), so there is nothing to continue. Pass at least one token.")
        if chunk_size is not None and chunk_size < 1:
            raise OptionError(f"chunk_size={chunk_size}: at least 1 token a piece is needed. Leave it out for one piece.")
        cache.expect_prompt(start + total)
        step = chunk_size or total
        with torch.no_grad():
            for first in range(0, total, step):
                stop = min(first + step, total)
                mask = None if attention_mask is None else attention_mask[:, : start + stop]
                out = self.model(
                    input_ids[:, first:stop], attention_mask=mask, past_key_values=cache, logits_to_keep=1,
                    **self._positions(mask, start + first, start + stop),
                )
                if on_progress is not None:
                    on_progress(stop)
        logits: Tensor = out.logits[:, -1]
        return logits

    @torch.no_grad()
    def continue_with(self, input_ids: Tensor, *, cache: PleatedCache) -> Tensor:
        """Feed known tokens as if they had been generated: the cache and logits of decoding them one by one, much faster.

        Args:
            input_ids: [R, T] the tokens, without padding.
            cache: after a prompt has ended.

        Returns:
            [R, T, vocabulary] logits.
        """
        self._check_attached()
        cache.check_usable()
        logits = []
        cache.decoding = True
        try:
            while input_ids.shape[1]:
                step = input_ids.shape[1]
                for start, last in zip(cache.positions, cache.last_moments, strict=True):
                    moments = self.policy.moments(start, start + step, Phase.DECODE, last, self.facts.shape)
                    step = min([step, *(moment - start for moment in moments)])
                logits.append(self.model(input_ids[:, :step], past_key_values=cache).logits)
                input_ids = input_ids[:, step:]
        finally:
            cache.decoding = False
        return torch.cat(logits, dim=1)

    @staticmethod
    def _positions(mask: Tensor | None, first: int, stop: int) -> dict[str, Tensor]:
        """Position ids that count tokens and not padding, as generate() makes them."""
        if mask is None:
            return {}
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)[:, first:stop]}

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("The policy is not attached to the model. Use it inside `with compress(model, policy)`.")

    # ---- hooks around the decoder

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace a missing or empty cache by ours, check the input, and tell the layers what this call is."""
        bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        kwargs = {**{k: v for k, v in bound.items() if k not in ("kwargs", "args")}, **bound.get("kwargs", {})}
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None or inputs.shape[1] == 0:
            raise OptionError("The input is empty (0 tokens), so there is nothing to attend. Pass at least one token.")
        if decoder.training:
            raise UnsupportedError("The model is in training mode, where dropout makes scores random. Call model.eval() first.")
        cache = self._cache_for(kwargs.get("past_key_values"))
        cache.check_usable()
        call = self._call(cache, inputs.shape[0], inputs.shape[1], kwargs)
        cache.interrupted = True
        kwargs |= {"past_key_values": cache, "kvpleat_call": call}
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
                f"past_key_values is a {type(given).__name__} that kvpleat does not own, so its entries cannot be compressed. "
                "Pass nothing, or a cache made by pleated.new_cache()."
            )
        if given.pleated is not self:
            raise CacheError(
                "The cache belongs to another attachment, whose pages this one does not own. Make it with this "
                "attachment's new_cache(), or save it there and load_cache() it here."
            )
        self._last = given
        return given

    def _call(self, cache: PleatedCache, num_rows: int, num_new: int, kwargs: dict[str, Any]) -> ForwardCall:
        tokens = _new_tokens(kwargs.get("attention_mask"), cache.columns, num_rows, num_new)
        cache.start(num_rows)
        counts = [num_new] * num_rows if tokens is None else tokens.sum(1).tolist()
        self._check_positions(cache, counts, tokens, kwargs.get("position_ids"))
        declared = cache.prompt_end is not None
        if declared and cache.prompt_end is not None and cache.columns + num_new > cache.prompt_end:
            raise OptionError(
                f"The prompt was declared to end at {cache.prompt_end} tokens and this call goes to {cache.columns + num_new}; "
                "the cache is compressed at the end of the prompt. Cut the call there."
            )
        prompt = declared or (num_new > 1 and not cache.decoding)
        phase = Phase.PREFILL if prompt else Phase.DECODE
        if phase is Phase.DECODE and cache.prompt_open and self.policy.uses_prompt_end:
            self._end_prompt(cache)
        ends_prompt = declared and cache.columns + num_new == cache.prompt_end
        call = ForwardCall(cache, self._original, tokens, counts, phase, ends_prompt)
        for start, count, last in zip(cache.positions, counts, cache.last_moments, strict=True):
            moments = self.policy.moments(start, start + count, phase, last, self.facts.shape)
            if self.policy.uses_prompt_end and ends_prompt and count and (not moments or moments[-1] != start + count):
                moments = [*moments, start + count]
            call.moments.append(moments)
        return call

    def _end_prompt(self, cache: PleatedCache) -> None:
        """The prompt whose end nobody declared has ended: do now what its last call would have done."""
        assert cache.kv is not None
        num_rows, shape = cache.kv.num_rows, self.facts.shape
        call = ForwardCall(cache, self._original, None, [0] * num_rows, Phase.PREFILL, True)
        call.moments = [[position] for position in cache.positions]
        for layer in range(shape.num_layers):
            for row in range(num_rows):
                attention.decide(
                    call, layer, row, cache.positions[row], cache.last_moments[row], *self.facts.logits[layer]
                )
        attention.finish(call)
        cache.prompt_open = False

    def _check_positions(
        self, cache: PleatedCache, counts: list[int], tokens: Tensor | None, position_ids: Tensor | None
    ) -> None:
        longest = max(p + c for p, c in zip(cache.positions, counts, strict=True))
        if longest > self.facts.max_positions:
            raise OptionError(
                f"{longest} tokens are more than the {self.facts.max_positions} positions this {self.facts.family} model knows; "
                "beyond them its output is noise. Shorten the prompt or generate less."
            )
        if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] > 1:
            steps = position_ids.diff(dim=1)
            allowed = steps == 1 if tokens is None else (steps == 1) | ~tokens[:, :-1] | ~tokens[:, 1:]
            if not bool(allowed.all()):
                raise UnsupportedError(
                    "position_ids jump within a row, as in packed sequences; entries of one sequence would be compressed with "
                    "another's. Pass each sequence as a row of its own."
                )


def _new_tokens(mask: Tensor | None, columns: int, num_rows: int, num_new: int) -> Tensor | None:
    """[R, T] bool: which of the new columns are tokens; None: all."""
    if mask is None:
        return None
    if mask.dim() != 2 or tuple(mask.shape) != (num_rows, columns + num_new):
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({num_rows}, {columns + num_new}): one number per token seen "
            "so far and now. Masks of more dimensions cannot be applied to compressed entries."
        )
    new = mask[:, columns:].bool()
    return None if bool(new.all()) else new


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Behind transformers' AttentionMaskInterface: full layers need no mask; sliding-window layers get the model's own."""
    if kwargs.get("local_size") is None:
        return None
    makers = {"eager": eager_mask, "sdpa": sdpa_mask}
    original = _originals.get(id(kwargs["config"]), "sdpa")
    mask: Tensor | None = makers.get(original, flash_attention_mask)(*args, **kwargs)
    return mask


def attach(model: nn.Module, policy: Policy, *, page_size: int = 16, max_pages: int | None = None) -> Pleated:
    """Attach a policy to a model until `detach()` is called. Prefer `with compress(...)`, which cannot forget to."""
    return Pleated(model, policy, page_size=page_size, max_pages=max_pages).attach()


def compress(model: nn.Module, policy: Policy, *, page_size: int = 16, max_pages: int | None = None) -> Pleated:
    """Compress the KV memory of a causal LM inside a `with` block.

    Args:
        model: a transformers causal LM of a known family, in eval mode, on one device.
        policy: what to keep; see kvpleat.policies.
        page_size: entries per page, 16 or 32.
        max_pages: limit of the page pool; None: the machine's memory.

    Raises:
        UnsupportedError: the model's family or mode cannot be served. AttachError: something is attached already.

    Example:
        >>> with compress(model, policies.AttentionScore(ratio=4.0)) as pleated:
        ...     out = model.generate(**inputs, max_new_tokens=128)
        ...     print(pleated.report())
    """
    return Pleated(model, policy, page_size=page_size, max_pages=max_pages)
