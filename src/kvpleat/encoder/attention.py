"""The attention function of an encoder whose tokens merge, behind transformers' AttentionInterface."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpleat.encoder.calls import Call
from kvpleat.encoder.tokens import Tokens, shorten
from kvpleat.errors import AttachError
from kvpleat.kernels import sized
from kvpleat.kernels.grouping import Groups, merge, one_of_each

IMPLEMENTATION = "kvpleat_encoder"
OBSERVED = 8  # every eighth query is asked what attention tokens receive


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kvpleat_merge: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with each key's log size added to its logits: [B, H, T, D] -> [B, T, H, D].

    Where the layer's keys come from the tokens before they merged, so do the queries that arrive here; they merge
    first, and what comes out is padded to T tokens, which the hook after the attention module cuts off again.
    """
    call = kvpleat_merge
    if call is None:
        raise AttachError(
            "A model that shares its config object with an attached encoder was called, and would use the other's "
            "attention. Give each model its own config (copy.deepcopy), or detach first."
        )
    columns, tokens = query.shape[2], call.tokens
    keys_of = tokens
    if call.longer is not None:
        keys_of = call.longer.tokens
        place, width = call.longer.place, tokens.sizes.shape[1]
        groups = Groups(place, one_of_each(place, keys_of.real, width), tokens.real)
        query = _split(merge(groups, _joined(query), keys_of.sizes), query.shape[1])
    if call.policy.what == "kv":
        keys_of, key, value = _merged_keys(call, key, value)
    make = functools.partial(_bias, keys_of, tokens, sliding_window, query.dtype)
    # In a sliding window the queries that are asked do not see every key: importance then stays what it was.
    observed = call.merges_before(call.layer + 1) and sliding_window is None
    sized_keys = sliding_window is not None or keys_of.bias_needed
    if sized_keys and sized.runs_on_triton(query, key, dropout):
        out = _by_kernel(call, keys_of, query, key, value, scaling, sliding_window, columns)
        bias = make() if observed else None
    else:
        bias = call.once(("bias", sliding_window), make) if keys_of is tokens else make()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
        out = _widened(out.transpose(1, 2), columns)
    if observed:
        _observe(call, query, key, value, bias, scaling)
    return out, None


def _by_kernel(
    call: Call, keys_of: Tokens, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None,
    columns: int,
) -> Tensor:  # fmt: skip
    """[B, columns, H, D]: attention in one kernel, whose columns behind the queries' are undefined."""

    def make() -> tuple[Tensor, Tensor]:
        bias, sizes = keys_of.bias, keys_of.sizes
        whole = torch.full_like(sizes[:, 0], sizes.shape[1])  # padding may stand anywhere until tokens merge
        counts = whole if keys_of.plain else keys_of.real.sum(1)
        return torch.zeros_like(sizes) if bias is None else bias[:, 0, 0], counts.int()

    bias, counts = call.once("sizes of keys", make) if keys_of is call.tokens else make()
    near = None if window is None else (window, call.tokens.position, keys_of.position)
    return sized.attend(query, key, value, bias, counts, near, scaling or query.shape[-1] ** -0.5, columns)


def _widened(states: Tensor, columns: int) -> Tensor:
    """[B, T, H, D] -> [B, columns, H, D] with zeros behind."""
    rows, tokens, *rest = states.shape
    if tokens == columns:
        return states.contiguous()
    out = states.new_zeros(rows, columns, *rest)
    out[:, :tokens] = states
    return out


def _joined(states: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    joined: Tensor = states.transpose(1, 2).flatten(2)
    return joined


def _split(states: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    rows, tokens, channels = states.shape
    return states.view(rows, tokens, heads, channels // heads).transpose(1, 2)


def _bias(keys: Tokens, queries: Tokens, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: log sizes, padding, and a sliding window (tokens seen on each side, plus one) over
    the columns where the tokens stood."""
    bias = keys.bias
    if window is not None:
        bias = keys.sizes.new_zeros(1, 1, 1, 1) if bias is None else bias
        inside = (queries.position[:, :, None] - keys.position[:, None]).abs() < window
        bias = torch.where(inside[:, None], bias, bias.new_tensor(torch.finfo(bias.dtype).min))
    if bias is None:
        return None
    return bias.to(dtype).clamp(min=torch.finfo(dtype).min)


def _merged_keys(call: Call, key: Tensor, value: Tensor) -> tuple[Tokens, Tensor, Tensor]:
    """Keys and values of a layer merged by how alike the keys are, where queries stay as they are."""
    heads, channels = key.shape[1], key.shape[1] * key.shape[3]
    both = torch.cat((_joined(key), _joined(value)), dim=-1)
    tokens, both, _ = shorten(call.tokens, both, call.policy, call.kept[call.layer], channels)
    return tokens, _split(both[..., :channels], heads), _split(both[..., channels:], heads)


@torch.no_grad()
def _observe(call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float | None) -> None:
    """Importance of each token for the next merge: attention received times the norm of the value, over heads."""
    asked = query[:, :, ::OBSERVED]
    logits = asked @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if bias is not None:
        logits = logits + (bias[:, :, ::OBSERVED] if bias.shape[2] > 1 else bias)
    weights = call.tokens.sizes[:, None, ::OBSERVED, None]
    mass = ((logits.to(weights.dtype).softmax(-1) * weights).sum(2) * value.norm(dim=-1)).sum(1)
    call.observe(mass)
