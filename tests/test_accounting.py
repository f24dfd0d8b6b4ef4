"""The meter, against numbers worked out by hand."""

import json
import sys
from typing import Any

import pytest
import torch

from kvpleat import accounting, compress
from kvpleat.errors import OptionError
from kvpleat.policies import AttentionScore, Full, Window
from kvpleat.policies.budget import allowed_pages, next_multiple, pages_for
from kvpleat.types import KVShape
from tests import models


def shape(**changes: Any) -> KVShape:
    options = {"num_layers": 3, "num_kv_heads": 2, "num_q_heads": 6, "head_dim": 16, "dtype": torch.float32}
    return KVShape(**{**options, **changes})


def test_entry_and_page_bytes() -> None:
    """16 channels of float32, key and value: 128 bytes; a position is 4 more, all three side arrays 12."""
    assert accounting.full_entry_bytes(shape()) == 128
    assert accounting.entry_bytes(shape()) == 128
    assert accounting.entry_bytes(shape(fields=("position",))) == 132
    assert accounting.entry_bytes(shape(fields=("position", "log_weight", "score"))) == 140
    assert accounting.entry_bytes(shape(dtype=torch.bfloat16, fields=("position",))) == 68
    assert accounting.page_bytes(shape(fields=("position",))) == 16 * 132
    assert accounting.page_bytes(shape(page_size=32)) == 32 * 128


def test_full_bytes() -> None:
    """1,000 tokens, 3 layers of 2 KV heads, side arrays never counted: 768,000 bytes."""
    assert accounting.full_bytes(shape(), 1000) == 768_000
    assert accounting.full_bytes(shape(fields=("position", "log_weight", "score")), 1000) == 768_000
    assert accounting.full_bytes(shape(), 0) == 0


def test_smollm2_8k() -> None:
    """SmolLM2-135M at 8,192 tokens in bfloat16: 30 layers x 3 heads x 64 channels x 2 x 2 bytes = 22.5 KiB a token."""
    smollm2 = KVShape(30, 3, 9, 64, torch.bfloat16)
    assert accounting.full_bytes(smollm2, 1) == 23_040
    assert accounting.full_bytes(smollm2, 8192) == 188_743_680
    assert accounting.human_bytes(188_743_680) == "180.0 MiB"


def test_human_bytes() -> None:
    """Binary units, and no decimals for bytes."""
    assert [accounting.human_bytes(x) for x in (0, 1023, 1024, 1536, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_ratio_is_a_ratio_of_sums() -> None:
    """full over allocated; an empty cache has ratio 1."""
    report = accounting.MemoryReport(1000, 200, 250, 500, 10, torch.ones(1, 1), 5)
    assert report.compression_ratio == 4.0
    assert accounting.MemoryReport(0, 0, 0, 0, 0, torch.zeros(1, 1), 0).compression_ratio == 1.0


def test_report_as_text_and_json() -> None:
    """Every number is in both; the dictionary is JSON."""
    report = accounting.MemoryReport(2048, 512, 1024, 4096, 10, torch.tensor([[1.0, 2.5]]), 7)
    found = json.loads(json.dumps(report.to_dict()))
    assert found == {
        "full_bytes": 2048,
        "live_bytes": 512,
        "allocated_bytes": 1024,
        "peak_allocated_bytes": 4096,
        "overhead_bytes": 10,
        "compression_ratio": 2.0,
        "seen_tokens": 7,
        "kept": [[1.0, 2.5]],
    }
    for text in ("2.0 KiB", "512 B", "1.0 KiB", "4.0 KiB", "2.00x"):
        assert text in str(report)


def test_tensor_bytes() -> None:
    """Elements times their size; None is nothing."""
    assert accounting.tensor_bytes(torch.zeros(3, 5), None, torch.zeros(4, dtype=torch.int16)) == 68


def test_budget_arithmetic() -> None:
    """ratio 4 at 1,000 tokens: 192,000 bytes, 90 pages of 2,112."""
    assert allowed_pages(shape(fields=("position",)), 1000, 4.0) == 90
    # 30,000 bytes beside: 162,000 left for pages of 2,112 + 8; never more than a quarter goes there.
    assert allowed_pages(shape(fields=("position",)), 1000, 4.0, beside=30_000) == 76
    assert allowed_pages(shape(fields=("position",)), 1000, 4.0, beside=10**9) == 67
    assert accounting.query_bytes(shape(), 16) == 3 * 6 * 16 * 16 * 4
    assert [pages_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [next_multiple(n, 16) for n in (0, 15, 16, 17)] == [16, 16, 32, 32]


def test_impossible_shapes() -> None:
    """Groups that do not divide, pages of other sizes."""
    with pytest.raises(OptionError, match="groups"):
        shape(num_q_heads=5)
    with pytest.raises(OptionError, match="16"):
        shape(page_size=8)
    assert (shape().group_size, shape().num_streams) == (3, 6)


# ---- the meter of a running model


def run(model: Any, policy: Any, length: int, rows: int = 1) -> Any:
    with compress(model, policy) as pleated, torch.no_grad():
        model(models.prompt(length, rows=rows))
        return pleated.report()


def test_report_of_full() -> None:
    """50 tokens, 3 layers x 2 heads x 16 channels in float64: 50 x 6 x 256; 4 pages a stream."""
    report = run(models.tiny("llama"), Full(), 50)
    assert report.full_bytes == report.live_bytes == 50 * 6 * 256
    assert report.allocated_bytes == report.peak_allocated_bytes == 6 * 4 * 16 * 256
    assert report.kept.tolist() == [[50.0, 50.0]] * 3
    assert report.seen_tokens == 50


def test_report_of_rows() -> None:
    """Two rows count twice; kept is a mean."""
    report = run(models.tiny("llama"), Full(), 16, rows=2)
    assert report.full_bytes == report.allocated_bytes == 2 * 16 * 6 * 256
    assert report.kept.tolist() == [[16.0, 16.0]] * 3
    assert report.seen_tokens == 32


def test_report_of_window() -> None:
    """budget 40 at 100 tokens: at moment 96, 4 sinks and 20 recent entries; then 4 more, in 3 pages."""
    report = run(models.tiny("llama"), Window(budget=40), 100)
    assert report.kept.tolist() == [[28.0, 28.0]] * 3
    assert report.live_bytes == 6 * 28 * 260
    assert report.allocated_bytes == 6 * 3 * 16 * 260  # 40 entries are reserved until the next moment
    assert report.peak_allocated_bytes >= report.allocated_bytes
    assert report.full_bytes == 100 * 6 * 256


def test_padding_is_not_counted() -> None:
    """A row of 20 tokens and 30 of padding has seen 20."""
    model, mask = models.tiny("llama"), torch.ones(2, 50, dtype=torch.long)
    mask[1, :30] = 0
    with compress(model, Full()) as pleated, torch.no_grad():
        model(models.prompt(50, rows=2), attention_mask=mask)
        report = pleated.report()
    assert report.seen_tokens == 70
    assert report.full_bytes == report.live_bytes == 70 * 6 * 256


def test_sliding_layers_count_the_same_everywhere() -> None:
    """Gemma's own windows are neither saved nor spent: full, live and allocated hold them alike."""
    model = models.tiny("gemma3_text")
    report = run(model, Window(budget=40), 100)
    held = 2 * 2 * (models.SLIDING_WINDOW - 1) * 256  # 2 layers x 2 heads; transformers keeps window - 1
    assert report.full_bytes == 100 * 4 * 256 + held
    assert report.live_bytes == 4 * 28 * 260 + held
    assert report.allocated_bytes == 4 * 3 * 16 * 260 + held
    assert report.kept.shape == (2, 2)


def test_full_is_never_a_saving() -> None:
    """allocated >= live for every policy, at any length; Full never has a ratio above 1."""
    model = models.tiny("llama")
    for length in (1, 15, 16, 17, 47, 200):
        for policy in (Full(), Window(budget=40), AttentionScore(ratio=2.0)):
            report = run(model, policy, length)
            assert report.allocated_bytes >= report.live_bytes > 0
            assert report.peak_allocated_bytes >= report.allocated_bytes
        assert run(model, Full(), length).compression_ratio <= 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back one by one on Linux")
def test_memory_is_back_when_the_prompt_ends() -> None:
    """What chunks needed on their way is the system's again: nothing is left to trim, and the entries are unharmed."""
    model, ids = models.tiny("llama"), models.prompt(400)
    with compress(model, AttentionScore(ratio=4.0)) as pleated:
        cache = pleated.new_cache()
        logits = pleated.prefill(ids, cache=cache, chunk_size=100)
        assert pleated.pool.num_pages > pleated.pool.in_use  # there was something to give back
        assert cache.trim() == 0
        whole = pleated.prefill(ids, cache=pleated.new_cache())
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-3)
