"""Policies whose gates decide token by token: however a text is fed, the logits are those of the definition, worked out
in plain loops (tests/reference.py); and the memory is really gone.

Gates are random, with weights so large that about half of all tokens are marked.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat import PleatedCache, compress, explain
from kvpleat.errors import AttachError, CacheFileError, OptionError
from kvpleat.kernels import reference as kernels
from kvpleat.policies import DMC, DMS, Fold, Full, GateConfig, Gates
from kvpleat.policies.learned import Learned
from tests import models, reference

LENGTH, ROUNDING = 61, 1e-5
KINDS: dict[str, tuple[type[Learned], int, int | None, int]] = {  # policy, delay, look_back, sinks
    "dms": (DMS, 5, None, 1),
    "fold": (Fold, 3, None, 0),
    "dmc": (DMC, 0, None, 0),
    "dmc of 3": (DMC, 0, 3, 2),
    "fold of 4": (Fold, 1, 4, 1),
}
PIECES = {
    "whole": [LENGTH],
    "pieces": [1, 7, 2, 26, 3, 11],
    "one by one": [1],
    "prompt, then decode": [38, 1],
    "turns": [17, 1, 1, 1, 13, *[1] * 7, 2, 1, 8],
}


def gates_for(model: Any, kind: str, seed: int = 0, weight: float = 2.5, bias: float = 0.0) -> Gates:
    """Random gates for a model."""
    policy, delay, look_back, sinks = KINDS[kind]
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = sum(window is None for window in reference.layer_windows(model))
    gates = Gates(GateConfig(policy.name, layers, heads, config.hidden_size, delay, look_back, sinks, scale=2.0))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * weight / 2 / config.hidden_size**0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2 + bias)
    return gates.requires_grad_(False)


def policy_for(model: Any, kind: str, bits: int | None = None, **options: Any) -> Learned:
    return KINDS[kind][0](gates=gates_for(model, kind, **options), bits=bits)


@functools.cache
def expected(family: str, kind: str, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Logits of `models.prompt(length, seed)` by the definition."""
    model = models.tiny(family)
    return by_definition(model, models.prompt(length, seed)[0], kind)


def by_definition(model: Any, tokens: Tensor, kind: str, bits: int | None = None) -> Tensor:
    gates, (policy, delay, look_back, sinks) = gates_for(model, kind), KINDS[kind]
    weights, biases = [layer.weight for layer in gates.outer], [layer.bias for layer in gates.outer]
    learned = reference.Learned(policy.name, weights, biases, gates.config.scale, delay, look_back, sinks)
    if bits is not None:
        learned.stored = lambda x: kernels.dequantize(kernels.quantize(x, bits), x.shape[-1], x.dtype)
    return reference.learned_forward(model, tokens, learned)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)


def feed(model: Any, tokens: Tensor, cache: PleatedCache, pieces: list[int]) -> Tensor:
    """Logits [T, vocabulary] of tokens [T], fed in pieces of the given sizes, the last one repeated. Pages and rings
    are checked after each."""
    logits, start, sizes = [], 0, list(pieces)
    while start < tokens.shape[0]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        with torch.no_grad():
            logits.append(model(tokens[None, start : start + size], **models.given(cache)).logits[0])
        start += size
        assert cache.kv is not None
        cache.kv.check_integrity()
    return torch.cat(logits)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
class TestOneFunction:
    """The tokens decide the output."""

    @pytest.mark.parametrize("pieces", PIECES)
    def test_however_it_is_fed(self, family: str, kind: str, pieces: str) -> None:
        """Logits at every position are those of the definition."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        with compress(model, policy_for(model, kind)) as pleated:
            found = feed(model, tokens, pleated.new_cache(), PIECES[pieces])
        close(found, expected(family, kind))

    def test_fork_in_the_middle(self, family: str, kind: str) -> None:
        """A fork goes on as the original would, and neither notices what the other is fed."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        other = torch.cat([tokens[:40], models.prompt(LENGTH - 40, seed=5)[0]])
        with compress(model, policy_for(model, kind)) as pleated:
            cache = pleated.new_cache()
            feed(model, tokens[:40], cache, [40])
            twin, found = cache.fork(), []
            for start in range(40, LENGTH, 5):  # in turns, so that pages of both are taken and given back in between
                found.append(feed(model, tokens[start : start + 5], cache, [5]))
                found.append(feed(model, other[start : start + 5], twin, [1]))
            check_pool(pleated, cache, twin)
        close(torch.cat(found[0::2]), expected(family, kind)[40:])
        close(torch.cat(found[1::2]), by_definition(model, other, kind)[40:])

    def test_save_and_load_in_the_middle(self, family: str, kind: str, tmp_path: Path) -> None:
        """A loaded cache goes on as the saved one would, in an attachment of its own."""
        model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
        with compress(model, policy_for(model, kind)) as pleated:
            cache = pleated.new_cache()
            feed(model, tokens[:50], cache, [33, 1])
            cache.save(tmp_path / "chat.safetensors")
        with compress(model, policy_for(model, kind), page_size=32) as pleated:
            found = feed(model, tokens[50:], pleated.load_cache(tmp_path / "chat.safetensors"), [1, 1, 12, 1])
        close(found, expected(family, kind)[50:])

    @pytest.mark.parametrize(("side", "chunk"), [("left", 1), ("left", 7), ("right", 7), ("right", 200)])
    def test_in_a_padded_batch(self, family: str, kind: str, side: str, chunk: int) -> None:
        """Each row of a padded batch computes what it computes alone, and goes on so."""
        if side == "right" and family.startswith("gemma") and chunk != 200:
            pytest.skip("the model's own sliding windows count columns, padding included")
        model, lengths, more = models.tiny(family), [41, 1, 29], 9
        rows = [models.prompt(LENGTH, seed=i)[0] for i in range(3)]
        ids, mask = pad([row[:length] for row, length in zip(rows, lengths, strict=True)], side)
        with compress(model, policy_for(model, kind)) as pleated:
            cache, logits = pleated.new_cache(), []
            for start in range(0, ids.shape[1], chunk):
                stop = min(start + chunk, ids.shape[1])
                logits.append(forward(model, ids[:, start:stop], mask[:, :stop], cache))
            if side == "left" or not family.startswith("gemma"):
                lengths = [length + more for length in lengths]
                for step in range(-more, 0):
                    new = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])
                    mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
                    logits.append(forward(model, new[:, None], mask, cache))
            assert cache.kv is not None
            cache.kv.check_integrity()
        found = torch.cat(logits, dim=1)
        for i, length in enumerate(lengths):
            close(found[i][mask[i].bool()], expected(family, kind, seed=i)[:length])

    def test_generate(self, family: str, kind: str) -> None:
        """generate on a left-padded batch: the logits that the definition gives for what it wrote."""
        model, ids = models.tiny(family), models.prompt(30, rows=2)
        mask = torch.ones_like(ids)
        mask[1, :11] = 0
        options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with compress(model, policy_for(model, kind)):
            out = model.generate(ids * mask, attention_mask=mask, **options)
        for row, padding in ((0, 0), (1, 11)):
            whole = by_definition(model, out.sequences[row, padding:], kind)
            close(torch.stack(out.logits)[:, row].to(whole.dtype), whole[-15:-1])


def check_pool(pleated: Any, *caches: PleatedCache) -> None:
    pleated.pool.check_integrity({cache.kv.owner: cache.kv.owned_pages() for cache in caches if cache.kv})


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_entries_of_fewer_bits(family: str, kind: str, bits: int) -> None:
    """Entries are quantised when they come and when a merge changed them, however a text is fed: the definition on what
    is read back. Rounding may flip a code, and then all later logits; seldom: most ways of feeding are exact."""
    model, tokens = models.tiny(family), models.prompt(LENGTH)[0]
    wanted = by_definition(model, tokens, kind, bits)
    effect = float((wanted - expected(family, kind)).abs().median())
    with compress(model, policy_for(model, kind, bits=bits)) as pleated:
        errors = [(feed(model, tokens, pleated.new_cache(), way) - wanted).abs() for way in PIECES.values()]
    assert sum(float(error.max()) < ROUNDING for error in errors) >= 3
    assert all(float(error.median()) < effect / 10 for error in errors)


@pytest.mark.parametrize("kind", KINDS)
class TestMemory:
    """What leaves is really gone."""

    def test_pages_hold_the_live_entries_and_no_more(self, kind: str) -> None:
        """After a prompt, in one piece or several, each stream has the pages that its entries fill; they are as many as
        gates left, and bytes fall accordingly."""
        model, tokens, policy = models.tiny("llama"), models.prompt(400)[0], KINDS[kind][0]
        kept = {}
        for size in (400, 130):
            with compress(model, policy_for(model, kind)) as pleated:
                cache = pleated.new_cache()
                feed(model, tokens, cache, [size])
                kv, report = cache.kv, cache.report()
                assert kv is not None
                pages = -(-kv.lengths // kv.shape.page_size)
                assert torch.equal(kv.num_pages, pages)
                assert report.allocated_bytes == int(pages.sum()) * pleated.pool.page_bytes
                assert report.peak_allocated_bytes == report.allocated_bytes
                assert report.compression_ratio > 1.3
                kept[size] = kv.lengths.clone()
        assert torch.equal(kept[400], kept[130])
        assert policy.fields == () or report.live_bytes < report.full_bytes

    def test_all_marked(self, kind: str) -> None:
        """Where gates mark everything a stream is its sinks, its window and one entry, in the prompt and however long
        one decodes."""
        model, window = models.tiny("llama"), KINDS[kind][1] + KINDS[kind][3] + 1
        with compress(model, policy_for(model, kind, weight=0.0, bias=30.0)) as pleated:
            cache = pleated.new_cache()
            feed(model, models.prompt(100)[0], cache, [100])
            assert cache.kv is not None
            for token in models.prompt(40, seed=1)[0]:
                assert bool((cache.kv.lengths == window).all())
                assert cache.kv.pages_in_use == cache.kv.num_pages.numel()
                feed(model, token[None], cache, [1])
            cache.release()
            assert pleated.pool.in_use == 0

    def test_nothing_marked_is_no_compression(self, kind: str) -> None:
        """Gates that mark nothing leave the model's own logits, and as many entries as tokens."""
        model, tokens = models.tiny("llama"), models.prompt(70)[0]
        with compress(model, policy_for(model, kind, weight=0.0, bias=-30.0)) as pleated:
            cache = pleated.new_cache()
            found = feed(model, tokens, cache, [33, 1])
            assert cache.kv is not None
            assert bool((cache.kv.lengths == 70).all())
        close(found, reference.forward(model, tokens))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_detaching_leaves_the_model_as_it_was(family: str) -> None:
    """Bit for bit, and without hooks."""
    model, tokens = models.tiny(family), models.prompt(40)
    with torch.no_grad():
        before = model(tokens).logits
        with compress(model, policy_for(model, "fold")):
            hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
            assert hooks == 1 + sum(window is None for window in reference.layer_windows(model))
            assert not torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_gates_of_another_model_are_refused() -> None:
    """Before anything is put on the model, with both numbers."""
    model = models.tiny("llama")
    for changes, text in (
        ({"num_hidden_layers": 2}, r"num_layers 2 \(the model has 3\)"),
        ({"num_key_value_heads": 3}, r"num_kv_heads 3 \(the model has 2\)"),
        ({"hidden_size": 96}, r"hidden_size 96 \(the model has 48\)"),
    ):
        policy = policy_for(models.tiny("llama", **changes), "dms")
        with pytest.raises(OptionError, match=text):
            compress(model, policy).attach()
        with pytest.raises(OptionError, match=text):
            explain(model, policy)


def test_a_file_of_other_gates_is_refused(tmp_path: Path) -> None:
    """Entries that other gates left mean something else: the file names them by a checksum."""
    model, path = models.tiny("llama"), tmp_path / "chat.safetensors"
    with compress(model, policy_for(model, "dms")) as pleated:
        cache = pleated.new_cache()
        feed(model, models.prompt(20)[0], cache, [20])
        cache.save(path)
    with compress(model, policy_for(model, "dms", seed=1)) as pleated, pytest.raises(CacheFileError, match="memory:"):
        pleated.load_cache(path)


def test_gates_that_could_be_trained() -> None:
    """Gates need not be frozen: what they decide carries no gradient."""
    model, policy = models.tiny("llama").requires_grad_(False), policy_for(models.tiny("llama"), "fold")
    assert isinstance(policy.gates, Gates)
    policy.gates.requires_grad_(True)
    tokens = models.prompt(20)
    with compress(model, policy) as pleated:
        cache = pleated.new_cache()
        whole = model(tokens, **models.given(cache)).logits
        step = model(tokens[:, :1], **models.given(cache)).logits
    assert not whole.requires_grad
    assert not step.requires_grad


def test_prefill_and_known_continuations() -> None:
    """What kvpleat feeds itself: a prompt in pieces, and tokens as if they had been generated."""
    model, tokens = models.tiny("qwen3"), models.prompt(LENGTH)
    with compress(model, policy_for(model, "fold")) as pleated:
        cache = pleated.new_cache()
        last = pleated.prefill(tokens[:, :40], cache=cache, chunk_size=9)
        rest = pleated.continue_with(tokens[:, 40:], cache=cache)
    close(torch.cat([last, rest[0]]), expected("qwen3", "fold")[39:])


def test_a_replaced_attention_module_is_noticed() -> None:
    """A layer that runs without its gates is an error, and no silent full cache."""
    model = models.tiny("llama")
    with compress(model, policy_for(model, "dms")), torch.no_grad():
        model.model.layers[1].self_attn._forward_pre_hooks.clear()
        for tokens in (models.prompt(9), models.prompt(1)):
            with pytest.raises(AttachError, match="layer 1 ran without its gates"):
                model(tokens)


def test_inference_mode() -> None:
    """A cache made in inference mode goes on outside it."""
    model, tokens = models.tiny("llama"), models.prompt(LENGTH)[0]
    with compress(model, policy_for(model, "fold")) as pleated:
        cache = pleated.new_cache()
        with torch.inference_mode():
            first = feed(model, tokens[:30], cache, [20, 1])
        found = torch.cat([first, feed(model, tokens[30:], cache, [11, 1])])
    close(found, expected("llama", "fold"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Narrow models run, whole and step by step, and stay near: their gates may decide otherwise here and there."""
    model, tokens = models.tiny("llama", dtype=dtype), models.prompt(LENGTH)[0]
    with compress(model, policy_for(model, kind)) as pleated:
        whole = feed(model, tokens, pleated.new_cache(), [LENGTH])
        pieces = feed(model, tokens, pleated.new_cache(), [30, 1])
    assert whole.dtype == dtype
    error = (whole.double() - expected("llama", kind)).abs().median()
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.1)
    assert float((whole - pieces).double().abs().median()) < (1e-5 if dtype == torch.float32 else 0.1)


def test_explain_says_how_it_runs() -> None:
    """What decides, and how prefill and decode run."""
    model = models.tiny("llama")
    topics = explain(model, policy_for(model, "fold")).topics
    assert "3 tokens" in topics["leaving"]
    assert "merge" in topics["leaving"]
    assert "blocks of queries" in topics["prefill"]
    assert "CPU kernel" in topics["decode"]
    assert "leaving" not in explain(model, Full()).topics
    assert "at once" in explain(model, policy_for(model, "dmc")).topics["leaving"]
