"""`kernels.gate` in Triton: the kernel, what is launched, and how torch.compile finds it.

A program takes some tokens and some numbers of a gate over all channels. Each of its threads multiplies and adds up
VECTOR channels of every STEP, and threads add up among each other at the end. No number of tokens changes any of that,
only how many programs there are: hence the same bits for a token alone and among many. There is no second launch and
nothing is added atomically. Tensor cores would round what they multiply (TF32), or add up in their own way.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, NUMBERS = 4, 4  # of a program
WARPS = 8  # of a program
VECTOR = 4  # neighbouring channels of a thread: 16 bytes of a weight, and no more of a token, or threads differ


@torch.library.custom_op("kvpleat::gate_logits", mutates_args=())
def logits(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, outputs: int) -> Tensor:
    """`gate.logits` of tokens [T, C] -> [outputs, T, H]."""
    tokens, channels = hidden.shape
    weight, bias = weight.contiguous(), bias.contiguous()
    out = _empty(hidden, weight, outputs)
    vector = VECTOR if channels % VECTOR == 0 else 1
    if hidden.stride(1) != 1 or hidden.stride(0) % vector or hidden.data_ptr() % 16:
        # Read otherwise, channels would go to other threads, and be added up in another order. A copy begins at a
        # multiple of 16 bytes.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    numbers = weight.shape[0]
    if tokens:
        _gate[triton.cdiv(tokens, TOKENS), triton.cdiv(numbers, NUMBERS)](
            hidden, weight, bias, out, scale, tokens, hidden.stride(0) // vector, C=channels, N=numbers,
            H=numbers // outputs, VECTOR=vector, STEP=WARPS * 32 * VECTOR, B=TOKENS, M=NUMBERS, num_warps=WARPS,
        )  # fmt: skip
    return out


@logits.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, scale: float, outputs: int) -> Tensor:
    return _empty(hidden, weight, outputs)


def _empty(hidden: Tensor, weight: Tensor, outputs: int) -> Tensor:
    return hidden.new_empty((outputs, hidden.shape[0], weight.shape[0] // outputs), dtype=torch.float32)


# The number of tokens must not choose another kernel: it could add up in another order.
@triton.jit(do_not_specialize=["tokens", "stride"])
def _gate(hidden, weight, bias, out, scale, tokens, stride, C: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
          VECTOR: tl.constexpr, STEP: tl.constexpr, B: tl.constexpr, M: tl.constexpr):  # fmt: skip
    t, n = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * M + tl.arange(0, M)
    offset = tl.load(bias + n, mask=n < N, other=0.0)  # here, or it is waited for in the end
    rows = hidden + t[:, None, None].to(tl.int64) * stride * VECTOR
    gates = weight + n[None, :, None] * C
    total = tl.zeros([B, M, STEP], tl.float32)
    for start in tl.static_range(0, C, STEP):
        c = start + tl.arange(0, STEP)[None, None, :]
        x = tl.load(rows + c, mask=(t[:, None, None] < tokens) & (c < C), other=0.0)
        w = tl.load(gates + c, mask=(n[None, :, None] < N) & (c < C), other=0.0)
        total = tl.fma(x.to(tl.float32), w, total)
    said = tl.sum(total, 2) * scale + offset[None, :]
    t, n = t[:, None].to(tl.int64), n[None, :]
    tl.store(out + (n // H) * tokens * H + t * H + n % H, said, mask=(t < tokens) & (n < N))
