"""What a linear gate says of tokens, in float32 whatever the model computes in.

A product of 16-bit numbers would be rounded differently for one token and for many, and so decide differently. In
torch, one product of float32 matrices, several launches: a matrix product may still add up in another order for
another number of tokens, so that the last bits differ. On a GPU one Triton kernel (gate_triton.py), in an order that
follows from the sizes of the gate alone: a token says the same bits alone and among any number of others. So there is
no number of tokens from which on torch takes over.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import linear

HAS_TRITON = importlib.util.find_spec("triton") is not None  # wheels of torch for some systems come without


def logits(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, outputs: int) -> Tensor:
    """scale * (hidden @ weight.T) + bias, where `runs_on_triton` says.

    Args:
        hidden: [R, T, C] of any float dtype and strides. weight: [outputs * H, C]. bias: [outputs * H].
        outputs: numbers a gate gives per token and KV head.

    Returns:
        [outputs, R, H, T] float32.
    """
    if not runs_on_triton(hidden, weight, bias):
        return by_torch(hidden, weight, bias, scale, outputs)
    from kvpleat.kernels import gate_triton

    said = gate_triton.logits(hidden.flatten(0, 1), weight.float(), bias.float(), scale, outputs)
    grouped: Tensor = said.unflatten(1, hidden.shape[:2])
    return grouped.transpose(2, 3)


def runs_on_triton(hidden: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """On a GPU, where Triton is installed and nothing is learned: the kernel has no gradient."""
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    return hidden.device.type == "cuda" and HAS_TRITON and not learned


def by_torch(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, outputs: int) -> Tensor:
    """`logits` in torch: the specification, and differentiable."""
    # Not addmm, which would scale and add in the same call: where the factor is not 1 it takes twice as long.
    said = linear(hidden.float(), weight.float()) * scale + bias.float()
    grouped: Tensor = said.unflatten(-1, (outputs, -1))
    return grouped.permute(2, 0, 3, 1)
