"""A masked full forward, written without kvpleat: what a cache that forgets must compute, without forgetting.

The unmodified transformers model runs once over the whole sequence, without any cache. Every query sees the entries
that a boolean mask per layer and KV head lets it see. Whatever kvpleat does with pages, chunks, padding and turns is
compared with this.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


# ---- learned policies, token by token from their definition


@dataclass
class Learned:
    """What gates decide, and what follows, in plain loops over tokens.

    Args:
        method: dms, fold or dmc. weights, biases: per full-attention layer [outputs * H, hidden] and [outputs * H].
        scale: factor on the gate's product. delay: W. look_back: newest members of a group that count; None: all.
        sinks: first entries that always stay.
        stored: what is read back of a key or value [..., D] that is stored; a group that merges at once is made of
            what was computed, others of what is read back.
    """

    method: str
    weights: list[Tensor]
    biases: list[Tensor]
    scale: float
    delay: int
    look_back: int | None = None
    sinks: int = 0
    stored: Callable[[Tensor], Tensor] = lambda x: x
    entering: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)  # layer -> hidden states, cos and sin

    def gates(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(marked bool, carried share c, weight b) of each head and token: [H, T] each."""
        outputs = 1 if self.method == "dms" else 2
        product = hidden.double() @ self.weights[number].double().T * self.scale + self.biases[number].double()
        logits = product.T.reshape(outputs, -1, hidden.shape[0])
        marked = logits[0] > 0
        marked[:, : self.sinks + 1] = False
        one = torch.ones_like(logits[0])
        if self.method == "dms":
            return marked, 0 * one, one
        second = torch.sigmoid(logits[1])
        return (marked, second, one) if self.method == "fold" else (marked, one, second)

    def group(self, t: int, marked: Tensor, carry: Tensor, weight: Tensor) -> list[tuple[int, float]]:
        """Members of the group of token t of one head, [T] each: (token, share of the sum that is left of it)."""
        members, left = [(t, float(weight[t]))], 1.0
        while marked[t] and (self.look_back is None or len(members) < self.look_back):
            left *= float(carry[t])
            t -= 1
            members.append((t, left * float(weight[t])))
        return [(token, share) for token, share in members if share > 0]

    def entries(
        self, number: int, key: Tensor, value: Tensor, hidden: Tensor, turn: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values [H, T, D] and log-sizes [H, T] of the groups as they are after each token, and [H, T] marks:
        `key` and `value` are [H, T, D]."""
        marked, carry, weight = self.gates(number, hidden)
        keys, values, sizes = self.stored(key), self.stored(value), torch.zeros(key.shape[:2], dtype=torch.float64)
        key, value = (key, value) if self.delay == 0 else (keys.clone(), values.clone())
        keys, values = keys.clone(), values.clone()
        for head in range(key.shape[0]):
            for t in range(key.shape[1]):
                members = self.group(t, marked[head], carry[head], weight[head])
                total = sum(share for _, share in members)
                sizes[head, t] = math.log(total)
                if len(members) > 1:
                    plain = sum(share / total * turned(key[head, u], turn, u, back=True) for u, share in members)
                    keys[head, t] = self.stored(turned(plain, turn, t))
                    values[head, t] = self.stored(sum(share / total * value[head, u] for u, share in members))
        return keys, values, sizes, marked

    def attend(
        self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: Any
    ) -> Tensor:
        """query [Q, T, D] over key and value [H, T, D] of a layer, the `number`-th with full attention: [T, Q, D]."""
        hidden, turn = self.entering[layer]
        keys, values, sizes, marked = self.entries(number, key, value, hidden, turn)
        key, value = self.stored(key), self.stored(value)
        groups = query.shape[0] // key.shape[0]
        out = torch.zeros_like(query)
        length = key.shape[1]
        for head in range(key.shape[0]):
            bias = torch.full((length, 2 * length), float("-inf"), dtype=torch.float64)  # raw entries, then groups
            leaves, size = marked[head].tolist(), sizes[head].tolist()
            for i in range(length):
                for j in range(i + 1):
                    if i - j < self.delay:
                        bias[i, j] = 0.0
                    elif i - j == self.delay or not leaves[j + 1]:
                        bias[i, length + j] = size[j] if self.method == "fold" else 0.0
            of_head = slice(head * groups, (head + 1) * groups)
            logits = query[of_head] @ torch.cat([key[head], keys[head]]).T * scale
            logits = (logits if cap is None else torch.tanh(logits / cap) * cap) + bias
            out[of_head] = torch.softmax(logits, dim=-1) @ torch.cat([value[head], values[head]])
        return out.transpose(0, 1)


def turned(key: Tensor, turn: Any, position: int, back: bool = False) -> Tensor:
    """A key [D] rotated to `position`, or back from there, by the model's own cos and sin [T, D]; None: not at all."""
    if turn is None:
        return key
    half = key.shape[0] // 2
    cos, sin = turn[0][position].double(), turn[1][position].double() * (-1 if back else 1)
    return key * cos + torch.cat([-key[half:], key[:half]]) * sin


def learned_forward(model: Any, tokens: Tensor, learned: Learned) -> Tensor:
    """Logits [T, vocabulary] of tokens [T]: every full-attention layer attends as `learned` says."""
    windows, length = layer_windows(model), tokens.shape[0]
    full = [layer for layer, window in enumerate(windows) if window is None]
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handles = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layer = module.layer_idx
        if layer not in full:
            return _attend(module, query, key, value, mask, **kwargs)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        q, k, v = (x[0].double() for x in (query, key, value))
        out = learned.attend(full.index(layer), layer, q, k, v, scale, kwargs.get("softcap"))
        return out[None].to(query.dtype), None

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"])[0]
        turn = kwargs.get("position_embeddings")
        learned.entering[module.layer_idx] = hidden, None if turn is None else (turn[0][0], turn[1][0])

    index, masks = torch.arange(length), {}
    for layer, window in enumerate(windows):
        if window is not None:
            near = causal(length) & (index[:, None] - index[None] < window)
            masks[layer] = near.expand(model.config.num_key_value_heads, -1, -1)
    with _masked(model, masks), torch.no_grad():
        AttentionInterface.register(NAME, attend)
        for layer in full:
            module = blocks[layer].attn if hasattr(blocks[layer], "attn") else blocks[layer].self_attn
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            return model(tokens[None], use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
