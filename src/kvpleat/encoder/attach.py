"""Attaching EncoderMerge to an encoder, and taking it off again: `with compress(bert, EncoderMerge(ratio=2.6))`.

What happens on attach, all of it undone on detach: the model's attention implementation is set to kvpleat's through
transformers' own interface, hooks are registered before each layer and before and after its attention, and `forward` is
shadowed on the one base model object (a hook would not do: sentence-transformers calls `forward` itself). No class is
touched. At ratio 1 nothing happens at all.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvpleat.encoder import attention, calls
from kvpleat.encoder.attention import IMPLEMENTATION
from kvpleat.encoder.calls import Call, Trace
from kvpleat.encoder.families import Encoder, describe
from kvpleat.errors import AttachError, CacheError, UnsupportedError
from kvpleat.hf import adapters
from kvpleat.hf.block import SHARED_CONFIG, Attachment
from kvpleat.kernels.grouping import unmerge
from kvpleat.policies.encoder import EncoderMerge
from kvpleat.policies.lora import LoraWeights

_attached: "weakref.WeakKeyDictionary[nn.Module, MergedEncoder]" = weakref.WeakKeyDictionary()

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class MergedEncoder(Attachment):
    """An encoder with EncoderMerge attached. Made by `compress` or `attach`.

    Attributes:
        model: the model as it was passed.
        policy: the policy.
        encoder: what kvpleat knows of the model.
    """

    def __init__(self, model: nn.Module, policy: EncoderMerge) -> None:
        self.model, self.policy = model, policy
        self.encoder: Encoder = describe(model)
        self.original: str = ""  # the model's own attention implementation
        self._signature = inspect.signature(type(self.encoder.base).forward)
        self._handles: list[Any] = []
        self._trace: Trace | None = None

    @property
    def attached(self) -> bool:
        """Whether the policy acts on the model now."""
        return _attached.get(self.encoder.base) is self

    @property
    def trace(self) -> Trace:
        """Which tokens were one in which layer, in the most recent forward. Raises CacheError before the first, and at
        ratio 1, which leaves the model alone."""
        if self._trace is None:
            raise CacheError(
                "No tokens have merged yet, so there is nothing to tell. Call the model first, at a ratio above 1."
            )
        return self._trace

    def attach(self) -> Self:
        """Put the policy on the model. Raises AttachError where one is attached already."""
        base = self.encoder.base
        other = _attached.get(base)
        if other is not None:
            raise AttachError(
                f"{type(base).__name__} already has {other.policy!r} attached; tokens cannot merge twice. Leave the "
                "first `with compress(...)` or call detach() before attaching again."
            )
        self.original = base.config._attn_implementation
        if self.original == IMPLEMENTATION:
            raise AttachError(SHARED_CONFIG)
        _attached[base] = self
        if self.policy.changes_nothing:
            return self
        AttentionInterface.register(IMPLEMENTATION, attention.attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
        try:
            lora = self.policy.adapter()
            if lora is not None:
                self._handles.append(_Merged(base, lora))
            base.set_attn_implementation(IMPLEMENTATION)
            self._register()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Take the policy off. Twice is no error."""
        if not self.attached:
            return
        del _attached[self.encoder.base]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.encoder.base.set_attn_implementation(self.original)

    # ---- hooks

    def _register(self) -> None:
        base, family = self.encoder.base, self.encoder.family
        self._handles += [_Shadow(base, self._wrapped(base.forward))]
        for index, layer in enumerate(self.encoder.layers):
            longer = family.keys_from_longer and self.policy.whole_keys
            self._handles.append(layer.register_forward_pre_hook(_LayerHook(index, longer), with_kwargs=True))
            if longer:
                inner = layer.get_submodule(family.attention)
                self._handles.append(inner.register_forward_pre_hook(_longer_input, with_kwargs=True))
                self._handles.append(inner.register_forward_hook(_cut, with_kwargs=True))

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The base model's forward with a Call that travels with it, and every token's state at the end."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = self._signature.bind_partial(None, *args, **kwargs).arguments
            given = {**{k: v for k, v in bound.items() if k not in ("self", "kwargs")}, **bound.get("kwargs", {})}
            if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
                return original(*args, **kwargs)  # raises: the model's own words say it best
            call = calls.plan(self.encoder, self.policy, given)
            output = original(**given, kvpleat_merge=call)
            self._trace = call.trace
            return _unmerged(call, output)

        return forward


class _Shadow:
    """A forward over that of one model object, which `remove` puts back."""

    def __init__(self, base: Any, forward: Callable[..., Any]) -> None:
        self.base, self.own = base, base.__dict__.get("forward")  # what the user had put there
        base.forward = forward

    def remove(self) -> None:
        del self.base.forward
        if self.own is not None:
            self.base.forward = self.own


class _Merged:
    """A LoRA in the weights of a base model, which `remove` takes out again."""

    def __init__(self, base: Any, lora: LoraWeights) -> None:
        if base.training:
            raise UnsupportedError(
                "The model is in training mode, and a LoRA that is merged into its weights would hide them from the "
                "optimizer. Call model.eval(), or leave `lora` out."
            )
        self.remove = adapters.merge(base, lora).undo


def _unmerged(call: Call, output: Any) -> Any:
    """A base model's output with a state for every token."""
    if isinstance(output, tuple):
        every = (_every(call, part) if isinstance(part, tuple) else part for part in output[1:])
        return (_whole(call, call.place, output[0]), *every)
    output.last_hidden_state = _whole(call, call.place, output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = _every(call, output.hidden_states)
    return output


def _whole(call: Call, place: Tensor, states: Tensor) -> Tensor:
    return unmerge(place, call.real, states)


def _every(call: Call, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The states that enter the first layer and those that leave each layer; None where the caller wants none."""
    places = (call.places[0], *call.places)
    return tuple(
        None if part is None else _whole(call, place.clamp(min=0), part)
        for place, part in zip(places, states, strict=True)
    )


class _LayerHook:
    """Merges tokens before a layer, and keeps the rotations of those that stay."""

    def __init__(self, layer: int, keys_from_longer: bool) -> None:
        self.layer, self.keys_from_longer = layer, keys_from_longer

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call: Call = kwargs["kvpleat_merge"]
        args, kwargs = _with_states(args, kwargs, lambda states: call.enter(self.layer, states, self.keys_from_longer))
        rotations = kwargs.get("position_embeddings")
        if rotations is not None and not call.tokens.plain:
            kwargs = kwargs | {"position_embeddings": tuple(call.rotations(part) for part in rotations)}
        return args, kwargs


def _with_states(args: Args, kwargs: Kwargs, change: Callable[[Tensor], Tensor]) -> tuple[Args, Kwargs]:
    """The arguments of a layer with its states changed, however they were passed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def _longer_input(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Let attention see the tokens before they merged."""
    longer = kwargs["kvpleat_merge"].longer
    return (args, kwargs) if longer is None else _with_states(args, kwargs, lambda _: longer.states)


def _cut(module: nn.Module, args: Args, kwargs: Kwargs, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cut off what `attention_forward` padded where keys came from more tokens than the layer goes on with."""
    call: Call = kwargs["kvpleat_merge"]
    return output if call.longer is None else (output[0][:, : call.tokens.sizes.shape[1]], *output[1:])


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Behind transformers' AttentionMaskInterface: `attention_forward` knows itself what is padding."""
