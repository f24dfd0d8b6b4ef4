"""Attention among tokens of which each stands for a number of tokens: where it runs.

In torch it is SDPA with a bias for each key, or for each pair where a window cuts (`encoder.attention`): the
specification. On a GPU one Triton kernel (sized_triton.py) takes the biases by key, and of a window reads no key that
none of its queries sees; SDPA reads a whole matrix of biases there.
"""

import torch
from torch import Tensor

from kvpleat.kernels.grouping import HAS_TRITON

MAX_HEAD = 128  # channels of a head
MAX_KEYS = 16384  # of a row, where there is a window: one program looks through their positions


def runs_on_triton(query: Tensor, key: Tensor, dropout: float) -> bool:
    """On a GPU, where Triton is installed and nothing is learned: the kernel has no gradient, and drops nothing.

    Args:
        query, key: [B, H, T, D], [B, H, S, D].
    """
    learned = dropout > 0 or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    fits = query.dtype != torch.float64 and query.shape[3] <= MAX_HEAD and key.shape[2] <= MAX_KEYS
    return query.device.type == "cuda" and HAS_TRITON and not learned and fits


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, counts: Tensor, window: tuple[int, Tensor, Tensor] | None,
    scale: float, columns: int,
) -> Tensor:  # fmt: skip
    """softmax(query @ key.T * scale + bias) @ value in Triton.

    Args:
        query: [B, H, T, D]. key, value: [B, H, S, D].
        bias: [B, S] float32, finite.
        counts: [B] int32, keys of each row, which come first.
        window: how near a key must be (less than that), and where queries [B, T] and keys [B, S] are, int64, keys in
            order; or None.
        columns: of the output, at least T.

    Returns:
        [B, columns, H, D], undefined from T on.
    """
    from kvpleat.kernels import sized_triton

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    near, *places = window or (0, counts, counts)
    queries_at, keys_at = (x.contiguous() for x in places)
    out: Tensor = sized_triton.attend(
        query, key, value, bias.contiguous(), counts, queries_at, keys_at, near, scale, columns
    )
    return out
