"""A masked full forward, written without kvpleat: what a cache that forgets must compute, without forgetting.

The unmodified transformers model runs once over the whole sequence, without any cache. Every query sees the entries
that a boolean mask per layer and KV head lets it see. Whatever kvpleat does with pages, chunks, padding and turns is
compared with this.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "tests_masked_reference"
_visible: dict[int, Tensor] = {}  # layer -> [H, T, T] bool: may query i see entry j


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Textbook attention of query [1, Q, T, D] over key and value [1, H, T, D], in float64, masked by `_visible`."""
    groups = query.shape[1] // key.shape[1]
    mask = _visible[module.layer_idx].repeat_interleave(groups, dim=0)
    keys, values = (x[0].double().repeat_interleave(groups, dim=0) for x in (key, value))
    logits = query[0].double() @ keys.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    return (weights @ values).transpose(0, 1)[None].to(query.dtype), None


@contextlib.contextmanager
def _masked(model: Any, visible: dict[int, Tensor]) -> Iterator[None]:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _visible.update(visible)
    try:
        yield
    finally:
        _visible.clear()
        model.set_attn_implementation(before)


def causal(length: int) -> Tensor:
    """[T, T] bool: query i sees entries 0 to i."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def layer_windows(model: Any) -> list[int | None]:
    """Per layer the window of the model's own sliding attention, or None."""
    types = getattr(model.config, "layer_types", None)
    count = model.config.num_hidden_layers
    if types is None:
        return [None] * count
    return [model.config.sliding_window if kind == "sliding_attention" else None for kind in types]


def forward(model: Any, tokens: Tensor, visible: Tensor | dict[int, Tensor] | None = None) -> Tensor:
    """Logits [T, vocabulary] of one sequence.

    Args:
        tokens: [T].
        visible: [T, T] or [H, T, T] bool for all layers with full attention, or one such tensor per layer; causality
            and the model's own sliding windows are added here. None: everything in the past.
    """
    length = tokens.shape[0]
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    index = torch.arange(length)
    masks = {}
    for layer, window in enumerate(layer_windows(model)):
        mask = causal(length)
        if window is not None:
            mask = mask & (index[:, None] - index[None] < window)
        elif isinstance(visible, dict):
            mask = mask & visible[layer]
        elif visible is not None:
            mask = mask & visible
        masks[layer] = mask.expand(heads, length, length)
    with _masked(model, masks), torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def window_visible(
    length: int,
    *,
    streams: int,
    head_dim: int,
    itemsize: int,
    ratio: float | None = None,
    budget: int | None = None,
    sinks: int = 4,
    page: int = 16,
) -> Tensor:
    """[T, T] bool of the Window policy, from its definition.

    A query at position t sees the sinks and the positions from start(m) on, m the largest multiple of 16 up to t. With
    a budget, start(m) leaves room for the sinks and the 16 tokens until the next moment. With a ratio, the budget is
    what whole pages can hold within 1/ratio of the full bytes of m tokens, at least sinks + 32 entries; an entry of a
    page costs a key, a value and a 4-byte position.
    """
    index = torch.arange(length)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        moment = t - t % 16
        if budget is not None:
            entries = budget
        else:
            full = moment * streams * 2 * head_dim * itemsize
            pages_in_all = int(full / ratio) // (page * (2 * head_dim * itemsize + 4))
            least = -(-(sinks + 32) // page)
            entries = max(pages_in_all // streams, least) * page
        start = max(sinks, moment - (entries - sinks - 16))
        visible[t] = (index < sinks) | (index >= start)
    return visible & causal(length)


def window_of(model: Any, length: int, **options: Any) -> Tensor:
    """`window_visible` with the sizes of a model."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    full_layers = sum(window is None for window in layer_windows(model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = next(model.parameters()).dtype.itemsize
    return window_visible(length, streams=full_layers * heads, head_dim=head_dim, itemsize=itemsize, **options)
