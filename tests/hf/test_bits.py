"""Policies with `bits`: the tokens decide the output, budgets count real bytes, files and explanations say so.

A number that lies half way between two steps may be rounded up in one run and down in another, whose last digits
differ: then one code differs by one, and logits by a share of what quantising changes. So logits are compared strictly
where both runs stored the same codes, and a few codes may differ.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat import accounting, compress, explain
from kvpleat.cache import entries
from kvpleat.cache.paged import PagedKVCache
from kvpleat.errors import CacheFileError, OptionError
from kvpleat.policies import AttentionScore, Full, Policy, Window, from_dict
from kvpleat.types import ENTRY_BITS, KVShape
from tests import models

LENGTH, ROUNDING = 150, 1e-5
POLICIES: tuple[Policy, ...] = (
    Full(bits=8),
    Full(bits=4),
    Window(budget=48, bits=6),
    AttentionScore(ratio=7.0, fold=0.2, bits=8),
    AttentionScore(ratio=7.0, fold=0.3, bits=6),
)


def run(model: Any, policy: Policy, pieces: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [LENGTH, vocabulary] of a text whose prompt ends at 120, fed in pieces; and all that was ever stored: what
    layers appended, array by array [H, LENGTH, ...], and what each merge made of its layer."""
    appended: dict[str, list[Tensor]] = {}
    merged: dict[str, Tensor] = {}
    append_rows, encode = PagedKVCache.append_rows, entries.encode

    def noting_append(kv: PagedKVCache, layer: int, *args: Any) -> Any:
        content = append_rows(kv, layer, *args)
        for name, tensor in content.items():
            appended.setdefault(f"{name} of layer {layer}", []).append(tensor[0])
        return content

    def noting_encode(keys: Tensor, values: Tensor, shape: KVShape) -> Any:
        content = encode(keys, values, shape)
        if keys.dim() == 3:  # a merge; entries that are appended have rows as well
            merged.update({f"{name} of merge {len(merged)}": tensor for name, tensor in content.items()})
        return content

    with pytest.MonkeyPatch.context() as patch, compress(model, policy) as pleated, torch.no_grad():
        patch.setattr(PagedKVCache, "append_rows", noting_append)
        patch.setattr(entries, "encode", noting_encode)
        cache, logits, start = pleated.new_cache(), [], 0
        cache.expect_prompt(120)
        tokens = models.prompt(LENGTH)
        for size in pieces:
            logits.append(model(tokens[:, start : start + size], **models.given(cache)).logits[0])
            start += size
    assert start == LENGTH
    return torch.cat(logits), {name: torch.cat(parts, dim=1) for name, parts in appended.items()} | merged


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.bits}")
def test_however_it_is_fed(family: str, policy: Policy) -> None:
    """One prefill, chunks, and one token at a time."""
    model = models.tiny(family)
    expected, stored = run(model, policy, [120, *[1] * 30])
    assert policy.name != "attention" or any("merge" in name for name in stored)
    for pieces in ([50, 7, 63, *[1] * 30], [1] * LENGTH):
        found, its_stored = run(model, policy, pieces)
        assert its_stored.keys() == stored.keys()
        differ = sum(int((its_stored[name] != stored[name]).sum()) for name in stored)
        assert differ <= 0.005 * sum(tensor.numel() for tensor in stored.values())
        if not differ:
            torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("bits", ENTRY_BITS)
def test_quantising_is_one_function_with_decode_alone(bits: int) -> None:
    """Fed one by one, every token sees what later ones see: the reference on fake-quantised keys and values."""
    model = models.tiny("llama")
    with compress(model, Full(bits=bits)) as pleated, torch.no_grad():
        tokens = models.prompt(40)
        cache = pleated.new_cache()
        found = torch.cat([model(tokens[:, i : i + 1], **models.given(cache)).logits[0] for i in range(40)])
        again = model(tokens, **models.given(pleated.new_cache())).logits[0]
    exact = model(tokens).logits[0].detach()
    torch.testing.assert_close(found, again, atol=5e-3, rtol=0)
    assert ROUNDING < float((found - exact).abs().max()) < {8: 0.2, 6: 1.5, 4: 2.5}[bits]


@pytest.mark.parametrize("bits", [None, *ENTRY_BITS])
def test_the_budget_is_counted_in_stored_bytes(bits: int | None) -> None:
    """Fewer bits keep more entries at the same ratio, and the ratio holds."""
    model, ids = models.tiny("llama"), models.prompt(400)
    kept = []
    for stored in (None, bits):
        with compress(model, AttentionScore(ratio=16.0, recent=0.1, sinks=0, bits=stored)) as pleated:
            cache = pleated.new_cache()
            pleated.prefill(ids, cache=cache)
            report = cache.report()
            assert report.compression_ratio >= 15.9 or report.kept.mean() < 48
            kept.append(float(report.kept.mean()))
    assert bits is None or kept[1] > 2 * kept[0]


@pytest.mark.parametrize("bits", ENTRY_BITS)
def test_padding_batches_forks_and_files(bits: int, tmp_path: Path) -> None:
    """A left-padded batch equals its rows alone; forks and files go on as the cache itself."""
    model, policy = models.tiny("llama"), AttentionScore(ratio=10.0, bits=bits)
    ids = models.prompt(90, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with compress(model, policy) as pleated, torch.no_grad():
        both = model.generate(ids * mask, attention_mask=mask, **options)
        alone = model.generate(ids[1:, 31:], attention_mask=torch.ones_like(ids[1:, 31:]), **options)
        torch.testing.assert_close(both.logits[0][1], alone.logits[0][0], atol=5e-3, rtol=0)
        cache = pleated.new_cache()
        pleated.prefill(ids[:1], cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        step = ids[:1, :1]
        twins = [cache, cache.fork(), pleated.load_cache(tmp_path / "cache.safetensors")]
        logits = [model(step, **models.given(twin)).logits for twin in twins]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
    with (
        compress(model, AttentionScore(ratio=10.0)) as pleated,
        pytest.raises(CacheFileError, match=f"'bits': {bits}"),
    ):
        pleated.load_cache(tmp_path / "cache.safetensors")


def test_what_is_refused() -> None:
    """Bits that are not known, and channels that cannot be paired, before anything is allocated."""
    for bits in (0, 2, 16, -8, 8.0, True):
        with pytest.raises(OptionError, match=r"8, 6, 4 bits"):
            Full(bits=bits)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=r"8, 6, 4 bits"):
            from_dict({"name": "window", "budget": 64, "bits": bits})
    with pytest.raises(OptionError, match="7 channels"):
        KVShape(1, 1, 1, 7, torch.float32, bits=8)
    KVShape(1, 1, 1, 7, torch.float32)


def test_entry_bytes_by_hand() -> None:
    """64 channels: 128, 96 or 64 bytes of codes and 8 of steps; side arrays on top; full is the model's."""
    for bits, size in ((8, 136), (6, 104), (4, 72)):
        shape = KVShape(30, 3, 9, 64, torch.bfloat16, bits=bits)
        assert accounting.entry_bytes(shape) == size
        assert accounting.full_entry_bytes(shape) == 256
        with_fields = KVShape(30, 3, 9, 64, torch.float32, fields=("position", "log_weight", "score"), bits=bits)
        assert accounting.entry_bytes(with_fields) == size + 12


def test_options_come_back() -> None:
    """to_dict and from_dict carry bits; files written before there were bits still load."""
    policy = AttentionScore(ratio=4.0, bits=6)
    assert from_dict(policy.to_dict()) == policy
    assert from_dict({"name": "attention", "ratio": 4.0}).bits is None


def test_explain_says_how_entries_are_stored() -> None:
    """In words, and in bytes."""
    model = models.tiny("llama")
    assert "as the model computes them" in explain(model, Full()).topics["entries"]
    text = explain(model, Window(budget=64, bits=6)).topics["entries"]
    assert "6 bits a number (keys 8, values 4)" in text
    assert "36 bytes" in text


def test_a_broken_model_is_not_hidden() -> None:
    """NaN in a key is NaN in the output, as without bits."""
    model = models.tiny("llama")
    weight = model.model.layers[1].self_attn.k_proj.weight
    old = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with compress(model, Full(bits=8)), torch.no_grad():
            assert bool(model(models.prompt(20)).logits.isnan().any())
    finally:
        with torch.no_grad():
            weight.copy_(old)
