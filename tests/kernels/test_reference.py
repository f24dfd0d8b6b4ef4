"""kernels/reference.py is the specification, so it is compared with loops in float64 that nobody can misread."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvpleat.kernels import reference
from kvpleat.types import Rotary
from tests import models

NAN = float("nan")


def loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention by the book: one query, one entry at a time, in Python floats."""
    heads, groups, tokens, _ = q.shape
    out = torch.zeros_like(q, dtype=torch.float64)
    for h, g, t in itertools.product(range(heads), range(groups), range(tokens)):
        terms = []
        for n in range(k.shape[1]):
            if visible is not None and not (visible[t, n] if visible.dim() == 2 else visible[h, t, n]):
                continue
            if bias is not None and bias[h, n] == -math.inf:
                continue
            logit = float((q[h, g, t].double() * k[h, n].double()).sum()) * scale
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            terms.append((logit + (float(bias[h, n]) if bias is not None else 0.0), n))
        if terms:
            top = max(logit for logit, _ in terms)
            total = sum(math.exp(logit - top) for logit, _ in terms)
            for logit, n in terms:
                out[h, g, t] += math.exp(logit - top) / total * v[h, n].double()
    return out


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 16), (3, 1, 1, 33, 5), (1, 4, 9, 17, 8)]  # H, G, T, N, D


@pytest.mark.parametrize(("heads", "groups", "tokens", "entries", "dim"), SIZES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "shared", "per head"])
def test_attend(
    heads: int, groups: int, tokens: int, entries: int, dim: int, softcap: float | None, with_bias: bool, mask: str
) -> None:
    """attend equals the loops: odd sizes, weights, soft cap, masks."""
    q, k, v = (
        random(heads, groups, tokens, dim),
        random(heads, entries, dim, seed=1),
        random(heads, entries, dim, seed=2),
    )
    bias = random(heads, entries, seed=3) if with_bias else None
    visible = None
    if mask != "none":
        shape = (tokens, entries) if mask == "shared" else (heads, tokens, entries)
        visible = random(*shape, seed=4) > -0.3
    found = reference.attend(q, k, v, bias, visible, 0.7, softcap)
    torch.testing.assert_close(found.double(), loops(q, k, v, bias, visible, 0.7, softcap), atol=2e-6, rtol=0)


def test_attend_float64_and_bfloat16_keep_their_dtype() -> None:
    """The output has q's dtype; bfloat16 inputs are computed in float32 and rounded once."""
    q, k, v = (random(2, 9, 8, seed=i, dtype=torch.bfloat16) for i in range(3))
    found = reference.attend(q[:, None], k, v, None, None, 0.3)
    assert found.dtype == torch.bfloat16
    expected = loops(q[:, None], k, v, None, None, 0.3, None)
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=2**-8)


def test_attend_ragged_streams_with_poisoned_holes() -> None:
    """Holes (bias -inf, or never visible) may hold NaN: they touch nothing. Streams may even be empty."""
    lengths = [11, 4, 0]
    q, k, v = random(3, 2, 5, 8), random(3, 11, 8, seed=1), random(3, 11, 8, seed=2)
    bias = random(3, 11, seed=3)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    live = torch.arange(11) < torch.tensor(lengths)[:, None]
    bias[~live] = -math.inf
    poisoned_k[~live], poisoned_v[~live] = NAN, NAN
    found = reference.attend(q, poisoned_k, poisoned_v, bias, None, 0.5)
    torch.testing.assert_close(found.double(), loops(q, k, v, bias, None, 0.5, None), atol=2e-6, rtol=0)
    assert not found[2].any()
    visible = live[:, None].expand(3, 5, 11)
    found = reference.attend(q, poisoned_k, poisoned_v, None, visible, 0.5)
    torch.testing.assert_close(found.double(), loops(q, k, v, None, visible, 0.5, None), atol=2e-6, rtol=0)


def test_attend_a_query_that_sees_nothing_returns_zeros() -> None:
    """Not NaN: one query of several sees nothing."""
    q, k, v = random(1, 2, 3, 4), random(1, 6, 4, seed=1), random(1, 6, 4, seed=2)
    visible = torch.ones(3, 6, dtype=torch.bool)
    visible[1] = False
    found = reference.attend(q, k, v, None, visible, 1.0)
    assert not found[:, :, 1].any()
    torch.testing.assert_close(found.double(), loops(q, k, v, None, visible, 1.0, None), atol=2e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_log_weight_counts_an_entry_several_times(softcap: float | None) -> None:
    """An entry of log-weight log 3 attends like three entries of log-weight 0."""
    q, k, v = random(1, 2, 4, 8), random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    index = [0, 1, 2, 2, 2, 3, 4]
    bias = torch.zeros(1, 5)
    bias[0, 2] = math.log(3)
    once = reference.attend(q, k, v, bias, None, 0.5, softcap)
    torch.testing.assert_close(once, reference.attend(q, k[:, index], v[:, index], None, None, 0.5, softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_received(softcap: float | None) -> None:
    """The probabilities that `attend` weighs values with: values that are unit vectors give them back."""
    q, k = random(2, 3, 4, 8), random(2, 6, 8, seed=1)
    bias = random(2, 6, seed=2)
    visible = random(2, 4, 6, seed=3) > -0.5
    visible[1, 2] = False  # and a query that sees nothing gives nothing
    units = torch.eye(6).expand(2, 6, 6)
    padded_q, padded_k = torch.nn.functional.pad(q, (0, 0)), k
    found = reference.attention_received(padded_q, padded_k, bias, visible, 0.4, softcap)
    wanted = torch.zeros(2, 3, 4, 6, dtype=torch.float64)
    for n in range(6):
        wanted[..., n] = loops(q, k, units[:, :, n : n + 1].expand(2, 6, 8), bias, visible, 0.4, softcap)[..., 0]
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=0)


# ---- rotary


def rotated(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """x [D] rotated to a position by complex numbers, in float64: channels c and c + r / 2 are a pair."""
    half = inv_freq.numel()
    x = x.double().clone()
    for c in range(half):
        angle = position * float(inv_freq[c])
        number = complex(float(x[c]), float(x[c + half])) * complex(math.cos(angle), math.sin(angle))
        x[c], x[c + half] = number.real, number.imag
    return x


@pytest.mark.parametrize(("dim", "rotary_dim"), [(8, 8), (10, 6), (16, 2)])
def test_rotate_moves_a_key(dim: int, rotary_dim: int) -> None:
    """rotate(R(p) k, d) = R(p + d) k, both signs of d, channels beyond the rotary ones untouched."""
    inv_freq = 10_000.0 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    raw, positions, distance = random(3, 5, dim), torch.arange(5) * 7, torch.tensor([3, -7, 0, 100, -21])
    keys = torch.stack(
        [torch.stack([rotated(raw[h, n], int(positions[n]), inv_freq) for n in range(5)]) for h in range(3)]
    )
    moved = reference.rotate(keys, distance.expand(3, 5), Rotary(inv_freq))
    for h, n in itertools.product(range(3), range(5)):
        expected = rotated(raw[h, n], int(positions[n] + distance[n]), inv_freq)
        torch.testing.assert_close(moved[h, n].double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(moved[..., rotary_dim:], keys[..., rotary_dim:].float())


def test_rotate_is_exact_far_away() -> None:
    """At a distance of 100,000 positions the angle is still right: float32 would be off by 1e-2."""
    inv_freq = torch.tensor([1.0, 0.3])
    key = random(1, 4)
    moved = reference.rotate(key, torch.tensor([100_003]), Rotary(inv_freq))
    torch.testing.assert_close(moved[0].double(), rotated(key[0], 100_003, inv_freq), atol=1e-6, rtol=0)


def test_rotate_without_rotary_returns_the_keys() -> None:
    """Learned positions: nothing to rotate."""
    keys = random(2, 3, 4)
    assert torch.equal(reference.rotate(keys, torch.tensor([5, 6, 7]).expand(2, 3), None), keys)


def test_rotate_agrees_with_the_model() -> None:
    """A key of a real rotary embedding moved from one position is the key of the other position."""
    module = models.tiny("llama", dtype=torch.float32).model.rotary_emb
    raw = random(1, 1, 1, 16)

    def at(position: int) -> Tensor:
        cos, sin = module(raw, torch.tensor([[position]]))
        return apply_rotary_pos_emb(raw, raw, cos, sin)[1][0, 0, 0]

    moved = reference.rotate(at(40), torch.tensor(-27), Rotary(module.inv_freq))
    torch.testing.assert_close(moved, at(13).float(), atol=1e-6, rtol=0)


# ---- merging


@pytest.mark.parametrize("with_rotary", [False, True])
def test_merge_into(with_rotary: bool) -> None:
    """Weighted means of keys (moved to the survivor's position) and values, against loops, without evicted ones."""
    inv_freq = torch.tensor([0.9, 0.2])
    rotary = Rotary(inv_freq) if with_rotary else None
    keys, values = random(2, 7, 6), random(2, 7, 6, seed=1)
    positions = torch.tensor([[0, 1, 4, 5, 9, 10, 11], [2, 3, 4, 8, 9, 20, 21]])
    target = torch.tensor([[0, 2, 2, 2, -1, 5, 5], [0, 0, 0, -1, -1, 5, 6]])
    share = random(2, 7, seed=2).abs() + 0.1
    keys[target < 0], values[target < 0] = NAN, NAN
    new_keys, new_values = reference.merge_into(keys, values, positions, target, share, rotary)
    for h in range(2):
        for survivor in set(target[h].tolist()) - {-1}:
            members = [n for n in range(7) if target[h, n] == survivor]
            if len(members) == 1:
                assert torch.equal(new_keys[h, survivor], keys[h, survivor])
                assert torch.equal(new_values[h, survivor], values[h, survivor])
                continue
            total = sum(float(share[h, n]) for n in members)
            key, value = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
            for n in members:
                distance = int(positions[h, survivor] - positions[h, n])
                moved = rotated(keys[h, n], distance, inv_freq) if with_rotary else keys[h, n].double()
                key += float(share[h, n]) / total * moved
                value += float(share[h, n]) / total * values[h, n].double()
            torch.testing.assert_close(new_keys[h, survivor].double(), key, atol=1e-6, rtol=0)
            torch.testing.assert_close(new_values[h, survivor].double(), value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merge_into_leaves_loners_bit_for_bit(dtype: torch.dtype) -> None:
    """A survivor without other members is returned as it was, in any dtype, even with a tiny share."""
    keys, values = random(1, 4, 8, dtype=dtype), random(1, 4, 8, seed=1, dtype=dtype)
    target = torch.tensor([[0, 1, 3, 3]])
    share = torch.tensor([[1e-30, 3.0, 0.5, 0.5]])
    new_keys, new_values = reference.merge_into(
        keys, values, torch.arange(4)[None], target, share, Rotary(torch.tensor([0.5]))
    )
    assert new_keys.dtype == new_values.dtype == dtype
    assert torch.equal(new_keys[:, :2], keys[:, :2])
    assert torch.equal(new_values[:, :2], values[:, :2])
    mean = (values[0, 2].double() + values[0, 3].double()) / 2
    torch.testing.assert_close(new_values[0, 3].double(), mean, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
