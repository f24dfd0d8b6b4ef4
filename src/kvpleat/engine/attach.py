"""The engine on a model: what is set and hooked while it lives, and taken off again by `close`."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from kvpleat.engine.attention import IMPLEMENTATION, Step, attention_forward
from kvpleat.errors import AttachError, UnsupportedError
from kvpleat.hf import adapters, borrowed
from kvpleat.hf.attention import IMPLEMENTATION as OF_COMPRESS
from kvpleat.hf.families import attention_modules, decoder_layers, describe
from kvpleat.policies.base import Policy

HOOK = -1  # one key in all modules: to torch.compile layers then look alike


class Attached:
    """A causal LM whose attention is the engine's.

    Everything goes through transformers' own interfaces: the name of an attention implementation in the model's
    config, hooks that ask gates, and a LoRA that is merged. No mask function goes with that name, so no mask is made.

    Args:
        compile: whether torch.compile fuses what layers do around attention and gates. All layers share what is
            compiled, for any number of tokens.

    Attributes:
        model: the causal LM. facts: what is known of it. policy: the policy, its gates loaded.
    """

    def __init__(self, model: nn.Module, policy: Policy, page_size: int, compile: bool = False) -> None:
        self.model: Any = model
        facts = describe(self.model, page_size)
        self.policy = borrowed.gates_for(self.model, facts, policy)
        self.facts = facts.stored_with(self.policy.fields, self.policy.bits)
        if model.training:
            raise UnsupportedError(
                "The model is in training mode, where dropout makes scores random. Call model.eval() first."
            )
        config: Any = model.config
        self._original: str = config._attn_implementation
        if self._original in (OF_COMPRESS, IMPLEMENTATION):
            raise AttachError(
                f"{type(model).__name__} (or a model that shares its config) already runs with kvpleat's attention, "
                "and two cannot own one cache. Leave `with compress(...)`, or close the other engine, before."
            )
        self._merged: adapters.Merged | None = None
        self._handles: list[Any] = []
        self._attach(compile)

    def _attach(self, compile: bool) -> None:
        AttentionInterface.register(IMPLEMENTATION, attention_forward)
        try:
            if self.policy.adapter is not None:
                self._merged = adapters.merge(self.model, self.policy.adapter)
            self.model.set_attn_implementation(IMPLEMENTATION)
            self._handles = borrowed.register(self.facts, self.policy)
            if self.policy.delayed is not None:
                self.policy.to_device(self.facts.device)
                modules = attention_modules(self.facts)
                for module in (modules[layer] for layer in self.facts.layers):
                    module._forward_pre_hooks[HOOK] = self._ask  # what register_forward_pre_hook does, but for the key
                    module._forward_pre_hooks_with_kwargs[HOOK] = True
            for layer in decoder_layers(self.facts) if compile else ():
                layer._compiled_call_impl = torch.compile(layer._call_impl, dynamic=True)  # as nn.Module.compile does
        except BaseException:
            self.close()
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention module: ask the gates about the tokens, for the attention function."""
        step: Step | None = kwargs.get("kvpleat_step")
        if step is not None:  # without one the attention function says what is wrong
            layer = int(module.layer_idx)
            hidden = args[0] if args else kwargs["hidden_states"]
            step.said[layer] = self.policy.logits(self.facts.layers.index(layer), hidden)

    def check(self) -> None:
        """Raise AttachError where somebody else took the model over."""
        if self.model.config._attn_implementation != IMPLEMENTATION:
            raise AttachError(
                f"The model's attention implementation became {self.model.config._attn_implementation!r} while the "
                "engine was running, so its cache would not be used. Close the engine before the model is used in "
                "another way."
            )

    def close(self) -> None:
        """Put the model back as it was. Twice is no error."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in attention_modules(self.facts):
            module._forward_pre_hooks.pop(HOOK, None)
            module._forward_pre_hooks_with_kwargs.pop(HOOK, None)
        for layer in decoder_layers(self.facts):
            layer._compiled_call_impl = None
        if self._merged is not None:
            self._merged.undo()
            self._merged = None
        if self.model.config._attn_implementation == IMPLEMENTATION:
            self.model.set_attn_implementation(self._original)
