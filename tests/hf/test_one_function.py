"""Rule 1: for a given policy the tokens decide the output, whole, in pieces, in turns, padded or not, in batches.

Full is compared with transformers' own cache, Window with the masked reference, and AttentionScore with itself, fed in
other ways. Models are float64, and RMSNorm, rotary angles and the softmax of a decode step are float32 inside.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvpleat import PleatedCache, compress, policies
from kvpleat.policies import AttentionScore, Full, Window
from tests import models, reference

LENGTH = 130
ROUNDING = 1e-5
WINDOWS = (Window(budget=40), Window(ratio=2.0), Window(ratio=3.0, sinks=0), Window(budget=53, sinks=7))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def feed(model: Any, tokens: Tensor, cache: PleatedCache, pieces: list[int]) -> Tensor:
    """Logits [T, vocabulary] of tokens [T], fed in pieces of the given sizes, the last one repeated."""
    logits, start, sizes = [], 0, list(pieces)
    while start < tokens.shape[0]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        with torch.no_grad():
            logits.append(model(tokens[None, start : start + size], **models.given(cache)).logits[0])
        start += size
    return torch.cat(logits)


PIECES = {
    "whole": [LENGTH],
    "one by one": [1],
    "sevens": [7],
    "thirty-threes": [33],
    "prompt, then decode": [67, 1],
    "turns": [20, 1, 1, 1, 30, *[1] * 9, 17, 1, 45, 1],
}


@pytest.mark.parametrize("family", models.FAMILIES)
class TestFull:
    """Full is transformers' own cache."""

    def test_greedy_tokens_and_logits_of_generate(self, family: str) -> None:
        """generate: the same tokens, and the same logits at every step, as without kvpleat."""
        model, ids = models.tiny(family), models.prompt(50, rows=2)
        options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        mask = torch.ones_like(ids)
        theirs = model.generate(ids, attention_mask=mask, **options)
        with compress(model, Full()):
            ours = model.generate(ids, attention_mask=mask, **options)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        close(torch.stack(ours.logits), torch.stack(theirs.logits))

    def test_left_padded_ragged_batch(self, family: str) -> None:
        """generate on a left-padded batch: the tokens of transformers' own cache."""
        model, ids = models.tiny(family), models.prompt(45, rows=3)
        mask = torch.ones_like(ids)
        mask[1, :13], mask[2, :44] = 0, 0
        ids = ids * mask
        options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        theirs = model.generate(ids, attention_mask=mask, **options)
        with compress(model, Full()):
            ours = model.generate(ids, attention_mask=mask, **options)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        close(torch.stack(ours.logits), torch.stack(theirs.logits))

    def test_sampling_with_the_same_seed(self, family: str) -> None:
        """generate with do_sample: the same seed draws the same tokens."""
        model, ids = models.tiny(family), models.prompt(30)
        options = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.3, "top_k": 20}
        mask = torch.ones_like(ids)
        drawn = []
        for policy in (None, Full()):
            torch.manual_seed(11)
            if policy is None:
                drawn.append(model.generate(ids, attention_mask=mask, **options).tolist())
            else:
                with compress(model, policy):
                    drawn.append(model.generate(ids, attention_mask=mask, **options).tolist())
        assert drawn[0] == drawn[1]

    @pytest.mark.parametrize("pieces", PIECES)
    def test_however_it_is_fed(self, family: str, pieces: str) -> None:
        """Logits at every position equal those of one forward of the model alone."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        with compress(model, Full()) as pleated:
            found = feed(model, tokens, pleated.new_cache(), PIECES[pieces])
        close(found, reference.forward(model, tokens))

    def test_a_chat_through_generate(self, family: str) -> None:
        """Three turns through generate on one cache: the tokens that transformers' cache gives."""
        model = models.tiny(family)

        def chat(cache: Any) -> list[int]:
            ids = models.prompt(30, seed=1)
            for turn in range(3):
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), **models.given(cache), max_new_tokens=12, do_sample=False
                )
                ids = torch.cat([out, models.prompt(9, seed=turn)], dim=1)
            return ids[0].tolist()

        theirs = chat(DynamicCache(config=model.config))
        with compress(model, Full()) as pleated:
            assert chat(pleated.new_cache()) == theirs


@pytest.mark.parametrize("family", models.FAMILIES)
class TestWindow:
    """Window is the masked reference."""

    @pytest.mark.parametrize(
        ("policy", "pieces"),
        [*itertools.product(WINDOWS[:2], PIECES), *itertools.product(WINDOWS[2:], ["whole", "turns"])],
        ids=lambda x: repr(x) if isinstance(x, Window) else x,
    )
    def test_however_it_is_fed(self, family: str, policy: Window, pieces: str) -> None:
        """Logits at every position equal those of a model that sees only sinks and window."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        expected = reference.forward(model, tokens, reference.window_of(model, LENGTH, **options(policy)))
        with compress(model, policy) as pleated:
            found = feed(model, tokens, pleated.new_cache(), PIECES[pieces])
            pleated.pool.check_integrity({c.kv.owner: c.kv.owned_pages() for c in pleated._caches if c.kv})
        close(found, expected)

    def test_fork_in_the_middle(self, family: str) -> None:
        """A fork goes on as the original would, and neither notices what the other is fed."""
        model, tokens, other = models.tiny(family), models.prompt(LENGTH)[0], models.prompt(LENGTH, seed=5)[0]
        other[:70] = tokens[:70]
        visible = reference.window_of(model, LENGTH, budget=40)
        with compress(model, Window(budget=40)) as pleated:
            cache = pleated.new_cache()
            feed(model, tokens[:70], cache, [70])
            twin = cache.fork()
            found = []
            for start in range(70, LENGTH, 5):  # in turns, so that pages of both are taken and given back in between
                found.append(feed(model, tokens[start : start + 5], cache, [5]))
                found.append(feed(model, other[start : start + 5], twin, [1]))
        close(torch.cat(found[0::2]), reference.forward(model, tokens, visible)[70:])
        close(torch.cat(found[1::2]), reference.forward(model, other, visible)[70:])

    def test_save_and_load_in_the_middle(self, family: str, tmp_path: Path) -> None:
        """A loaded cache goes on as the saved one would, in an attachment of its own."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        with compress(model, Window(ratio=2.0)) as pleated:
            cache = pleated.new_cache()
            feed(model, tokens[:77], cache, [33])
            cache.save(tmp_path / "chat.safetensors")
        with compress(model, Window(ratio=2.0)) as pleated:
            cache = pleated.load_cache(tmp_path / "chat.safetensors")
            found = feed(model, tokens[77:], cache, [20, 1])
        visible = reference.window_of(model, LENGTH, ratio=2.0)
        close(found, reference.forward(model, tokens, visible)[77:])

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("chunk", [1, 7, 33, 200])
    def test_in_a_padded_batch(self, family: str, side: str, chunk: int) -> None:
        """Each row of a padded batch computes what it computes alone."""
        if side == "right" and family.startswith("gemma") and chunk != 200:
            pytest.skip("the model's own sliding windows count columns, padding included")
        model, lengths = models.tiny(family), [101, 1, 88, 40]
        rows = [models.prompt(length, seed=length)[0] for length in lengths]
        ids, mask = pad(rows, side)
        policy = Window(budget=40)
        with compress(model, policy) as pleated:
            cache, logits = pleated.new_cache(), []
            for start in range(0, ids.shape[1], chunk):
                stop = min(start + chunk, ids.shape[1])
                logits.append(forward(model, ids[:, start:stop], mask[:, :stop], cache))
            if side == "left" or not family.startswith("gemma"):
                after = models.prompt(20, seed=3, rows=4)
                for step in range(20):  # and every row goes on
                    mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], dim=1)
                    logits.append(forward(model, after[:, step : step + 1], mask, cache))
                rows = [torch.cat([row, more]) for row, more in zip(rows, after, strict=True)]
        found = torch.cat(logits, dim=1)
        for i, row in enumerate(rows):
            visible = reference.window_of(model, len(row), budget=40)
            close(found[i][mask[i].bool()], reference.forward(model, row, visible))

    def test_pages_of_32_compute_the_same_however_fed(self, family: str) -> None:
        """With pages of 32 entries the window slides in steps of 16 all the same, and pieces do not show."""
        model, tokens = models.tiny(family), models.prompt(400)[0]
        with compress(model, Window(ratio=2.0), page_size=32) as pleated:
            whole = feed(model, tokens, pleated.new_cache(), [400])
            pieces = feed(model, tokens, pleated.new_cache(), [150, 1, 60, 16, 1])
        close(pieces, whole)


def options(policy: Window) -> dict[str, Any]:
    """Options of a Window as the reference takes them."""
    return {"ratio": policy.ratio, "budget": policy.budget, "sinks": policy.sinks}


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a padded batch: ids and mask [R, T]."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def forward(model: Any, ids: Tensor, mask: Tensor, cache: PleatedCache) -> Tensor:
    """One forward on a padded batch, with positions that count tokens."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, **models.given(cache)).logits


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("policy", WINDOWS[:2], ids=repr)
def test_window_keeps_its_promise(family: str, policy: Window) -> None:
    """Once past the window, allocated bytes stay within the ratio, and streams within the budget, at every step."""
    model, tokens = models.tiny(family), models.prompt(300)[0]
    with compress(model, policy) as pleated:
        cache = pleated.new_cache()
        feed(model, tokens[:200], cache, [200])
        for token in tokens[200:]:
            feed(model, token[None], cache, [1])
            assert cache.kv is not None
            pages = int(cache.kv.num_pages.sum())
            if policy.budget is not None:
                assert int(cache.kv.lengths.max()) <= policy.budget
            else:
                shape = pleated.facts.shape
                full = sum(cache.positions) * shape.num_streams * 2 * shape.head_dim * shape.dtype.itemsize
                assert full >= policy.ratio * pages * pleated.pool.page_bytes


# ---- AttentionScore: fed in other ways, the same

Feeder = Callable[[Any, Any, Tensor, PleatedCache], Tensor]


def declared(size: int) -> Feeder:
    """A prompt through `prefill` in pieces of `size`."""
    return lambda model, pleated, ids, cache: pleated.prefill(ids, cache=cache, chunk_size=size)


def by_hand(size: int) -> Feeder:
    """A prompt through the model itself, its end declared."""

    def run(model: Any, pleated: Any, ids: Tensor, cache: PleatedCache) -> Tensor:
        cache.expect_prompt(cache.columns + ids.shape[1])
        return feed(model, ids[0], cache, [size])[-1:]

    return run


def undeclared(size: int) -> Feeder:
    """A prompt through the model itself, its end not declared: it ends where the first single token follows."""
    return lambda model, pleated, ids, cache: feed(model, ids[0], cache, [size])[-1:]


FEEDERS: dict[str, Feeder] = {
    "prefill in ones": declared(1),
    "prefill in sevens": declared(7),
    "prefill in thirty-threes": declared(33),
    "by hand, whole": by_hand(1000),
    "by hand, in tens": by_hand(10),
    "undeclared, whole": undeclared(1000),
    "undeclared, in tens": undeclared(10),
}


def conversation(model: Any, pleated: Any, cache: PleatedCache, way: Feeder, middle: Any = None) -> Tensor:
    """Two turns of a prompt and 40 decoded tokens: logits [82, vocabulary] at the ends of prompts and in decode."""
    logits = []
    for turn, length in enumerate((120, 50)):
        logits.append(way(model, pleated, models.prompt(length, seed=turn), cache))
        if middle is not None and turn == 0:
            cache = middle(cache)
        logits.append(feed(model, models.prompt(40, seed=10 + turn)[0], cache, [1]))
    return torch.cat(logits)


def long_conversation(model: Any, pleated: Any, cache: PleatedCache, size: int) -> Tensor:
    """A prompt of 330 tokens in pieces of `size`, and 40 decoded tokens: logits [41, vocabulary]."""
    first = pleated.prefill(models.prompt(330), cache=cache, chunk_size=size)
    return torch.cat([first, feed(model, models.prompt(40, seed=1)[0], cache, [1])])


ATTENTION = AttentionScore(ratio=2.0)
OTHERS = (AttentionScore(ratio=3.0, slack=1.5), AttentionScore(coverage=0.8), AttentionScore(ratio=2.0, fold=0.6))


@pytest.mark.parametrize("family", models.FAMILIES)
class TestAttentionScore:
    """AttentionScore: where a caller cuts does not show; where prompts end is stated."""

    @pytest.mark.parametrize("way", FEEDERS)
    def test_however_it_is_fed(self, family: str, way: str) -> None:
        """Two turns, fed in pieces, equal two turns fed whole: logits, and every entry that is kept."""
        model = models.tiny(family)
        with compress(model, ATTENTION) as pleated:
            whole, pieces = pleated.new_cache(), pleated.new_cache()
            expected = conversation(model, pleated, whole, declared(1000))
            found = conversation(model, pleated, pieces, FEEDERS[way])
            close(found, expected)
            same_entries(pieces, whole)
            pleated.pool.check_integrity({c.kv.owner: c.kv.owned_pages() for c in (whole, pieces) if c.kv})

    @pytest.mark.parametrize("policy", OTHERS, ids=repr)
    def test_other_options_however_they_are_fed(self, family: str, policy: AttentionScore) -> None:
        """Moments inside a prompt, the coverage contract, and more folding: still the tokens decide."""
        model = models.tiny(family)
        with compress(model, policy) as pleated:
            expected = long_conversation(model, pleated, pleated.new_cache(), 1000)
            for size in (1, 50):
                close(long_conversation(model, pleated, pleated.new_cache(), size), expected)

    def test_it_compresses(self, family: str) -> None:
        """The comparison above is not one of two full caches."""
        model = models.tiny(family)
        with compress(model, ATTENTION) as pleated, torch.no_grad():
            cache = pleated.new_cache()
            found = conversation(model, pleated, cache, declared(1000))
            assert int(cache.kv.lengths.max()) < 250
        with compress(model, Full()) as pleated:
            full = conversation(model, pleated, pleated.new_cache(), declared(1000))
        assert (found - full)[60:].abs().max() > 1e-2

    def test_generate_is_prefill_and_decode(self, family: str) -> None:
        """generate, whole or with its own prefill_chunk_size, takes the same way as prefill and steps by hand."""
        model, ids = models.tiny(family), models.prompt(120)
        settings = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with compress(model, ATTENTION) as pleated:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            cut = model.generate(ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=17, **settings)
            cache = pleated.new_cache()
            first = pleated.prefill(ids, cache=cache)
            rest = feed(model, out.sequences[0, 120:-1], cache, [1])
        close(torch.cat(out.logits), torch.cat([first, rest]).float())
        close(torch.cat(cut.logits), torch.cat([first, rest]).float())

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_in_a_padded_batch(self, family: str, side: str) -> None:
        """Each row of a padded batch is compressed as it is alone."""
        if side == "right" and family.startswith("gemma"):
            pytest.skip("the model's own sliding windows count columns, padding included")
        model = models.tiny(family)
        rows = [models.prompt(length, seed=length)[0] for length in (150, 3, 97)]
        ids, mask = pad(rows, side)
        after = models.prompt(45, seed=1, rows=3)
        with compress(model, ATTENTION) as pleated:
            cache, logits = pleated.new_cache(), []
            pleated.prefill(ids, mask, cache=cache, chunk_size=31)
            for step in range(45):
                mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
                logits.append(forward(model, after[:, step : step + 1], mask, cache))
            for i, row in enumerate(rows):
                alone = pleated.new_cache()
                pleated.prefill(row[None], cache=alone)
                close(torch.cat(logits, dim=1)[i], feed(model, after[i], alone, [1]))

    def test_fork_in_the_middle(self, family: str) -> None:
        """A fork after the prompt goes on as the original."""
        model = models.tiny(family)
        with compress(model, ATTENTION) as pleated:
            expected = conversation(model, pleated, pleated.new_cache(), declared(1000))
            close(conversation(model, pleated, pleated.new_cache(), declared(1000), PleatedCache.fork), expected)

    def test_save_and_load_in_the_middle(self, family: str, tmp_path: Path) -> None:
        """A cache saved after the prompt and loaded again goes on as the original."""
        model = models.tiny(family)
        with compress(model, ATTENTION) as pleated:

            def through_a_file(cache: PleatedCache) -> PleatedCache:
                cache.save(tmp_path / "chat.safetensors")
                cache.release()
                return pleated.load_cache(tmp_path / "chat.safetensors")

            expected = conversation(model, pleated, pleated.new_cache(), declared(1000))
            close(conversation(model, pleated, pleated.new_cache(), declared(1000), through_a_file), expected)

    @pytest.mark.parametrize("how", ["fork", "file"])
    def test_leaving_in_the_middle_of_a_prompt(self, family: str, how: str, tmp_path: Path) -> None:
        """A cache forked, or saved and loaded, between two pieces of a prompt goes on as one that was not."""
        model, ids, after = models.tiny(family), models.prompt(150), models.prompt(20, seed=1)[0]
        with compress(model, ATTENTION) as pleated:
            whole = pleated.new_cache()
            expected = torch.cat([pleated.prefill(ids, cache=whole), feed(model, after, whole, [1])])
            cache = pleated.new_cache()
            cache.expect_prompt(150)
            feed(model, ids[0, :90], cache, [90])
            if how == "file":
                cache.save(tmp_path / "chat.safetensors")
                cache = pleated.load_cache(tmp_path / "chat.safetensors")
            else:
                cache = cache.fork()
            found = torch.cat([feed(model, ids[0, 90:], cache, [60])[-1:], feed(model, after, cache, [1])])
            close(found, expected)
            same_entries(cache, whole)

    def test_continue_with_is_decoding(self, family: str) -> None:
        """Known tokens fed at once as a continuation equal the same tokens decoded one by one."""
        model, after = models.tiny(family), models.prompt(75, seed=1)
        with compress(model, ATTENTION) as pleated:
            one, other = pleated.new_cache(), pleated.new_cache()
            for cache in (one, other):
                pleated.prefill(models.prompt(120), cache=cache)
            close(pleated.continue_with(after, cache=other)[0], feed(model, after[0], one, [1]))
            same_entries(other, one)

    def test_ratio_is_kept_at_every_step(self, family: str) -> None:
        """Allocated bytes never exceed full / ratio after the prompt, in decode and over a second turn."""
        model = models.tiny(family)
        with compress(model, AttentionScore(ratio=3.0)) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(models.prompt(300), cache=cache)
            assert_ratio(pleated, cache, 3.0)
            for token in models.prompt(70, seed=1)[0]:
                feed(model, token[None], cache, [1])
                assert_ratio(pleated, cache, 3.0)
            pleated.prefill(models.prompt(60, seed=2), cache=cache, chunk_size=23)
            assert_ratio(pleated, cache, 3.0)
            for token in models.prompt(40, seed=3)[0]:
                feed(model, token[None], cache, [1])
                assert_ratio(pleated, cache, 3.0)

    def test_heads_keep_different_amounts(self, family: str) -> None:
        """Heads compete: their streams are not all as long."""
        model = models.tiny(family)
        with compress(model, ATTENTION) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(models.prompt(300), cache=cache)
            assert cache.report().kept.unique().numel() > 1

    def test_what_was_kept_decides_the_output(self, family: str) -> None:
        """What was kept at the end of a prompt, per layer and head, as a mask over a full forward: the same logits."""
        model, prompt = models.tiny(family), 233
        ids = models.prompt(prompt + 20)  # up to the next moment at 256 nothing else leaves
        with compress(model, AttentionScore(ratio=3.0, fold=0.0)) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(ids[:, :prompt], cache=cache, chunk_size=50)
            visible = {}
            for layer, place in enumerate(pleated.facts.layers):
                entries = cache.kv.entries(layer, 0)
                mask = torch.ones(pleated.facts.shape.num_kv_heads, ids.shape[1], ids.shape[1], dtype=torch.bool)
                mask[:, prompt:, :prompt] = False
                for head, live in enumerate(entries.live):
                    mask[head, prompt:, entries.fields["position"][head][live].long()] = True
                assert int(mask[:, -1, :prompt].sum()) < mask.shape[0] * prompt
                visible[place] = mask
            found = pleated.continue_with(ids[:, prompt:], cache=cache)[0]
        close(found, reference.forward(model, ids[0], visible)[prompt:])

    def test_sinks_and_recent_window_stay_exact(self, family: str) -> None:
        """After a prompt, the keys and values of sinks and recent window are those of a full cache, bit for bit."""
        model, ids = models.tiny(family), models.prompt(300)
        policy = AttentionScore(ratio=4.0)
        with compress(model, Full()) as pleated:
            full = pleated.new_cache()
            pleated.prefill(ids, cache=full)
            exact = [full.kv.entries(layer, 0) for layer in range(pleated.facts.shape.num_layers)]
        with compress(model, policy) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(ids, cache=cache)
            wanted = [
                *range(policy.sinks),
                *range(300 - 16, 300),
            ]  # the recent window is a share of the budget, above 16
            for layer, whole in enumerate(exact):
                entries = cache.kv.entries(layer, 0)
                for head in range(pleated.facts.shape.num_kv_heads):
                    positions = entries.fields["position"][head][entries.live[head]].tolist()
                    places = [positions.index(p) for p in wanted]
                    assert torch.equal(entries.keys[head, places], whole.keys[head, wanted])
                    assert torch.equal(entries.values[head, places], whole.values[head, wanted])
                    if "log_weight" in entries.fields:
                        assert not entries.fields["log_weight"][head, places].any()


def assert_ratio(pleated: Any, cache: PleatedCache, ratio: float) -> None:
    """Pages in use, counted here, are within the ratio."""
    shape = pleated.facts.shape
    full = sum(cache.positions) * shape.num_streams * 2 * shape.head_dim * shape.dtype.itemsize
    assert cache.kv is not None
    assert int(cache.kv.num_pages.sum()) * pleated.pool.page_bytes * ratio <= full


def same_entries(one: PleatedCache, other: PleatedCache) -> None:
    """Two caches hold entries of the same positions, equal up to rounding, and as many pages."""
    assert one.kv is not None
    assert other.kv is not None
    assert torch.equal(one.kv.lengths, other.kv.lengths)
    assert torch.equal(one.kv.num_pages, other.kv.num_pages)
    for layer in range(one.kv.shape.num_layers):
        mine, theirs = one.kv.entries(layer, 0), other.kv.entries(layer, 0)
        assert torch.equal(mine.fields["position"], theirs.fields["position"])
        close(mine.keys, theirs.keys)
        close(mine.values, theirs.values)
        if "log_weight" in mine.fields:
            close(mine.fields["log_weight"], theirs.fields["log_weight"])


def test_all_policies_are_covered() -> None:
    """A policy that joins the registry needs tests of its own here, or in test_learned.py where gates decide."""
    assert set(policies.registry()) == {"full", "window", "attention"} | {"dms", "fold", "dmc"}


# ---- the cache by both of its names: transformers 5.24 renamed past_key_values to cache


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # transformers' own, to the caller
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cache_by_either_name(family: str, name: str) -> None:
    """The model, its decoder and generate fill the cache they are given, whichever transformers its name is from."""
    model, ids = models.tiny(family), models.prompt(60)
    with compress(model, Full()) as pleated, torch.no_grad():
        cache = pleated.new_cache()
        model(ids[:, :20], **{name: cache})
        pleated.facts.decoder(ids[:, 20:40], **{name: cache})
        logits = model(ids[:, 40:50], **{name: cache}).logits[0]
        mask = torch.ones(1, 60)
        model.generate(ids[:, 50:], attention_mask=mask, **{name: cache}, max_new_tokens=5, do_sample=False)
        assert cache.columns == 64  # the last new token is not fed
    close(logits, reference.forward(model, ids[0, :50])[40:])


def test_both_names_at_once() -> None:
    """cache wins, as in transformers, and the other cache stays empty."""
    model, ids = models.tiny("llama"), models.prompt(20)
    with compress(model, Full()) as pleated:
        one, other = pleated.new_cache(), pleated.new_cache()
        model.generate(ids, attention_mask=torch.ones_like(ids), cache=one, past_key_values=other, max_new_tokens=5)
        assert (one.columns, other.columns) == (24, 0)
