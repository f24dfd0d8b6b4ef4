"""Policies whose moments follow from positions: what tokens of a prompt see, and what leaves after a step.

By the time of a decoded token the moments have evicted what it may not see, so only prompts need a rule. The host knows
all positions, hence which rows have come to a moment; what leaves is worked out on the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpleat.engine.rows import Feed, Plan
from kvpleat.hf.families import ModelFacts
from kvpleat.kernels import update
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.policies.base import Policy
from kvpleat.types import KVShape, Phase


def moves(policy: Policy, facts: ModelFacts) -> Tensor:
    """[L] bool layers of the model where any entry may move: where some leave at moments, and others take their places,
    and where a sliding window of the model's own drops all."""
    moving = policy.delayed is None and _leave(policy, facts.shape)
    found = torch.full((len(facts.layers) + len(facts.sliding),), moving)
    found[list(facts.sliding)] = True
    return found


def _leave(policy: Policy, shape: KVShape) -> bool:
    """Whether entries ever leave at moments."""
    return bool(policy.moments(0, 1 << 20, Phase.DECODE, 0, shape))


def cuts(policy: Policy, shape: KVShape) -> bool:
    """Whether tokens of prompts may see less than all before them, because of a window."""
    return policy.visible_from(torch.zeros(1, dtype=torch.int64), shape) is not None


def reach(policy: Policy, shape: KVShape, chunks: Sequence[Feed]) -> Tensor | None:
    """[T] int32 the first position that each token of the chunks sees, on the host; None: all before it."""
    positions = torch.cat([torch.arange(feed.start, feed.start + feed.size) for feed in chunks])
    starts = policy.visible_from(positions, shape)
    return None if starts is None else starts.int()


def slide(pool: DevicePool, policy: Policy, facts: ModelFacts, plan: Plan, sent: Callable[[Tensor], Tensor]) -> None:
    """After a step: evict what is not visible any more of rows that came to a moment.

    Args:
        pool: the rows of the step. sent: brings a tensor to the device.
    """
    if not _leave(policy, facts.shape):
        return
    come = {feed: moment for feed in plan.feeds if (moment := _moment(policy, facts.shape, feed))}
    if not come:
        return
    starts = policy.visible_from(torch.tensor([*come.values(), *(feed.start for feed in come)]), facts.shape)
    assert starts is not None, "refused where a policy has moments and no window"
    after, before = starts.view(2, -1).tolist()
    # What a row holds now: the window before its first new token, which that token saw, and the new ones.
    longest = max(feed.start + feed.size - old for feed, old in zip(come, before, strict=True)) + policy.num_sinks
    columns = min(-(-longest // pool.shape.page_size), pool.page_table.shape[-1])
    told = torch.zeros(2, pool.lengths.shape[0], dtype=torch.int32)
    for feed, start in zip(come, after, strict=True):
        told[0, feed.seat], told[1, feed.seat] = 1, start
    active, start = sent(told)
    active = active != 0
    for layer in facts.layers:
        pages = pool.page_table[:, layer, :, :columns].clamp(min=0).long()
        position = pool.arrays["position"][pages].flatten(2)
        keep = (position >= start[:, None, None]) | (position < policy.num_sinks)
        update.evict(pool, layer, keep, active)
    update.give_back(pool)


def _moment(policy: Policy, shape: KVShape, feed: Feed) -> int:
    """The last moment that a row came to in a step; 0: none."""
    moments = policy.moments(feed.start, feed.start + feed.size, Phase.DECODE, feed.start, shape)
    return moments[-1] if moments else 0
