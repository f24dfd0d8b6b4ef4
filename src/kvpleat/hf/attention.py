"""Attention over a compressed cache: append the new entries, attend, and at a moment ask the policy and apply its
decision.

This is the main path of kvpleat: transformers calls `attention_forward` once per layer, with the keys and values of the
new tokens only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pieces import readable, stream_pieces
from kvpleat.errors import AttachError, UnsupportedError
from kvpleat.hf import gated
from kvpleat.hf.borrowed import clear
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import sliding_attention
from kvpleat.kernels import cpu, reference, sdpa
from kvpleat.policies.base import LayerScores, check_scores
from kvpleat.types import Marks, Phase, PolicyInput

IMPLEMENTATION = "kvpleat"  # the name in transformers' AttentionInterface and AttentionMaskInterface


@dataclass
class ForwardCall:
    """One forward through the decoder, as all its layers see it.

    Args:
        cache: what the tokens are appended to.
        original: the model's own attention implementation, for its sliding-window layers.
        tokens: [R, T] bool, False for padding; None: no padding.
        num_tokens: new tokens of each row.
        phase: of the tokens.
        ends_prompt: whether a prompt ends with this call.
        moments: per row the moments within this call, the prompt's end included.
        marks: per layer what gates say about the tokens [R, H, T]; empty where the policy decides at moments.
    """

    cache: PleatedCache
    original: str
    tokens: Tensor | None
    num_tokens: list[int]
    phase: Phase
    ends_prompt: bool
    moments: list[list[int]] = field(default_factory=list)
    marks: dict[int, Marks] = field(default_factory=dict)

    def competes(self, row: int, moment: int) -> bool:
        """Whether layers compete at a moment: at ends of prompts and while decoding, when every layer comes to it."""
        is_last = moment == self.cache.positions[row] + self.num_tokens[row]
        return is_last and (self.ends_prompt or self.phase is Phase.DECODE)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    kvpleat_call: ForwardCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function behind transformers' AttentionInterface.

    Args:
        query: [R, Q, T, D] rotated. key, value: [R, H, T, D] of the new tokens.
        attention_mask: used by sliding-window layers only.
        kvpleat_call: put there by the hook on the decoder.

    Returns:
        [R, T, Q, D] and None.
    """
    if kvpleat_call is None:
        raise AttachError(
            "An attention layer ran outside the decoder that kvpleat is attached to, so its cache is unknown. Call "
            "the causal LM or its decoder; if two models share one config object, give each its own (copy.deepcopy)."
        )
    facts = kvpleat_call.cache.pleated.facts
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if index in facts.sliding:
        attend = sliding_attention(module, kvpleat_call.original)
        if softcap is not None:
            kwargs["softcap"] = softcap
        out: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    if {key.dtype, value.dtype} != {facts.shape.dtype}:
        raise UnsupportedError(
            f"The attention computes in {key.dtype} and {value.dtype} and the cache was made for {facts.shape.dtype}. "
            "Leave autocast, and load the model in the dtype it runs in."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = clear(query, kvpleat_call.cache.pleated.policy)
    attended = _attend(kvpleat_call, facts.layers.index(index), query, key, value, scale, softcap)
    return attended.transpose(1, 2).contiguous(), None


def _attend(
    call: ForwardCall, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """All rows of one compressed layer: query [R, Q, T, D], key and value [R, H, T, D] -> [R, Q, T, D]."""
    if query.shape[2] == 1 and call.tokens is None and query.device.type == "cpu":
        return _decode_step(call, layer, query, key, value, scale, softcap)
    out = torch.zeros_like(query)
    for row, count in enumerate(call.num_tokens):
        kept = slice(None) if call.tokens is None else call.tokens[row]
        if count or call.moments[row]:
            q, k, v = query[row, :, kept], key[row, :, kept], value[row, :, kept]
            if _kv(call).delayed is not None:
                out[row, :, kept] = gated.attend_row(call, layer, row, kept, (q, k, v), scale, softcap)
            else:
                out[row, :, kept] = _attend_row(call, layer, row, q, k, v, scale, softcap)
    return out


def _decode_step(
    call: ForwardCall, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """One token of every row on a CPU: query [R, Q, 1, D], key and value [R, H, 1, D] -> [R, Q, 1, D]."""
    cache, kv = call.cache, _kv(call)
    if kv.delayed is not None:
        gated.step(call, kv, layer, key, value)
    else:
        positions = torch.tensor(cache.positions, dtype=torch.int32)[:, None]
        kv.append_rows(layer, list(range(kv.num_rows)), key, value, positions)
    coded = kv.shape.bits is not None
    asked = reference.spread(query) if coded else query  # what is mixed like the stored keys gives the same products
    scratch = cpu.scratch_for(asked) if coded else None
    arrays = readable(kv)
    out = torch.empty_like(asked)
    grouped_q = asked.view(kv.num_rows, kv.shape.num_kv_heads, kv.shape.group_size, -1)
    grouped_out = out.view(grouped_q.shape)
    for row, lengths in enumerate(kv.lengths[:, layer].tolist()):
        for head, length in enumerate(lengths):
            keys, values, bias = stream_pieces(arrays, kv.pieces(layer, row, head), length)
            grouped_out[row, head] = cpu.attend_stream(
                grouped_q[row, head], keys, values, bias, scale, softcap, scratch
            )
        kv.observed.observe(layer, row, query[row], cache.positions[row])
        if kv.observed.window and call.phase is Phase.PREFILL:
            kv.observed.sample(layer, row, query[row], cache.positions[row], cache.last_moments[row])
        for moment in call.moments[row]:
            decide(call, layer, row, moment, cache.last_moments[row], scale, softcap)
    return reference.spread(out).to(query.dtype) if coded else out


def _attend_row(
    call: ForwardCall, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The new tokens of one row, cut at its moments: q [Q, T, D], k and v [H, T, D] -> [Q, T, D]."""
    cache, kv = call.cache, _kv(call)
    start, since = cache.positions[row], cache.last_moments[row]
    samples = kv.observed.window and call.phase is Phase.PREFILL
    out = torch.empty_like(q)
    for first, last, moment in _segments(start, start + q.shape[1], call.moments[row]):
        new = slice(first - start, last - start)
        if last > first:
            out[:, new] = _attend_segment(call, layer, row, q[:, new], k[:, new], v[:, new], first, scale, softcap)
            kv.observed.observe(layer, row, q[:, new], first)
            if samples:
                kv.observed.sample(layer, row, q[:, new], first, since)
        if moment is not None:
            decide(call, layer, row, moment, since, scale, softcap)
            since = moment
    return out


def _segments(start: int, stop: int, moments: list[int]) -> Iterator[tuple[int, int, int | None]]:
    """(first, last, moment at `last`) pieces of [start, stop), cut at the moments."""
    for moment in moments:
        yield start, moment, moment
        start = moment
    if start < stop:
        yield start, stop, None


def _attend_segment(
    call: ForwardCall,
    layer: int,
    row: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """New tokens of one row with no moment between them: q [Q, T, D], k and v [H, T, D], the first at `first`."""
    kv, policy = _kv(call), call.cache.pleated.policy
    positions = torch.arange(first, first + q.shape[1], dtype=torch.int32, device=q.device)
    starts = policy.visible_from(positions, kv.shape)
    past = kv.entries(layer, row)
    k, v = kv.append(layer, row, k, v, positions)  # as they are stored, which is what every later query will see
    if past.live.shape[1] == 0 and starts is None and softcap is None:
        return sdpa.attend_causal(q[None], k[None], v[None], scale)[0]
    bias = past.fields.get("log_weight")
    if bias is not None or not bool(past.live.all()):
        bias = torch.zeros_like(past.live, dtype=torch.float32) if bias is None else bias
        bias = bias.masked_fill(~past.live, -torch.inf)
    visible_past = visible_new = None
    if starts is not None:

        def visible(keys: Tensor) -> Tensor:
            return (keys[..., None, :] >= starts[:, None]) | (keys[..., None, :] < policy.num_sinks)

        visible_past, visible_new = visible(past.fields["position"]), visible(positions)
    return sdpa.attend_chunk(q, (past.keys, past.values), (k, v), bias, visible_past, visible_new, scale, softcap)


def decide(
    call: ForwardCall, layer: int, row: int, moment: int, since: int, scale: float, softcap: float | None
) -> None:
    """Ask the policy about one layer of one row at a moment, the last one being at `since`, and apply its decision."""
    cache, kv = call.cache, _kv(call)
    policy = cache.pleated.policy
    entries = kv.entries(layer, row)
    queries: tuple[Tensor | None, Tensor | None] = (None, None)
    samples: tuple[Tensor | None, Tensor | None] = (None, None)
    if policy.observation_window:
        queries = kv.observed.recent(layer, row, moment)
        samples = kv.observed.take_samples(layer, row, moment, since)
    competes = call.competes(row, moment)
    inputs = PolicyInput(
        position=moment,
        layer=layer,
        shape=kv.shape,
        positions=entries.fields["position"],
        live=entries.live,
        keys=entries.keys,
        values=entries.values,
        log_weights=entries.fields.get("log_weight"),
        scores=entries.fields.get("score"),
        queries=queries[0],
        query_positions=queries[1],
        samples=samples[0],
        sample_positions=samples[1],
        last_moment=since,
        scale=scale,
        softcap=softcap,
        rotary=kv.rotary,
        layer_share=cache.shares[row][layer],
        competes=competes,
    )
    decision = policy.decide(inputs)
    if decision is not None:
        check_scores(decision, layer, moment)
        kv.apply(layer, row, decision)
    if competes and call.phase is Phase.PREFILL and layer + 1 < kv.shape.num_layers:
        squeeze(cache, row, moment, layer + 1)


def squeeze(cache: PleatedCache, row: int, moment: int, num_layers: int) -> None:
    """Let the first `num_layers` layers of a row compete, where they hold more than the row's budget.

    What loses among some layers would lose among all, so that competing early changes the peak and not the outcome.
    """
    kv, policy = cache.kv, cache.pleated.policy
    assert kv is not None
    if not policy.over_budget(kv.lengths[row, :num_layers], moment, kv.shape):
        return
    final = num_layers == kv.shape.num_layers
    layers = []
    for layer in range(num_layers):
        fields, live = kv.fields(layer, row)
        layers.append(LayerScores(fields["score"], fields["position"], live, fields.get("log_weight")))
    for layer, decision in enumerate(policy.squeeze(layers, moment, kv.shape, final)):
        kv.apply(layer, row, decision)


def finish(call: ForwardCall) -> None:
    """After all layers: let them compete where they came to a common moment, and note the progress of every row."""
    cache, kv = call.cache, _kv(call)
    for row, moments in enumerate(call.moments):
        if moments and call.competes(row, moments[-1]):
            squeeze(cache, row, moments[-1], kv.shape.num_layers)
            held = kv.num_pages[row].sum(dim=1).double()
            cache.shares[row] = (held / held.sum().clamp(min=1)).tolist()
        if moments:
            cache.last_moments[row] = moments[-1]
        cache.positions[row] += call.num_tokens[row]
    if call.ends_prompt and kv.pool.shrinks_in_place:
        kv.pool.trim()  # what the prompt needed on its way goes back to the system, not only to the pool


def _kv(call: ForwardCall) -> PagedKVCache:
    assert call.cache.kv is not None, "the hook on the decoder starts the cache"
    return call.cache.kv
