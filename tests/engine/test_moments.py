"""When policies decide, what they look back at, and that the cache then holds what the one-model wrapper's holds."""

import random
from typing import Any

import pytest
import torch

from kvpleat import compress
from kvpleat.cache.observed import ObservedQueries
from kvpleat.engine.core import EngineCore
from kvpleat.engine.moments import Calendar, decides
from kvpleat.engine.observed import Observed, remember
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.rows import Feed, Row
from kvpleat.policies import AttentionScore, Full, Window
from kvpleat.policies.base import Policy
from kvpleat.types import KVShape
from tests import models

SHAPE = KVShape(2, 2, 6, 8, torch.float32)
POLICIES = {
    "ratio": AttentionScore(ratio=4.0, interval=8),
    "in prompts": AttentionScore(ratio=3.0, slack=1.0, interval=16),
    "coverage": AttentionScore(coverage=0.8, interval=8),
    "no foresight": AttentionScore(ratio=4.0, foresight=0.0, fold=0.3, interval=4),
}


def row_of(prompt: int) -> Row:
    return Row(Request("x", tuple(range(prompt)), SamplingParams()), 0, 10_000)


# ---- when


def test_who_decides() -> None:
    assert decides(AttentionScore(ratio=2.0), SHAPE)
    assert not any(decides(policy, SHAPE) for policy in (Full(), Window(budget=64), Window(ratio=2.0)))


@pytest.mark.parametrize("slack", [1.0, float("inf")])
@pytest.mark.parametrize("prompt", [1, 50, 64, 900])
def test_calendar(prompt: int, slack: float) -> None:
    """However far a step could go, it ends at the next moment, and at the prompt's end."""
    calendar = Calendar(AttentionScore(ratio=4.0, slack=slack, interval=16), SHAPE)
    found, at = [], 0
    while at < prompt + 100:
        stop = calendar.next(prompt, at, at + 1000)
        assert calendar.next(prompt, at, stop) == stop
        for between in range(at + 1, stop):
            assert calendar.next(prompt, at, between) == between
            assert not calendar.falls_on(prompt, between)
            assert calendar.last(prompt, between) == (found[-1] if found else 0)
        assert calendar.falls_on(prompt, stop)
        found.append(stop)
        at = stop
        assert calendar.last(prompt, at) == at
    inside, after = [x for x in found if x < prompt], [x for x in found if x > prompt]
    assert prompt in found
    assert (len(inside) > 0) == (slack == 1.0 and prompt == 900)
    assert all(moment % 64 == 0 for moment in inside)
    assert after == list(range((prompt // 16 + 1) * 16, after[-1] + 1, 16))


# ---- what is remembered


@pytest.mark.parametrize("seed", range(4))
def test_observed(seed: int) -> None:
    """Chunks of several rows and single tokens, some of which are taken back: the queries that the one-model cache
    remembers when it is fed all at once."""
    chance, made = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts, answer, window = (30, 2500), 40, 4
    calendar = Calendar(AttentionScore(ratio=4.0, interval=8, observation_window=window, question_window=4), SHAPE)
    observed = Observed(SHAPE, 2, window, calendar, torch.device("cpu"))
    rows = [row_of(prompt) for prompt in prompts]
    queries = [torch.randn(2, 6, prompt + answer, 8, generator=made) for prompt in prompts]
    wanted = ObservedQueries(SHAPE, 2, window, torch.device("cpu"))
    fed = [0, 0]

    def step(sizes: list[int], failed: bool) -> None:
        feeds = [
            Feed(rows[i], i, fed[i], size, False, 0) for i, size in enumerate(sizes) if size and fed[i] < prompts[i]
        ]
        watched = observed.watch(feeds, torch.tensor([int(failed)]), lambda x: x) if feeds else None
        for layer in range(2):
            if watched is not None:
                new = [queries[feed.seat][layer, :, feed.start : feed.start + feed.size] for feed in feeds]
                watched.see(layer, torch.cat(new, 1))
            decoding = [i for i in (0, 1) if sizes[i] and fed[i] >= prompts[i]]
            ok = torch.tensor([i in decoding and not failed for i in (0, 1)])
            q = torch.stack([queries[i][layer, :, min(fed[i], prompts[i] + answer - 1)] for i in (0, 1)])
            remember(observed.last, layer, torch.tensor(fed), ok, q)

    def compare(i: int) -> None:
        position, since = fed[i], calendar.last(prompts[i], fed[i] - 1)
        for layer in range(2):
            for mine, its in zip(
                observed.recent(range(layer, layer + 1), i, position), wanted.recent(layer, i, position), strict=True
            ):
                assert torch.equal(mine, its)
            found = observed.sampled(layer, rows[i], since, position) if position <= prompts[i] else None
            assert (found is None) == ((i, layer) not in wanted.samples)
            for mine, its in zip(found or (), wanted.take_samples(layer, i, position, since), strict=found is not None):
                assert torch.equal(mine, its)

    while any(fed[i] < prompts[i] + answer for i in (0, 1)):
        sizes = [0, 0]
        for i in (0, 1):
            if fed[i] < prompts[i] + answer and chance.random() < 0.8:
                most = 1 if fed[i] >= prompts[i] else chance.choice([1, 7, 40, 333])
                sizes[i] = calendar.next(prompts[i], fed[i], fed[i] + most) - fed[i]
        if chance.random() < 0.3:  # it failed, and so does the one after it
            before = list(fed)
            for _ in range(2):
                step(sizes, failed=True)
                fed = [at + size for at, size in zip(fed, sizes, strict=True)]
                sizes = [min(size, p + answer - at) for size, p, at in zip(sizes, prompts, fed, strict=True)]
                sizes = [calendar.next(p, at, at + n) - at for n, p, at in zip(sizes, prompts, fed, strict=True)]
            fed = before
            continue
        step(sizes, failed=False)
        for i, size in enumerate(sizes):
            for layer in range(2) if size else ():
                new = queries[i][layer, :, fed[i] : fed[i] + size]
                wanted.observe(layer, i, new, fed[i])
                if fed[i] < prompts[i]:
                    wanted.sample(layer, i, new, fed[i], calendar.last(prompts[i], fed[i]))
            start, fed[i] = fed[i], fed[i] + size
            if size and calendar.falls_on(prompts[i], fed[i]):
                compare(i)
            observed.settle([Feed(rows[i], i, start, size, False, 0)] if size else [])
    assert not observed._samples


# ---- what is decided


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("at_once", [1, 20_000, 2**25])
def test_the_same_entries(name: str, family: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a prompt in chunks and some tokens the cache holds the entries of the one-model wrapper: the same positions
    in every stream, with keys, values, weights and scores that differ by rounding. It does not matter how many layers
    are looked at in one go while decoding."""
    monkeypatch.setattr("kvpleat.engine.decisions.AT_ONCE", at_once)
    model, policy, prompt, tokens = models.tiny(family, dtype=torch.float32), POLICIES[name], 260, 14
    ids = models.prompt(prompt, seed=5)
    with compress(model, policy) as pleated:
        cache = pleated.new_cache()
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens + 1, "do_sample": False}
        model.generate(ids, **options, **models.given(cache))
        kv = cache.kv
        assert kv is not None
        wanted = {(layer, name): kv.stored(layer, 0)[0][name] for layer in range(3) for name in kv.shape.arrays}
        lengths = kv.lengths[0].clone()
    core = EngineCore(model, policy, kv_memory="4MiB", max_num_seqs=3, max_num_batched_tokens=37, max_model_len=400)
    core.add(Request("x", tuple(ids[0].tolist()), SamplingParams(temperature=0.0, max_tokens=tokens + 9)))
    row = core._rows["x"]
    while row.fed < prompt + tokens:
        core.step()
    pool = core.runner.pool
    assert torch.equal(pool.lengths[0], lengths)
    assert lengths.float().mean() < 0.6 * (prompt + tokens)
    for layer in range(3):
        for head in range(lengths.shape[1]):
            size = int(lengths[layer, head])
            pages = pool.page_table[0, layer, head, : -(-size // 16)].long()
            mine = {key: array[pages].flatten(0, 1)[:size] for key, array in pool.arrays.items()}
            order = mine["position"].argsort()
            for key, array in mine.items():
                its: Any = wanted[layer, key][head, :size]
                torch.testing.assert_close(array[order], its, atol=2e-4, rtol=1e-3, equal_nan=True, msg=key)
    core.close()


def test_what_prompts_need() -> None:
    """A prompt is whole until its end, unless it is compressed on its way."""
    shape = KVShape(4, 2, 8, 64, torch.bfloat16)
    policy: Policy = AttentionScore(ratio=8.0)
    assert policy.peak_entries(8000, shape) == 8000
    assert 0.1 * 8000 < policy.expected_entries(8000, shape) < 8000 / 7
    assert AttentionScore(ratio=8.0, slack=2.0).peak_entries(8000, shape) < 2500
    assert AttentionScore(coverage=0.9).expected_entries(800, shape) == 800
    assert Full().peak_entries(80, shape) == 80
