"""How important each entry is: the attention it received, and the attention it would receive from what may come next.

Both are probabilities of real queries over real entries. `received` uses the last queries as they are: at the end of a
prompt they usually are its question. `foreseen` moves queries sampled since the last moment to positions just ahead,
because the next tokens will ask from there: text to come resembles text seen, and a query differs from its like
elsewhere only by its position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.kernels import reference
from kvpleat.types import PolicyInput

HORIZON = 256  # tokens ahead that sampled queries are moved to
QUERY_BLOCK = 64  # queries scored at a time: bounds the memory of a moment


def received(inputs: PolicyInput, last: int, smoothing: int) -> Tensor:
    """Mean attention from the last `last` queries and the query heads of the group, smoothed: [H, N] float32."""
    assert inputs.queries is not None
    assert inputs.query_positions is not None
    positions = inputs.query_positions[-last:]
    visible = inputs.live[:, None] & (inputs.positions[:, None] <= positions[None, :, None])
    mass = reference.attention_received(
        _grouped(inputs, inputs.queries[:, -last:]),
        inputs.keys,
        inputs.log_weights,
        visible,
        inputs.scale,
        inputs.softcap,
    )
    return smooth(mass.mean(dim=(1, 2)), inputs.live, smoothing)


def foreseen(inputs: PolicyInput, recent: int, smoothing: int) -> Tensor:
    """Root mean square, over sampled queries, of the attention they would pay from positions ahead: [H, N] float32.

    The square rewards what few queries need much. The latest `recent` entries are shown a second time, moved ahead, to
    stand for the text that will then lie between query and cache and draw its share of attention.
    """
    samples, sample_positions = inputs.samples, inputs.sample_positions
    assert samples is not None
    assert sample_positions is not None
    num_heads, num_entries = inputs.live.shape
    index = torch.arange(samples.shape[1], device=samples.device)
    ahead = inputs.position + (index * 97) % HORIZON  # 97 and 256 have no common factor: every distance comes up
    moved = _grouped(
        inputs, reference.rotate(samples, (ahead - sample_positions).expand(samples.shape[:-1]), inputs.rotary).float()
    )
    stand_in = min(recent, HORIZON)
    copies = inputs.live & (inputs.positions >= inputs.position - stand_in)
    width = min(stand_in, num_entries)  # no stream has more of them
    latest = torch.argsort(copies.to(torch.int8), dim=1, descending=True, stable=True)[:, :width]
    copied = inputs.keys.gather(1, latest[..., None].expand(-1, -1, inputs.keys.shape[-1]))
    copied = reference.rotate(copied, torch.full_like(latest, stand_in), inputs.rotary).float()
    keys = torch.cat([inputs.keys.float(), copied], 1).transpose(1, 2)
    bias = torch.zeros(num_heads, num_entries, device=keys.device) if inputs.log_weights is None else inputs.log_weights
    bias = bias.masked_fill(~inputs.live, -math.inf)
    bias = torch.cat([bias, bias.gather(1, latest).masked_fill(~copies.gather(1, latest), -math.inf)], 1)[:, None]
    copied_positions = inputs.positions.gather(1, latest) + stand_in
    total = torch.zeros(num_heads, inputs.shape.group_size, num_entries, device=keys.device)
    for start in range(0, moved.shape[2], QUERY_BLOCK):
        # All entries lie before all moved queries, so that only the copies need causality. Few passes over few numbers
        # at a time: this is the most expensive part of a moment.
        queries = moved[:, :, start : start + QUERY_BLOCK].reshape(num_heads, -1, moved.shape[-1])
        if inputs.softcap is None:
            logits = torch.baddbmm(bias, queries, keys, alpha=inputs.scale)
        else:
            logits = (torch.bmm(queries, keys) * (inputs.scale / inputs.softcap)).tanh_() * inputs.softcap + bias
        logits = logits.view(num_heads, inputs.shape.group_size, -1, logits.shape[-1])
        future = copied_positions[:, None] > ahead[None, start : start + QUERY_BLOCK, None]
        logits[..., num_entries:].masked_fill_(future[:, None], -math.inf)
        paid = torch.softmax(logits, dim=-1)[..., :num_entries]
        total += paid.square().sum(2)
    return smooth((total / moved.shape[2]).sqrt().mean(1), inputs.live, smoothing)


def smooth(scores: Tensor, live: Tensor, width: int) -> Tensor:
    """Mean over `width` neighbours of each stream, its ends and holes left out: [H, N] -> [H, N]."""
    weight = F.avg_pool1d(live.float()[None], width, 1, width // 2)[0]
    total = F.avg_pool1d(torch.where(live, scores, 0.0)[None], width, 1, width // 2)[0]
    return torch.where(live, total / weight.clamp(min=1 / (2 * width)), 0.0)


def carry(old: Tensor | None, new: Tensor, tokens: int, half_life: float) -> Tensor:
    """Old scores fade with the tokens that have passed since; entries never scored (NaN) take the new ones: [H, N]."""
    if old is None:
        return new
    kept = 0.5 ** (tokens / half_life) if math.isfinite(half_life) else 1.0
    return torch.where(old.isnan(), new, kept * old + (1 - kept) * new)


def _grouped(inputs: PolicyInput, queries: Tensor) -> Tensor:
    """[Q, W, D] -> [H, G, W, D]."""
    return queries.reshape(inputs.live.shape[0], inputs.shape.group_size, *queries.shape[1:])
