"""Attention while a policy is learned: torch and Triton (in its interpreter) against the definition in plain loops."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import relaxed

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
relaxed_triton = importlib.import_module("kvpleat.kernels.relaxed_triton")


def by_definition(
    q: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor] | None, keep: Tensor | None,
    size: Tensor | None, doc_start: Tensor, delay: int, scale: float,
) -> Tensor:  # fmt: skip
    """One query and one key after the other, in the dtype of the arguments."""
    far = near if far is None else far
    out = torch.zeros_like(q)
    rows, heads, tokens, _ = q.shape
    group = heads // near[0].shape[1]
    for r in range(rows):
        for h in range(heads):
            s = h // group
            for i in range(tokens):
                logits, values = [], []
                for j in range(int(doc_start[r, i]), i + 1):
                    keys, vals = near if i - j < delay else far
                    logit = q[r, h, i] @ keys[r, s, j] * scale
                    if size is not None and i - j >= delay:
                        logit = logit + size[r, s, j]
                    if keep is not None and i - j > delay:
                        logit = logit + keep[r, s, j]
                    logits.append(logit)
                    values.append(vals[r, s, j])
                weights = torch.softmax(torch.stack(logits), 0)
                out[r, h, i] = weights @ torch.stack(values)
    return out


CASES = [  # rows, query heads, KV heads, tokens, channels, delay, merges, keep, size, documents
    (1, 2, 1, 37, 16, 5, False, True, False, 1),
    (2, 4, 2, 70, 16, 9, False, True, False, 3),
    (1, 3, 3, 65, 32, 0, True, True, False, 2),
    (1, 4, 2, 71, 16, 7, True, True, True, 2),
    (1, 2, 2, 33, 16, 40, True, True, True, 1),
    (2, 2, 1, 40, 16, 3, False, False, False, 4),
]


def arguments(case: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor | None], Tensor, int]:
    rows, heads, kv_heads, tokens, channels, delay, merges, keep, size, documents = case
    generator = torch.Generator().manual_seed(sum(case))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    entry = rows, kv_heads, tokens, channels
    tensors: dict[str, Tensor | None] = {
        "q": noise(rows, heads, tokens, channels),
        "k": noise(*entry),
        "v": noise(*entry),
        "far_k": noise(*entry) if merges else None,
        "far_v": noise(*entry) if merges else None,
        "keep": -noise(*entry[:3]).abs() * 3 if keep else None,
        "size": noise(*entry[:3]) if size else None,
    }
    cuts = torch.randint(1, tokens, (rows, documents - 1), generator=generator).sort(1).values
    doc_start = torch.zeros(rows, tokens, dtype=torch.int32)
    for row, places in enumerate(cuts.tolist()):
        for place in places:
            doc_start[row, place:] = place
    return tensors, doc_start, delay


def run(function: object, tensors: dict[str, Tensor | None], doc_start: Tensor, delay: int) -> list[Tensor]:
    """Output and the gradient of every argument."""
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
    far = None if leaves["far_k"] is None else (leaves["far_k"], leaves["far_v"])
    scale = 1 / math.sqrt(tensors["q"].shape[-1])  # type: ignore[union-attr]
    out = function(  # type: ignore[operator]
        leaves["q"], (leaves["k"], leaves["v"]), far, leaves["keep"], leaves["size"], doc_start, delay, scale
    )
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    given = [x for x in leaves.values() if x is not None]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_is_the_definition(case: tuple[int, ...]) -> None:
    tensors, doc_start, delay = arguments(case, torch.float64)
    wanted = run(by_definition, tensors, doc_start, delay)
    for mine, theirs in zip(run(relaxed.relaxed_attention, tensors, doc_start, delay), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # softmax is in float32


@pytest.mark.parametrize("blocks", [(32, 32), (16, 32), (64, 16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_the_definition(
    case: tuple[int, ...], blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks of queries and of keys."""
    options = {"PRECISION": "ieee", "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(relaxed_triton, "_blocks", lambda q, kernel: (*blocks, options))
    tensors, doc_start, delay = arguments(case, torch.float32)
    exact = {name: None if x is None else x.double() for name, x in tensors.items()}
    wanted = run(by_definition, exact, doc_start, delay)
    for mine, theirs in zip(run(relaxed_triton.attention, tensors, doc_start, delay), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
