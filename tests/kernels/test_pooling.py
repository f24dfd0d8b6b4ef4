"""Running sums over groups, and attention over what they leave: against loops over tokens."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat.kernels import delayed, reference
from kvpleat.kernels.delayed import Seen
from kvpleat.kernels.pooling import BLOCK, Newest, banded, groups, scan
from kvpleat.types import Rotary

LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def carries(*shape: int, seed: int = 0, start: float = 0.4) -> Tensor:
    """Log shares, a part of them -inf, some next to nothing and some next to all."""
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logs = -random(*shape, seed=seed + 1).exp() * 3
    return torch.where(uniform < start, -torch.inf, torch.where(uniform < start + 0.1, -0.0, logs))


def summed(x: Tensor, log_carry: Tensor, look_back: int | None) -> Tensor:
    """[T, C] sums by their definition: of each token and what is left of those before it."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        left, u = 1.0, t
        while left > 0 and u >= 0 and (look_back is None or t - u < look_back):
            out[t] += left * x[u]
            left *= math.exp(log_carry[u])
            u -= 1
    return out


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_scan(tokens: int, start: float) -> None:
    """Several heads at once, with what was before; float32 loses nothing beyond its rounding."""
    x, before = random(2, 3, tokens, 5), random(2, 3, 5, seed=1)
    logs = carries(2, 3, tokens, start=start)
    found, single = scan(x, logs, before), scan(x.float(), logs.float(), before.float())
    alone = scan(x, logs)
    for i in range(2):
        for h in range(3):
            whole = torch.cat([before[i, h, None], x[i, h]])
            expected = summed(whole, torch.cat([torch.tensor([-torch.inf]).double(), logs[i, h]]), None)[1:]
            torch.testing.assert_close(found[i, h], expected, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(single[i, h].double(), expected, atol=2e-5, rtol=0)
            first = torch.cat([torch.tensor([-torch.inf]).double(), logs[i, h, 1:]])
            torch.testing.assert_close(alone[i, h], summed(x[i, h], first, None), atol=1e-12, rtol=1e-12)


def test_scan_after_long_decay() -> None:
    """Small differences of large logs keep their digits: a group of equals after many that faded is still their sum."""
    logs = torch.full((1, BLOCK), -300.0)
    logs[0, -8:] = -1e-3
    found = scan(torch.ones(1, BLOCK, 1), logs)
    expected = summed(torch.ones(BLOCK, 1).double(), logs[0].double(), None)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("look_back", [1, 2, 5])
def test_banded(look_back: int) -> None:
    """In pieces as in one, and as in the definition."""
    x, logs = random(2, 30, 4), carries(2, 30, start=0.2)
    before = Newest(torch.zeros(2, look_back - 1, 4).double(), torch.full((2, look_back - 1), -torch.inf).double())
    logs[:, 0] = -torch.inf
    state, parts, start = before, [], 0
    for size in (1, 1, 2, 9, 1, 16):
        part, state = banded(x[:, start : start + size], logs[:, start : start + size], look_back, state)
        parts.append(part)
        start += size
    assert start == 30
    for h in range(2):
        expected = summed(x[h], logs[h], look_back)
        torch.testing.assert_close(torch.cat(parts, 1)[h], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(banded(x, logs, look_back, before)[0], torch.cat(parts, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([0.7, 0.01]))], ids=["plain", "rotary"])
@pytest.mark.parametrize("look_back", [None, 3])
def test_groups(rotary: Rotary | None, look_back: int | None) -> None:
    """Weighted means of members that are turned to the newest one's position; and sizes: sums of their weights."""
    tokens, dim = 17, 5
    keys, values, weight = random(2, tokens, dim), random(2, tokens, 3, seed=1), random(2, tokens, seed=2).exp()
    values = torch.nn.functional.pad(values, (0, dim - 3))
    logs = carries(2, tokens, seed=5, start=0.3)
    logs[:, 0] = -torch.inf
    positions = torch.arange(40, 40 + tokens)
    turn = None if rotary is None else reference.turn(positions, rotary, torch.float64)
    known = 1 if look_back is None else look_back - 1
    before = Newest(torch.zeros(2, known, 2 * dim + 1).double(), torch.zeros(2, 0 if look_back is None else known))
    found_keys, found_values, size, _ = groups(keys, values, turn, logs, weight, before, look_back)
    for h in range(2):
        turned = torch.stack([reference.rotate(keys[h], t - positions, rotary) for t in positions])  # [to, of, D]
        total = summed(weight[h, :, None], logs[h], look_back)
        torch.testing.assert_close(size[h].exp(), total[:, 0], atol=1e-9, rtol=1e-9)
        for i in range(tokens):
            mean = summed(turned[i] * weight[h, :, None], logs[h], look_back)[i] / total[i]
            torch.testing.assert_close(found_keys[h, i], mean, atol=1e-6, rtol=0)
        mean = summed(values[h] * weight[h, :, None], logs[h], look_back) / total
        torch.testing.assert_close(found_values[h], mean, atol=1e-9, rtol=0)


def test_members_without_weight_are_no_division_by_zero() -> None:
    """Where all weights of a group are 0 in float32 the mean is a plain one."""
    before = Newest(torch.zeros(1, 1, 5), torch.zeros(1, 0))
    logs = torch.tensor([[-torch.inf, 0.0]])
    keys = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    found, _, _, _ = groups(keys, keys, None, logs, torch.zeros(1, 2), before, None)
    torch.testing.assert_close(found[0], torch.tensor([[1.0, 2.0], [2.0, 3.0]]))


@pytest.mark.parametrize(
    ("delay", "merges", "sizes"),
    [*((delay, False, False) for delay in (1, 4, 50)), *itertools.product([0, 1, 4, 50], [True], [False, True])],
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("start", "tokens", "past"), [(0, 23, 0), (0, 1, 0), (3, 19, 0), (60, 23, 9), (70, 5, 1)])
def test_attend(
    monkeypatch: pytest.MonkeyPatch,
    delay: int,
    merges: bool,
    sizes: bool,
    softcap: float | None,
    start: int,
    tokens: int,
    past: int,
) -> None:
    """Blocks of 8 queries against one mask over everything: what is young is raw, what is old is a group that stays."""
    monkeypatch.setattr(delayed, "QUERY_BLOCK", 8)
    heads, dim, first = 2, 6, max(0, start - delay)
    past = past if start > delay else 0
    young, count = start + tokens - first, max(0, start + tokens - delay - first)
    q = random(3 * heads, tokens, dim, seed=8)
    raw = random(heads, young, dim), random(heads, young, dim, seed=1)
    formed = (random(heads, count, dim, seed=2), random(heads, count, dim, seed=3)) if merges else None
    old = random(heads, past, dim, seed=4), random(heads, past, dim, seed=5)
    live, stays = (torch.rand(heads, n, generator=torch.Generator().manual_seed(n)) < 0.5 for n in (past, count))
    biases: tuple[Any, Any] = (None, None)
    if sizes:
        biases = random(heads, past, seed=6).float(), random(heads, count, seed=7).float()
    found = delayed.attend(q, Seen(first, old, live, raw, formed, stays, *biases), start, delay, 0.4, softcap)

    queries, index = torch.arange(start, start + tokens)[:, None], torch.arange(first, first + young)
    age = queries - index
    group = ((age == delay) | ((age > delay) & torch.nn.functional.pad(stays, (0, young - count))[:, None]))[
        ..., :count
    ]
    visible = torch.cat(
        [live[:, None].expand(-1, tokens, -1), group, ((age >= 0) & (age < delay)).expand(heads, -1, -1)], dim=-1
    )
    parts = [old, tuple(x[:, :count] for x in raw) if formed is None else formed, raw]
    keys, values = (torch.cat([part[i] for part in parts], dim=1) for i in range(2))
    bias = torch.cat([*biases, torch.zeros(heads, young)], dim=1) if sizes else None
    expected = reference.attend(q.view(heads, 3, tokens, dim), keys, values, bias, visible, 0.4, softcap)
    torch.testing.assert_close(found, expected.reshape(-1, tokens, dim), atol=1e-5, rtol=0)
