"""Attention of the engine, behind transformers' AttentionInterface: a flattened batch over the cache on a device.

transformers calls `attention_forward` once per layer with the tokens of a step, [1, T]: first one for each seat, then
the chunks of prompts. Every layer writes first and attends then, so that each token sees itself.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.engine.observed import Watched, remember
from kvpleat.errors import AttachError
from kvpleat.hf import borrowed
from kvpleat.kernels import decode, extend, prefill, update
from kvpleat.kernels.decode import Work
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.kernels.extend import Chunks
from kvpleat.kernels.prefill import Recent
from kvpleat.kernels.reference import Turn
from kvpleat.policies.base import Policy

IMPLEMENTATION = "kvpleat_engine"  # the name in transformers' AttentionInterface


@dataclass(frozen=True)
class Tokens:
    """One new token of each of the first n seats.

    Args:
        pool: the rows of these seats. positions: [n] int32. active: [n] bool, seats that have a token. work: planned.
        turn: how keys are rotated at positions - W, [n, r / 2]; None: nothing merges.
        last: where queries are remembered, [n, L, Q, W, D]; None: they are not.
    """

    pool: DevicePool
    positions: Tensor
    active: Tensor
    work: Work
    turn: Turn | None
    last: Tensor | None = None


@dataclass(frozen=True)
class Prompts:
    """The next tokens of some prompts. chunks: where they lie. recent: what they see, where a window cuts it. watched:
    what is remembered of them."""

    pool: DevicePool
    chunks: Chunks
    recent: Recent | None
    watched: Watched | None = None


@dataclass
class Step:
    """One forward, as all its layers see it: tokens come first, then prompts; one of them may be missing. Not frozen:
    torch.compile would look at all that is in it.

    Args:
        policy: of the model. columns: pages of a stream that this step can reach, for those who read them all.
        layers: of the model that follow the policy, by their place among these. sliding: the same tokens and prompts
            for layers with a sliding window of their own.

    Attributes:
        said: what gates put out about all tokens, by layer: [outputs, 1, H, T]; empty where there are none.
    """

    policy: Policy
    tokens: Tokens | None
    prompts: Prompts | None
    columns: int
    layers: dict[int, int]
    sliding: tuple[Tokens | None, Prompts | None] = None, None
    said: dict[int, Tensor] = field(default_factory=dict)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # layers differ in it, and share the rest
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    kvpleat_step: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind transformers' AttentionInterface.

    Args:
        query: [1, Q, T, D] rotated. key, value: [1, H, T, D]. kvpleat_step: of the runner.

    Returns:
        [1, T, Q, D] and None.
    """
    if kvpleat_step is None:
        raise AttachError(
            "The model ran outside of the engine that lives on it, so its cache is unknown. Close the engine first: "
            "llm.close()."
        )
    step, layer = kvpleat_step, int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    place = step.layers.get(layer)
    logits: Tensor | None
    if place is None:
        tokens, prompts = step.sliding
        query, logits = query[0], query.new_ones((1, *key.shape[:3]), dtype=torch.float32)  # above 0: all are marked
    else:
        tokens, prompts = step.tokens, step.prompts
        query, logits = borrowed.clear(query, step.policy)[0], _said(step, layer)
        _observe(step, place, query)
    count = 0 if tokens is None else tokens.active.shape[0]
    parts: list[Tensor] = []
    if tokens is not None:
        q, k, v = (x[:, :count].transpose(0, 1) for x in (query, key[0], value[0]))
        said = None if logits is None else logits[:, 0, :, :count].transpose(1, 2)
        parts.append(_decode(tokens, layer, q, k, v, said, scale, softcap, step.columns))
    if prompts is not None:
        q, k, v = (x[:, count:] for x in (query, key[0], value[0]))
        said = None if logits is None else logits[:, 0, :, count:]
        parts.append(_prefill(prompts, layer, q, k, v, said, scale, softcap).transpose(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _observe(step: Step, place: int, query: Tensor) -> None:
    """Remember queries [Q, T, D] of a layer, where the policy looks back at some."""
    tokens, prompts, count = step.tokens, step.prompts, 0
    if tokens is not None:
        count = tokens.active.shape[0]
        if tokens.last is not None:
            goes_well = tokens.active & (tokens.pool.failed == 0)
            remember(tokens.last, place, tokens.positions, goes_well, query[:, :count].transpose(0, 1))
    if prompts is not None and prompts.watched is not None:
        prompts.watched.see(place, query[:, count:])


def _said(step: Step, layer: int) -> Tensor | None:
    """What gates put out about the tokens, [outputs, 1, H, T]; None: there are none."""
    logits = step.said.pop(layer, None)
    if logits is None and step.policy.delay is not None:
        raise AttachError(
            f"Attention of layer {layer} ran without its gates: its module was replaced after the engine was made. "
            "Close the engine, replace modules first, and make it again."
        )
    return logits


def _decode(
    tokens: Tokens,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    said: Tensor | None,
    scale: float,
    softcap: float | None,
    columns: int,
) -> Tensor:
    """One token of each seat: q [n, Q, D], k and v [n, H, D], said [outputs, n, H] -> [n, Q, D]."""
    pool = tokens.pool
    if said is None:
        update.append(pool, layer, tokens.positions, tokens.active, k, v)
    else:
        update.step(pool, layer, tokens.positions, tokens.active, k, v, said, tokens.turn)
    table, lengths = pool.page_table[:, layer, :, :columns], pool.lengths[:, layer]
    return decode.attend(
        q, pool.key, pool.value, table, lengths, tokens.work.layer(layer), scale, pool.log_weight, softcap,
        active=tokens.active,
    )  # fmt: skip


def _prefill(
    prompts: Prompts,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    said: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Chunks: q [Q, T, D], k and v [H, T, D], said [outputs, H, T] -> [Q, T, D]."""
    pool, chunks = prompts.pool, prompts.chunks
    if said is None:
        past = extend.append(pool, layer, chunks, k, v)
        return prefill.attend(q, k, v, chunks.rows, past, prompts.recent, scale, softcap)
    seen = extend.extend(pool, layer, chunks, k, v, said)
    return prefill.attend(q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, scale, softcap)
