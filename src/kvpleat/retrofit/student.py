"""A model whose attention compresses softly while its gates are learned, beside itself without compression: the student
and its teacher.

The model is transformers' own: attention is replaced through its AttentionInterface, gates read the attention input
through hooks, and all of it is taken off again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.errors import AttachError, OptionError, UnsupportedError
from kvpleat.hf.families import ModelFacts, attention_modules, decoder_layers, describe
from kvpleat.policies.gates import Gates
from kvpleat.policies.learned import Learned, SoftMarks
from kvpleat.retrofit import soft
from kvpleat.retrofit.soft import SoftCall
from kvpleat.types import Delay

# The gates' hook has one key in all modules, unlike those that register_forward_pre_hook hands out: to torch.compile
# all layers then look alike.
HOOK = -1


class Student(nn.Module):
    """A causal LM with gates.

    Args:
        model: of a family kvpleat serves; its weights may be trained too.
        gates: one set for the model.
        policy: what the gates decide on.
        temperature: of the relaxation.
        teacher: a frozen copy, where the model's own weights are trained; None: the model with its adapters off.
        compile: whether torch.compile fuses what the decoder's layers do around attention. All layers share what is
            compiled, so that it takes seconds, not minutes.
    """

    def __init__(
        self,
        model: Any,
        gates: Gates,
        policy: type[Learned],
        *,
        temperature: float = 0.1,
        teacher: Any = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.facts: ModelFacts = describe(model)
        config, shape = gates.config, self.facts.shape
        if (config.num_layers, config.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
            raise OptionError(
                f"The gates are for {config.num_layers} layers of {config.num_kv_heads} KV heads and the model has "
                f"{shape.num_layers} of {shape.num_kv_heads}. Make gates for this model."
            )
        if config.look_back is not None:
            raise UnsupportedError(f"look_back={config.look_back}: groups are trained whole. Leave look_back out.")
        self.model, self.gates, self.policy, self.temperature = model, gates, policy, temperature
        self._teacher = [] if teacher is None else [teacher]  # in a list: its weights are none of the student's
        self._places = {layer: index for index, layer in enumerate(self.facts.layers)}
        self._rule = Delay(config.delay, policy.merges, policy.weighs, policy.log_size, sinks=config.sinks)
        self._teacher_facts = self.facts if teacher is None else describe(teacher)
        self._fused: list[tuple[Any, Any]] = []  # each layer and its call, fused
        self.compiled = compile

    @property
    def compiled(self) -> bool:
        """Whether layers run fused: False for lengths that come up once."""
        return bool(self._fused)

    @compiled.setter
    def compiled(self, value: bool) -> None:
        for layer, _ in self._fused:
            layer._compiled_call_impl = None
        models = [self.facts, self._teacher_facts][: 1 + len(self._teacher)]
        layers = [layer for facts in models for layer in decoder_layers(facts)] if value else []
        self._fused = [(layer, torch.compile(layer._call_impl, dynamic=False)) for layer in layers]
        self._fuse()

    def _fuse(self) -> None:
        for layer, call in self._fused:
            layer._compiled_call_impl = call  # what nn.Module.compile sets

    @property
    def teacher(self) -> Any:
        """The frozen copy, where there is one."""
        return self._teacher[0] if self._teacher else None

    @property
    def head(self) -> nn.Module:
        """What makes logits of the student's hidden states."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def teacher_head(self) -> nn.Module:
        """What makes logits of the teacher's hidden states."""
        return self._teacher[0].get_output_embeddings() if self._teacher else self.head

    def forward(self, tokens: Tensor, doc_start: Tensor, noise: Tensor) -> tuple[Tensor, dict[int, SoftMarks]]:
        """Hidden states [R, T, hidden] before the head, and the decisions of each layer."""
        call = SoftCall(doc_start, noise, self.facts, self._rule, self.compiled)
        out = self.facts.decoder(tokens, position_ids=call.positions, use_cache=False, kvpleat_soft=call)
        if noise is not None and len(call.marks) != self.gates.config.num_layers:
            raise AttachError(
                f"Gates of {len(call.marks)} layers out of {self.gates.config.num_layers} decided in this forward, so "
                "the others would not learn. Leave attached() around all of it, and attention modules as they are."
            )
        return out.last_hidden_state, call.marks

    @torch.no_grad()
    def teach(self, tokens: Tensor, doc_start: Tensor) -> Tensor:
        """The teacher's hidden states [R, T, hidden]."""
        call = SoftCall(doc_start, None, self.facts, self._rule, self.compiled)
        with nullcontext() if self._teacher else without_adapters(self.model):
            out = self._teacher_facts.decoder(tokens, position_ids=call.positions, use_cache=False, kvpleat_soft=call)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def noise(self, rows: int, tokens: int, generator: torch.Generator) -> Tensor:
        """Logistic noise for one forward (the difference of two Gumbel variables): [L, R, H, T]."""
        config = self.gates.config
        size = config.num_layers, rows, config.num_kv_heads, tokens
        uniform = torch.rand(size, generator=generator, device=generator.device).clamp_(1e-6, 1 - 1e-6)
        return torch.logit(uniform).to(self.facts.device)

    def no_noise(self, rows: int, tokens: int) -> Tensor:
        """Zeros in place of noise: decisions as they are at inference, if the temperature is low."""
        config = self.gates.config
        return torch.zeros(config.num_layers, rows, config.num_kv_heads, tokens, device=self.facts.device)

    @contextmanager
    def attached(self) -> Iterator["Student"]:
        """Put soft attention and hooks on student and teacher, and take them off."""
        soft.register()
        hooked: list[Any] = []
        models = [self.model, *self._teacher]
        before = [model.config._attn_implementation for model in models]
        try:
            for model in models:
                model.set_attn_implementation(soft.IMPLEMENTATION)
            module: Any
            for module in attention_modules(self.facts):
                if module.layer_idx in self._places:
                    hooked.append(module)
                    module._forward_pre_hooks[HOOK] = self._gate
                    module._forward_pre_hooks_with_kwargs[HOOK] = True
            self._fuse()
            yield self
        finally:
            for module in hooked:
                module._forward_pre_hooks.pop(HOOK, None)
                module._forward_pre_hooks_with_kwargs.pop(HOOK, None)
            for layer, _ in self._fused:
                layer._compiled_call_impl = None
            for model, implementation in zip(models, before, strict=True):
                model.set_attn_implementation(implementation)

    # ---- inside the decoder

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention module: let the gates read its input."""
        call: SoftCall = kwargs["kvpleat_soft"]
        if call.noise is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self._places[module.layer_idx]
        with torch.autocast(hidden.device.type, enabled=False):
            call.marks[layer] = self.policy.relax(self.gates(layer, hidden), call.noise[layer], self.temperature)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """LoRA adapters of PEFT off: the model as it was.

    Not by PEFT's enable_adapters, which would freeze and thaw the adapters too: what is trained never changes.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters") and hasattr(m, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
