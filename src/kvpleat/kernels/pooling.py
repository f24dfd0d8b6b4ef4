"""Running weighted sums over groups of tokens: what merging one entry after the other comes to, for a whole chunk at
once, with gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.kernels.reference import Turn, rotate_by

BLOCK = 64  # tokens whose sums are one matrix product
LEAST_WEIGHT = 1e-20  # a group whose weights were all 0 would be 0 / 0


class Newest(NamedTuple):
    """What later tokens need of the groups so far: the sums after the newest token, or its last members.

    members: [..., K, C] the sum (K = 1), or what each of the newest members added (K = look_back - 1).
    log_carry: [..., K] of each member; nothing where the sum is kept (K = 0).
    """

    members: Tensor
    log_carry: Tensor


def scan(x: Tensor, log_carry: Tensor, start: Tensor | None = None) -> Tensor:
    """X_t = exp(log_carry_t) * X_{t-1} + x_t along the tokens.

    Args:
        x: [..., T, C] what each token adds.
        log_carry: [..., T] of the share of the state before that lives on, at most 0; -inf starts anew.
        start: [..., C] the state before the first token; None: nothing.

    Returns:
        [..., T, C] the state after each token, in x's dtype. Memory grows with T, not with its square; no factor is
        ever above 1, so that nothing overflows or is cancelled.
    """
    tokens = x.shape[-2]
    if start is not None:
        first = x[..., :1, :] + log_carry[..., :1, None].exp().to(x.dtype) * start[..., None, :]
        x = first if tokens == 1 else torch.cat([first, x[..., 1:, :]], dim=-2)
    if tokens <= 1:
        return x
    size = min(BLOCK, tokens)
    missing = -tokens % size
    blocks = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, size))
    logs = torch.nn.functional.pad(log_carry, (0, missing)).unflatten(-1, (-1, size))
    starts = logs == -torch.inf
    group = starts.cumsum(-1)  # tokens of one block between which nothing starts anew
    total = torch.where(starts, 0.0, logs).double().cumsum(-1)  # small differences of large sums are taken of it
    reaches = torch.ones(size, size, dtype=torch.bool, device=x.device).tril() & (
        group[..., :, None] == group[..., None, :]
    )
    factor = torch.where(reaches, total[..., :, None] - total[..., None, :], -torch.inf).to(x.dtype).exp()
    within = factor @ blocks
    if blocks.shape[-3] > 1:
        from_before = torch.where(group == 0, total, -torch.inf)  # log share of the state before the block
        after = scan(within[..., -1, :], from_before[..., -1])
        before = torch.nn.functional.pad(after[..., :-1, :], (0, 0, 1, 0))
        within = within + from_before[..., None].exp().to(x.dtype) * before[..., None, :]
    out: Tensor = within.flatten(-3, -2)[..., :tokens, :]
    return out


def banded(x: Tensor, log_carry: Tensor, look_back: int, before: Newest) -> tuple[Tensor, Newest]:
    """`scan` where only the newest `look_back` members of a group count.

    Args:
        x, log_carry: as in `scan`.
        look_back: members, at least 1.
        before: the look_back - 1 members before the first token.

    Returns:
        [..., T, C] the sum after each token, in x's dtype, and the members that count for the next ones.
    """
    known, tokens = look_back - 1, x.shape[-2]
    members = torch.cat([before.members, x], dim=-2)
    logs = torch.cat([before.log_carry, log_carry], dim=-1)
    carry = logs.exp().to(x.dtype)
    share = torch.ones_like(carry[..., known:])
    total = x
    for back in range(1, look_back):
        first = known - back
        share = share * carry[..., first + 1 : first + 1 + tokens]
        total = total + share[..., None] * members[..., first : first + tokens, :]
    return total, Newest(members[..., tokens:, :], logs[..., tokens:])


def groups(
    keys: Tensor,
    values: Tensor,
    turn: Turn | None,
    log_carry: Tensor,
    weight: Tensor | None,
    before: Newest,
    look_back: int | None,
) -> tuple[Tensor, Tensor, Tensor, Newest]:
    """What each token's group is right after it joined: the weighted mean of its members, at the token's position.

    Args:
        keys, values: [..., T, D] of each token alone, keys rotated.
        turn: how keys at the tokens' positions are rotated, [..., T] or [T]; None: they are not.
        log_carry: [..., T] log share of the group before that joins, -inf where the token opens a group.
        weight: [..., T] of each token; None: 1.
        before: groups before the first token, of sums [..., K, 2 D + 1]: keys before rotation, values, sizes.
        look_back: members of a group that count; None: all.

    Returns:
        keys and values [..., T, D], float32 or wider; log of the group's size [..., T]; what later tokens need.
    """
    head_dim = keys.shape[-1]
    plain = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if turn is not None:
        plain = rotate_by(plain, Turn(turn.cos, -turn.sin))
    x = torch.cat([plain, values.to(plain.dtype), torch.ones_like(plain[..., :1])], dim=-1)
    if weight is not None:
        x = x * weight[..., None].to(x.dtype).clamp(min=LEAST_WEIGHT)
    if look_back is None:
        sums = scan(x, log_carry, before.members[..., 0, :])
        after = Newest(sums[..., -1:, :], before.log_carry)
    else:
        sums, after = banded(x, log_carry, look_back, before)
    size = sums[..., -1]
    mean = sums[..., :-1] / size[..., None]
    mean_keys = mean[..., :head_dim] if turn is None else rotate_by(mean[..., :head_dim], turn)
    return mean_keys, mean[..., head_dim:], size.log(), after
