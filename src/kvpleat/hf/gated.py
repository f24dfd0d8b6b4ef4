"""Policies whose gates decide about every token: hooks that ask them, and attention where entries leave one by one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvpleat.cache import delayed
from kvpleat.cache.paged import PagedKVCache
from kvpleat.errors import AttachError
from kvpleat.hf.families import ModelFacts, attention_modules
from kvpleat.kernels import sdpa
from kvpleat.kernels.delayed import attend
from kvpleat.policies.base import Policy
from kvpleat.types import Marks

if TYPE_CHECKING:
    from kvpleat.hf.attention import ForwardCall


def register(facts: ModelFacts, policy: Policy) -> list[Any]:
    """Hooks on the compressed layers' attention that ask the policy about the tokens before their attention runs.

    Returns:
        handles; none where the policy decides at moments.
    """
    if policy.delay is None:
        return []
    policy.to_device(facts.device)
    modules = attention_modules(facts)
    return [
        modules[index].register_forward_pre_hook(_asking(policy, layer), with_kwargs=True)
        for layer, index in enumerate(facts.layers)
    ]


def _asking(policy: Policy, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook before the attention module of one layer."""

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: ForwardCall | None = kwargs.get("kvpleat_call")
        if call is not None:  # without one the attention function says what is wrong
            with torch.no_grad():
                call.marks[layer] = policy.marks(layer, args[0] if args else kwargs["hidden_states"])

    return ask


def step(call: "ForwardCall", kv: PagedKVCache, layer: int, key: Tensor, value: Tensor) -> None:
    """Take in one token of every row: key and value [R, H, 1, D]."""
    delayed.step(kv, layer, slice(None), call.cache.positions, key, value, _marks(call, layer))


def attend_row(
    call: "ForwardCall",
    layer: int,
    row: int,
    kept: slice | Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Take in the new tokens of one row, and attend.

    Args:
        kept: which of the call's columns they are.
        qkv: q [Q, T, D], k and v [H, T, D] of them.

    Returns:
        [Q, T, D].
    """
    q, k, v = qkv
    kv, start, delay = call.cache.kv, call.cache.positions[row], call.cache.pleated.policy.delay
    assert kv is not None
    assert delay is not None
    marks = _marks(call, layer).each(lambda x: x[row][:, kept])
    if q.shape[1] > 1:
        return attend(q, delayed.extend(kv, layer, row, start, k, v, marks), start, delay, scale, softcap)
    delayed.step(kv, layer, slice(row, row + 1), [start], k[None], v[None], marks.each(lambda x: x[None]))
    entries = kv.entries(layer, row)
    visible = entries.live[:, None]
    grouped = q.view(visible.shape[0], -1, 1, q.shape[-1])
    bias = entries.fields.get("log_weight")
    return sdpa.attend_block(grouped, entries.keys, entries.values, bias, visible, scale, softcap).view_as(q)


def _marks(call: "ForwardCall", layer: int) -> Marks:
    """What gates decided about the call's tokens: [R, H, T] each."""
    if layer not in call.marks:
        raise AttachError(
            f"Attention of compressed layer {layer} ran without its gates: its module was replaced after the policy "
            "was attached. Detach, replace modules first, and attach again."
        )
    return call.marks[layer]
