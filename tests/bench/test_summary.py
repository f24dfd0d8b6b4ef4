"""Figures from records: hand-computed values, pairs, conversations, verdicts, memory, curves."""

import math
from typing import Any

import pytest

from kvpleat.bench.metrics import bootstrap_mean, paired_bootstrap, perplexity_increase
from kvpleat.bench.profiles import example_traces, kept_shares, kl_along, memory_rows, speeds
from kvpleat.bench.records import Record
from kvpleat.bench.summary import Row, summarize, verdicts
from kvpleat.errors import OptionError

OURS = "attention:ratio=4"


def record(
    method: str, item: str, scores: dict[str, float], held: float = 25, task: str = "continuation", **group: Any
) -> Record:
    """A record of 100 full bytes."""
    memory = {"full_bytes": 100, "allocated_bytes": held, "claimed_bytes": 25}
    return Record(task, item, group, method, scores, memory)


def one(rows: list[Row], method: str, metric: str) -> Row:
    """The only row of a method and metric."""
    (row,) = (row for row in rows if (row.method, row.metric.name) == (method, metric))
    return row


LOSSES = {"a": (20.0, 10.0), "b": (90.0, 30.0), "c": (33.0, 20.0)}  # item -> (nll, tokens)


def test_perplexity_is_a_ratio_of_sums_and_its_difference_is_relative() -> None:
    base = [record("dynamic", item, {"nll": nll, "tokens": n}, 100) for item, (nll, n) in LOSSES.items()]
    ours = [record(OURS, item, {"nll": nll + i, "tokens": n}) for i, (item, (nll, n)) in enumerate(LOSSES.items())]
    rows = summarize([*base, *reversed(ours)])
    full, row = one(rows, "dynamic", "perplexity"), one(rows, OURS, "perplexity")
    assert full.value.value == pytest.approx(math.exp(143 / 60))
    assert full.difference is None
    assert row.value.value == pytest.approx(math.exp(146 / 60))
    assert row.difference is not None
    assert row.difference.value == pytest.approx(math.exp(3 / 60) - 1)
    expected = perplexity_increase(paired_bootstrap([35.0, 91.0, 20.0], [33.0, 90.0, 20.0], [20.0, 30.0, 10.0]))
    assert row.difference == expected
    mean = bootstrap_mean([35.0, 91.0, 20.0], [20.0, 30.0, 10.0])
    assert (row.value.low, row.value.high) == (math.exp(mean.low), math.exp(mean.high))
    assert (row.items, row.units, row.ratio) == (3, 3, 4.0)


def test_differences_are_over_shared_items_only() -> None:
    records = [record("dynamic", item, {"correct": 1.0}, 100, "passkey", form="after") for item in "abc"]
    records += [
        record(OURS, item, {"correct": right}, 25, "passkey", form="after") for item, right in (("b", 0.0), ("d", 1.0))
    ]
    row = one(summarize(records), OURS, "accuracy")
    assert row.group == (("form", "after"),)
    assert row.value.value == 0.5
    assert row.difference is not None
    assert row.difference.value == -1.0


def test_no_difference_where_methods_count_different_tokens() -> None:
    records = [record("dynamic", "a", {"nll": 1.0, "tokens": 9.0}), record(OURS, "a", {"nll": 1.0, "tokens": 8.0})]
    assert one(summarize(records), OURS, "perplexity").difference is None


def test_weights_are_compared_with_their_own_reference_unless_told() -> None:
    records = [
        record("dynamic", "a", {"found": 0.9}),
        record("dynamic", "a", {"found": 0.6}),
        record(OURS, "a", {"found": 0.5}),
    ]
    records[1].weights = records[2].weights = "int8"
    own, full = (one(summarize(records, reference_weights=w), OURS, "found").difference for w in (None, "full"))
    assert own is not None
    assert full is not None
    assert own.value == pytest.approx(-0.1)
    assert full.value == pytest.approx(-0.4)


def test_turns_of_one_conversation_are_one_unit() -> None:
    scores = {"x/0": (0.25, 0.5), "x/1": (1.0, 1.0)}
    records = [
        record(OURS, f"{talk}/{turn}", {"f1": value}, task="multiturn", turn=turn)
        for talk, values in scores.items()
        for turn, value in enumerate(values, 1)
    ]
    row = one(summarize(records), OURS, "f1")
    assert (row.items, row.units) == (4, 2)
    assert row.value == bootstrap_mean([0.75, 2.0], [2, 2])
    by_turn = summarize(records, ("turn",))
    assert [r.value.value for r in by_turn] == pytest.approx([0.625, 0.75])
    assert not one(summarize(records[:2]), OURS, "f1").certain


def test_unknown_scores_are_means_and_have_no_direction() -> None:
    row = one(summarize([record(OURS, "a", {"acc_norm": 3.0}), record(OURS, "b", {"acc_norm": 4.0})]), OURS, "acc_norm")
    assert row.value.value == 3.5
    assert row.metric.better is None
    assert verdicts([record(OURS, "a", {"acc_norm": 3.0})], [4.0]) == []


def test_missing_scores_are_not_zeros() -> None:
    rows = summarize([record(OURS, "a", {"f1": 1.0, "exact": 1.0}), record(OURS, "b", {"exact": 0.0})])
    assert (one(rows, OURS, "f1").value.value, one(rows, OURS, "f1").items) == (1.0, 1)
    assert one(rows, OURS, "exact").value.value == 0.5


def judged(method: str, values: list[float], held: float) -> list[Record]:
    """Pass keys of one method."""
    return [record(method, str(i), {"correct": v}, held, "passkey") for i, v in enumerate(values)]


def test_verdict_goes_by_allocated_bytes_and_says_who_cannot_be_told_apart() -> None:
    records = judged("dynamic", [1.0] * 8, 100) + judged("kvzip:ratio=4", [1.0] * 8, 100)
    records += judged(OURS, [1.0] * 7 + [0.0], 26) + judged("window:ratio=4", [0.0] * 8, 25)
    records += judged("h2o:ratio=4", [1.0] * 6 + [0.0] * 2, 20)
    found = {verdict.ratio: verdict for verdict in verdicts(records, [2.0, 4.0, 5.0, 8.0])}
    assert set(found) == {2.0, 4.0, 5.0}  # nobody holds an eighth
    assert found[4.0].row.method == OURS  # 26 of 100 bytes pass a quarter by less than 5%
    assert found[4.0].tied == ("h2o:ratio=4",)
    assert found[4.0].rivals == 2
    assert not found[4.0].clear
    assert found[5.0].row.method == "h2o:ratio=4"
    assert (found[5.0].rivals, found[5.0].clear) == (0, False)


def test_equal_figures_are_level_whatever_their_order() -> None:
    records = judged("h2o:ratio=4", [1.0, 0.0], 25) + judged(OURS, [0.0, 1.0], 25)
    (verdict,) = verdicts(records, [4.0])
    assert {verdict.row.method, *verdict.level} == {"h2o:ratio=4", OURS}
    assert not verdict.clear


def test_verdict_is_clear_where_every_pair_is() -> None:
    records = judged(OURS, [1.0] * 8, 25) + judged("window:ratio=4", [0.0] * 8, 25)
    (verdict,) = verdicts(records, [4.0])
    assert verdict.clear
    assert verdict.tied == ()


def test_memory_is_a_ratio_of_sums_and_processes_stand_beside_it() -> None:
    small, large = record(OURS, "a", {"f1": 1.0}, 50), record(OURS, "b", {"f1": 1.0}, 20)
    process = [record(OURS, f"m/{n}", {"process_bytes": n}, task="memory", length=n) for n in (10, 30)]
    (row,) = memory_rows([small, large, *process])
    assert (row.full_bytes, row.allocated_bytes) == (200, 70)
    assert row.process == {"process_bytes": 30, "length": 30}


def test_kept_entries_are_shares_of_the_tokens_seen() -> None:
    model = {"dtype": "float16", "head_dim": 2, "layers": 2, "kv_heads": 1}  # 16 bytes a token
    records = [record(OURS, item, {}) for item in "ab"]
    for one_record, tokens, kept in zip(records, (10, 30), ([[5], [10]], [[15], [30]]), strict=True):
        one_record.memory |= {"full_bytes": 16 * tokens, "kept": kept}
    assert kept_shares([*records, record("window", "a", {})], model) == {OURS: [[0.5], [1.0]]}


def test_kl_along_divides_by_the_tokens_of_each_stretch() -> None:
    scores = {"tokens": 100.0, "kl_0": 6.4, "kl_1": 7.2}
    points = kl_along([record(OURS, "a", scores, task="generation"), record("dynamic", "a", {"tokens": 9.0})])
    assert [(tokens, value.value) for tokens, value in points[OURS]] == [
        (64, pytest.approx(0.1)),
        (100, pytest.approx(0.2)),
    ]


def test_traces_come_from_the_item_that_most_methods_share() -> None:
    records = [record(method, item, {}) for method, item in ((OURS, "a"), ("window", "a"), (OURS, "b"))]
    for i, one_record in enumerate(records):
        one_record.memory["trace"] = [[10 * i, 5], [10 * i + 1, 6]]
    assert example_traces(records) == ("a", {OURS: [(0, 5), (1, 6)], "window": [(10, 5), (11, 6)]})
    assert example_traces([]) == ("", {})


def test_a_refused_speed_has_no_times() -> None:
    content: dict[str, Any] = {
        "method": OURS,
        "batch": 2,
        "context": 64,
        "ttft_s": [3.0, 1.0, 2.0],
        "tokens_per_s": 9.0,
    }
    content |= {"step_s": [[1.0, 2.0], [3.0, 10.0]], "refused": None, "peak_bytes": 7}
    content["speedup"] = {"median": 1.5, "min": 1.4, "max": 1.6}
    (fine,) = speeds([content])
    assert (fine.ttft, fine.step, fine.tokens_per_s) == ((2.0, 1.0, 3.0), (2.5, 1.0, 10.0), 9.0)
    assert fine.speedup == (1.5, 1.4, 1.6)
    (refused,) = speeds([content | {"refused": "wrong logits"}])
    assert refused.speedup is None
    assert (refused.ttft, refused.step, refused.tokens_per_s, refused.peak_bytes) == (None, None, None, 7)
    with pytest.raises(OptionError, match="no 'batch'"):
        speeds([{"method": OURS}])
