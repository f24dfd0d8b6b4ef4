"""Running weighted sums over groups of tokens: what merging one entry after the other comes to, for a whole chunk at
once, with gradients.
"""

import torch
from torch import Tensor

BLOCK = 64  # tokens whose sums are one matrix product


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
    if start is not None:
        first = x[..., :1, :] + log_carry[..., :1, None].exp().to(x.dtype) * start[..., None, :]
        x = torch.cat([first, x[..., 1:, :]], dim=-2)
    tokens = x.shape[-2]
    if tokens <= 1:
        return x
    size = min(BLOCK, tokens)
    missing = -tokens % size
    blocks = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, size))
    logs = torch.nn.functional.pad(log_carry, (0, missing)).unflatten(-1, (-1, size))
    starts = logs == -torch.inf
    group = starts.cumsum(-1)  # tokens of one block between which nothing starts anew
    total = torch.where(starts, 0.0, logs).cumsum(-1)
    reaches = torch.ones(size, size, dtype=torch.bool, device=x.device).tril() & (
        group[..., :, None] == group[..., None, :]
    )
    factor = torch.where(reaches, total[..., :, None] - total[..., None, :], -torch.inf).exp()
    within = factor.to(x.dtype) @ blocks
    if blocks.shape[-3] > 1:
        from_before = torch.where(group == 0, total, -torch.inf)  # log share of the state before the block
        after = scan(within[..., -1, :], from_before[..., -1])
        before = torch.nn.functional.pad(after[..., :-1, :], (0, 0, 1, 0))
        within = within + from_before[..., None].exp().to(x.dtype) * before[..., None, :]
    return within.flatten(-3, -2)[..., :tokens, :]
