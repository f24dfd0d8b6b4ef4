"""Published DMS and DMC checkpoints: their gates are a channel of their own queries and keys.

The last channel of some heads was retrained to say what becomes of a token (d = D - 1 below, before rotation, after the
model's norm of queries and keys where it has one):

    DMS (arXiv 2506.05345, NVIDIA's models): q of the first query head of a group; mark where 100 q[d] - 5 > 0
    DMC (arXiv 2403.09636, NVIDIA's models): mark where k[d] - 5 > 0; weight sigmoid(5 + mean of the group's q[d]) + eps

and takes no part in attention: it is zero before rotation, and zero again after it, because rotation mixes it with its
partner. Zeroing it in the query alone is enough the second time. (Attention then depends a little on positions and not
on distances alone: whoever pads on the left by hand must pass position_ids, as `generate` does.)

What gates say is computed here from the attention input in float32, so that one token and many decide alike. The
released code reads the rounded queries and keys, and may decide otherwise within a rounding of its thresholds. (In
bfloat16 it asks for k[d] - 5 >= 0.00785, the same as > 0 among numbers that lie 0.03 apart.)

Read from the model's config, for DMS: dms_window_size (must be there), dms_alpha_scale (100), dms_initial_alpha_offset
(5), dms_alpha_per ("head", or "layer": the first head decides for all), dms_separate_alpha, dms_cr (the ratio). DMC has
no keys there. With dms_separate_alpha the gates are adapters beside the model: see `adapter_gates`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.errors import ModelError, OptionError, UnsupportedError
from kvpleat.hf.families import ModelFacts, attention_modules, base_of
from kvpleat.policies.base import Policy
from kvpleat.policies.gates import OWN, Borrowed, GateConfig, Gates

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DMC_OFFSET = 5.0
DMC_LOOK_BACK = 12  # members of a group that count; fixed in the released kernels


class BorrowedGates(Gates):
    """Gates that read the model's own projections. They hold the model's modules, and nothing of their own."""

    def __init__(self, facts: ModelFacts, config: GateConfig, borrowed: Borrowed) -> None:
        nn.Module.__init__(self)
        self.config, self.source, self.adapter, self.borrowed = config, OWN, None, borrowed
        modules = attention_modules(facts)
        self._attention: list[Any] = [
            modules[index] for index in facts.layers
        ]  # a list, so that it is not ours to move
        self._shape = facts.shape

    def save_pretrained(self, folder: Any) -> None:
        """Refused: there is nothing but the model to save."""
        raise OptionError(f"These gates are channels of the model, not a folder of their own: pass gates={OWN!r}.")

    def _queries(self, layer: int, hidden: Tensor, step: int) -> Tensor:
        """The last channel of every `step`-th query head: hidden [R, T, hidden] -> [R, T, Q / step] float32."""
        module, heads = self._attention[layer], torch.arange(0, self._shape.num_q_heads, step, device=hidden.device)
        return _last_channel(module.q_proj, getattr(module, "q_norm", None), heads, self._shape.head_dim, hidden)

    def _keys(self, layer: int, hidden: Tensor) -> Tensor:
        """The last channel of every key: hidden [R, T, hidden] -> [R, T, H] float32."""
        module, heads = self._attention[layer], torch.arange(self._shape.num_kv_heads, device=hidden.device)
        return _last_channel(module.k_proj, getattr(module, "k_norm", None), heads, self._shape.head_dim, hidden)


class DMSChannels(BorrowedGates):
    """The gates of a DMS checkpoint; `options` are the keys of its config."""

    def __init__(self, facts: ModelFacts, config: GateConfig, options: Mapping[str, Any]) -> None:
        self._scale, self._offset, self._per_layer = _scale_and_offset(options)
        super().__init__(facts, config, Borrowed(query_step=facts.shape.group_size, keys=False))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of one layer: hidden [R, T, hidden] -> [1, R, H, T]."""
        logits = self._queries(layer, hidden, self._shape.group_size) * self._scale - self._offset
        if self._per_layer:
            logits = logits[..., :1].expand_as(logits)
        return logits.transpose(1, 2)[None]


class DMCChannels(BorrowedGates):
    """The gates of a DMC checkpoint."""

    def __init__(self, facts: ModelFacts, config: GateConfig, options: Mapping[str, Any]) -> None:
        super().__init__(facts, config, Borrowed(query_step=1, keys=True))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of one layer: hidden [R, T, hidden] -> [2, R, H, T].

        A weight is the sigmoid of the second; weights that are all divided by 1 + eps mean the same.
        """
        grouped = self._queries(layer, hidden, 1).unflatten(-1, (self._shape.num_kv_heads, -1))
        eps = torch.finfo(self._shape.dtype).eps
        weights = torch.sigmoid(grouped.mean(-1) + DMC_OFFSET) + eps
        marks = self._keys(layer, hidden) - DMC_OFFSET
        return torch.stack([marks, torch.logit(weights / (1.0 + eps))]).transpose(2, 3)


def _last_channel(projection: nn.Linear, norm: Any, heads: Tensor, size: int, hidden: Tensor) -> Tensor:
    """Channel size - 1 of some heads of a projection [R, T, heads], in float32; only what it depends on is computed."""
    channels = torch.arange(size - 1 if norm is None else 0, size, device=hidden.device)
    rows = (heads[:, None] * size + channels).flatten()
    bias = None if projection.bias is None else projection.bias[rows].float()
    values: Tensor = nn.functional.linear(hidden.float(), projection.weight[rows].float(), bias)
    values = values.view(*values.shape[:-1], len(heads), -1)
    if norm is None:
        return values[..., 0]
    last = norm.weight[-1].float() * torch.rsqrt(values.square().mean(-1) + norm.variance_epsilon)
    product: Tensor = values[..., -1] * last
    return product


# ---- from a checkpoint


def gates_for(model: nn.Module, facts: ModelFacts, policy: Policy) -> Policy:
    """The policy on this model, its gates loaded; gates="model" are the model's own channels."""
    if policy.reads_model:
        policy = policy.with_gates(own_gates(model, facts, policy.name))
    return policy.for_model(base_of(model, facts))


def own_gates(model: nn.Module, facts: ModelFacts, method: str) -> BorrowedGates:
    """Gates that are channels of the model itself.

    Args:
        method: dms or dmc.

    Raises:
        OptionError: the config does not say that there are any. UnsupportedError: another family or method.
    """
    options = vars(model.config)
    made: dict[str, Callable[..., BorrowedGates]] = {"dms": DMSChannels, "dmc": DMCChannels}
    if method not in made or facts.family not in FAMILIES:
        raise UnsupportedError(
            f"gates={OWN!r} with {method} on a {facts.family} model: only dms and dmc checkpoints of "
            f"{', '.join(FAMILIES)} borrow channels. Pass gates=NAME_OR_FOLDER."
        )
    delay, look_back = (0, DMC_LOOK_BACK) if method == "dmc" else (_window(options), None)
    if method == "dms" and options.get("dms_separate_alpha"):
        raise OptionError(
            "The config says dms_separate_alpha, so decisions come from adapters that are not among the model's own "
            "weights. Pass gates=kvpleat.hf.borrowed.adapter_gates(model, tensors of the checkpoint)."
        )
    return made[method](facts, _config(model, facts, method, delay, look_back), options)


def adapter_gates(model: nn.Module, facts: ModelFacts, tensors: Mapping[str, Tensor]) -> Gates:
    """The gates that NVIDIA's DMS adapters are, exactly, as gates of kvpleat, which can be saved.

    An adapter is a linear layer on RMSNorm of the residual stream. The attention input is RMSNorm of the same, so that
    only the norms' weights differ, and those go into the linear layer.

    Args:
        tensors: of the checkpoint; read are model.layers.N.self_attn.dms_proj_alpha(_norm).weight.

    Raises:
        ModelError: a tensor is missing. OptionError: the config names no dms_window_size.
    """
    options = vars(model.config)
    scale, offset, per_layer = _scale_and_offset(options)
    config = _config(model, facts, "dms", _window(options), None)
    gates = Gates(config)
    layers: Any = facts.decoder.layers
    for place, index in enumerate(facts.layers):
        name = f"model.layers.{index}.self_attn.dms_proj_alpha"
        try:
            weight, norm = tensors[f"{name}.weight"].float(), tensors[f"{name}_norm.weight"].float()
        except KeyError as error:
            raise ModelError(
                f"{error} is not among the tensors, so layer {index} has no gate. Pass all of them."
            ) from None
        bias = tensors.get(f"{name}.bias", torch.zeros(len(weight))).float() * scale - offset
        weight = scale * weight * norm / layers[index].input_layernorm.weight.detach().cpu().float()
        outer: Any = gates.outer[place]
        with torch.no_grad():
            outer.weight.copy_(weight[:1].expand_as(weight) if per_layer else weight)
            outer.bias.copy_(bias[:1].expand_as(bias) if per_layer else bias)
    return gates.requires_grad_(False).eval()


def _window(options: Mapping[str, Any]) -> int:
    window = options.get("dms_window_size")
    if window is None:
        raise OptionError(
            "The model's config has no dms_window_size, so its queries hold no decisions. Load a DMS checkpoint, or "
            "pass gates=NAME_OR_FOLDER."
        )
    return int(window)


def _scale_and_offset(options: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Scale and offset of the logits, and whether the first head decides for its layer."""
    per = options.get("dms_alpha_per", "head")
    if per not in ("head", "layer"):
        raise OptionError(
            f"dms_alpha_per={per!r}: decisions are made per head or per layer. The checkpoint is another's."
        )
    return (
        float(options.get("dms_alpha_scale", 100.0)),
        float(options.get("dms_initial_alpha_offset", 5.0)),
        per == "layer",
    )


def _config(model: nn.Module, facts: ModelFacts, method: str, delay: int, look_back: int | None) -> GateConfig:
    base = base_of(model, facts)
    shape = {name: base[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    ratio = float(getattr(model.config, "dms_cr", None) or 1.0)
    return GateConfig(method, delay=delay, look_back=look_back, scale=1.0, ratio=ratio, base=base, **shape)


# ---- attention without the channel


def register(facts: ModelFacts, policy: Policy) -> list[Any]:
    """Hooks that zero borrowed channels of queries and keys before they are rotated; returns their handles."""
    borrowed = policy.borrowed
    if borrowed is None:
        return []
    handles = []
    modules: list[Any] = attention_modules(facts)
    for index in facts.layers:
        for letter, step in (("q", borrowed.query_step), ("k", 1 if borrowed.keys else 0)):
            if step:
                last = getattr(modules[index], f"{letter}_norm", None) or getattr(modules[index], f"{letter}_proj")
                handles.append(last.register_forward_hook(_zeroing(step, facts.shape.head_dim)))
    return handles


def _zeroing(step: int, size: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def zero(module: nn.Module, args: Any, output: Tensor) -> None:
        """output: [R, T, heads * D] of a projection, or [R, T, heads, D] of a norm; changed in place."""
        output.view(*output.shape[:2], -1, size)[:, :, ::step, -1] = 0.0

    return zero


def clear(query: Tensor, policy: Policy) -> Tensor:
    """Rotated queries [R, Q, T, D] without the policy's borrowed channels, which then no key can answer."""
    if policy.borrowed is None:
        return query
    query = query.clone()
    query[:, :: policy.borrowed.query_step, :, -1] = 0.0
    return query
