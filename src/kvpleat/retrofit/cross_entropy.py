"""The language model loss of hidden states, in chunks, so that the vocabulary never makes a large tensor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.errors import OptionError
from kvpleat.retrofit.data import Batch

CHUNK = 4096  # tokens whose logits exist at the same time


def next_tokens(batch: Batch) -> Tensor:
    """[B, T] the token after each one, -1 where it is of another document, padding, or none."""
    follows = torch.where(batch.loss_weight[:, 1:] > 0, batch.tokens[:, 1:], -1)
    return nn.functional.pad(follows, (0, 1), value=-1)


def cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, softcap: float | None = None, compile: bool = False
) -> Tensor:
    """Sum of -log p(target) in nats, differentiable; gradients are computed on the way forward.

    Args:
        hidden: [N, hidden] before the head.
        head: linear layer onto the vocabulary.
        targets: [N] next token, -1 where there is none.
        softcap: of the model's final logits.
        compile: whether torch.compile fuses what is done to a chunk.

    Raises:
        OptionError: the head is no plain linear layer.
    """
    if not isinstance(head, nn.Linear):
        raise OptionError(f"The model's head is a {type(head).__name__}; only plain linear heads can be trained here.")
    if not torch.is_grad_enabled():
        return _measure(hidden, head.weight, head.bias, targets, softcap, compile, (None, None, None))
    total: Tensor = _CrossEntropy.apply(hidden, head.weight, head.bias, targets, softcap, compile)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        compile: bool,
    ) -> Tensor:
        given = (hidden, weight, bias)
        grads = [
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip(given, ctx.needs_input_grad, strict=False)
        ]
        ctx.save_for_backward(*grads)
        return _measure(hidden, weight, bias, targets, softcap, compile, grads)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if x is None else x * slope.to(x.dtype) for x in ctx.saved_tensors), None, None, None)


def _measure(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    compile: bool,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """The sum. Gradients are added to the zeros in `grads`: of hidden, weight and bias, where they are wanted."""
    chunk = _compiled() if compile else _chunk
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    w, b = weight.to(low), None if bias is None else bias.to(low)
    grad, weight_grad, bias_grad = grads
    total = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=hidden.device)
    for first in range(0, len(hidden), CHUNK):
        part = slice(first, first + CHUNK)
        x = hidden[part].to(low)
        nll, slope = chunk(nn.functional.linear(x, w, b), targets[part], softcap, any(g is not None for g in grads))
        total += nll
        if slope is None:
            continue
        if grad is not None:
            grad[part] = slope @ w
        if weight_grad is not None:
            weight_grad += slope.T @ x
        if bias_grad is not None:
            bias_grad += slope.sum(0)
    return total


def _chunk(logits: Tensor, targets: Tensor, softcap: float | None, sloped: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of -log p, its gradient [n, vocabulary] if wanted) of a chunk's logits [n, vocabulary]."""
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    log_p = torch.log_softmax(s, -1)
    known = (targets >= 0)[:, None]
    index = targets.clamp(min=0)[:, None]
    nll = torch.where(known, -log_p.gather(1, index), 0.0).sum()
    if not sloped:
        return nll, None
    here = torch.arange(logits.shape[1], device=logits.device) == index
    slope = torch.where(known, log_p.exp() - here.to(s.dtype), 0.0)
    if softcap is not None:
        slope = slope * (1 - (s / softcap) ** 2)
    return nll, slope.to(logits.dtype)


_cache: list[Callable[..., tuple[Tensor, Tensor | None]]] = []


def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    if not _cache:
        _cache.append(torch.compile(_chunk, dynamic=False))
    return _cache[0]
