"""From the records of an evaluation to figures with intervals: what `kvpleat eval` prints and `kvpleat report` draws.

A figure is a ratio of sums over items (perplexity: exp of it). It comes with a 95% bootstrap interval over items, and
with the difference to the reference on the same items, resampled as pairs. Memory ratios are ratios of sums, too.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.metrics import Interval, bootstrap_mean, paired_bootstrap, perplexity_increase
from kvpleat.bench.records import Record

EQUAL = 0.05  # methods whose bytes pass a budget by no more than this share count as within it

Group = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Metric:
    """How one figure is made of scores, and how it is written.

    Args:
        name: key. label: for people.
        score, count: the figure is the sum of `score` over the sum of `count`, or over the number of items.
        better: "lower" or "higher"; None where neither can be said.
        kind: "perplexity" (exp of the figure; differences are relative), "nats", "share" (0 to 1) or "number".
    """

    name: str
    label: str
    score: str
    count: str | None = None
    better: str | None = "higher"
    kind: str = "share"

    def text(self, value: float) -> str:
        """The figure for people: 12.34, 0.0123, 85.0%."""
        return {"share": f"{value:.1%}", "nats": f"{value:.4f}", "perplexity": f"{value:.3f}"}.get(
            self.kind, f"{value:.4g}"
        )

    def difference_text(self, value: float) -> str:
        """A difference for people: relative for perplexity (+1.20%), percentage points for shares (+3.1 pp)."""
        return {"share": f"{100 * value:+.1f} pp", "nats": f"{value:+.4f}", "perplexity": f"{value:+.2%}"}.get(
            self.kind, f"{value:+.4g}"
        )

    def worse_by(self, difference: float) -> float:
        """A difference turned so that above 0 means worse (0 where better is unknown)."""
        return {"lower": difference, "higher": -difference}.get(self.better or "", 0.0)


METRICS = (
    Metric("perplexity", "perplexity", "nll", "tokens", "lower", "perplexity"),
    Metric("kl", "KL to the full cache, nats a token", "kl", "tokens", "lower", "nats"),
    Metric("agreement", "same likeliest token", "agree", "tokens"),
    Metric("accuracy", "accuracy", "correct"),
    Metric("found", "answers found", "found"),
    Metric("f1", "F1", "f1"),
    Metric("exact", "exact match", "exact"),
    Metric("repeated", "repeated 4-grams", "repeated", better="lower"),
    Metric("distinct", "distinct 2-grams", "distinct", better=None),
)
# The metric that a verdict goes by. Perplexity of what a method wrote itself rewards repetition; KL does not.
PRIMARY = ("accuracy", "found", "f1", "perplexity", "kl")
PRIMARY_OF = {"generation": ("kl",), "drift": ("kl",)}
# The true next tokens of one text are a noisy witness: the distance to the full model's distributions is judged too.
ALSO_JUDGED = {("continuation", "kl")}


@dataclass(frozen=True)
class Row:
    """One figure of one method.

    Args:
        task, group, weights, method, metric: what the figure is of; `group` holds the keys that were asked for.
        items, units: records in it, and what was resampled (conversations where records are turns, else items).
        value: with its 95% interval; an interval of fewer than two units says nothing (`certain` is False).
        difference: method minus reference on the items of both (perplexity: relative), or None: it is the reference,
            there is none, or both count different tokens.
        full_bytes, allocated_bytes, claimed_bytes: mean over the items, right after each one's prompt (at its end where
            there is no prompt). Methods are compared there: it is where all of them compress and what a ratio is asked
            for. What kvpress's presses append afterwards, uncompressed, is in their favour.
    """

    task: str
    group: Group
    weights: str
    method: str
    metric: Metric
    items: int
    units: int
    value: Interval
    difference: Interval | None
    full_bytes: float
    allocated_bytes: float
    claimed_bytes: float

    @property
    def certain(self) -> bool:
        """Whether there were enough units for an interval."""
        return self.units > 1

    @property
    def ratio(self) -> float:
        """Full over allocated bytes."""
        return self.full_bytes / self.allocated_bytes if self.allocated_bytes else math.inf


def summarize(
    records: Iterable[Record],
    by: Sequence[str] = ("form",),
    *,
    reference: str = REFERENCE,
    reference_weights: str | None = None,
) -> list[Row]:
    """Every figure of every (task, group, weights, method), in the order of the records.

    Args:
        records: of result files of kind "eval"; those of the task "memory" are left out.
        by: keys of `Record.group` that make rows of their own.
        reference: spec of the method that differences are taken to.
        reference_weights: weights of the reference; None: the same as the row's.
    """
    cells = _cells(records, by)
    rows = []
    for (task, group, weights, method), cell in cells.items():
        at = (task, group, reference_weights or weights, reference)
        base = [] if at[2:] == (weights, method) else cells.get(at, [])
        memory = {name: _mean(held(r).get(name, 0) for r in cell) for name in BYTES}
        for metric in metrics_of(cell):
            sums = _sums(cell, metric)
            value = _figure(metric, bootstrap_mean(*_columns(sums)))
            items = sum(metric.score in r.scores for r in cell)
            change = difference(cell, base, metric)
            rows.append(Row(task, group, weights, method, metric, items, len(sums), value, change, **memory))
    return rows


def held(record: Record) -> dict[str, Any]:
    """Bytes right after the record's prompt, or at its end where nothing was noted before."""
    at: dict[str, Any] = record.memory.get("prompt", record.memory)
    return at


BYTES = ("full_bytes", "allocated_bytes", "claimed_bytes")


def _cells(records: Iterable[Record], by: Sequence[str]) -> dict[tuple[str, Group, str, str], list[Record]]:
    """Records by task, the group's keys in `by`, weights and method."""
    cells: dict[tuple[str, Group, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.task != "memory":
            group = tuple((key, record.group[key]) for key in by if key in record.group)
            cells[record.task, group, record.weights, record.method].append(record)
    return cells


def metrics_of(records: Iterable[Record]) -> list[Metric]:
    """The metrics that the records' scores allow; an unknown score is a mean over items."""
    names = dict.fromkeys(name for record in records for name in record.scores)
    known = [m for m in METRICS if m.score in names and (m.count is None or m.count in names)]
    used = {m.score for m in METRICS} | {"tokens"}
    others = [name for name in names if name not in used and not re.fullmatch(r"kl_\d+", name)]
    return known + [Metric(name, name, name, better=None, kind="number") for name in others]


def difference(ours: Sequence[Record], base: Sequence[Record], metric: Metric) -> Interval | None:
    """Ours minus base on the items of both; None where there are none, or where both count different tokens."""
    shared = {r.item for r in ours if metric.score in r.scores} & {r.item for r in base if metric.score in r.scores}
    a, b = (_sums([r for r in side if r.item in shared], metric) for side in (ours, base))
    if not shared or any(a[unit][1] != b[unit][1] for unit in a):
        return None
    sums, counts = _columns(a)
    change = paired_bootstrap(sums, [b[unit][0] for unit in a], counts)
    return perplexity_increase(change) if metric.kind == "perplexity" else change


def _sums(records: Sequence[Record], metric: Metric) -> dict[str, tuple[float, float]]:
    """(sum of the score, sum of the count) of each unit. Turns of one conversation are one unit: they depend on each
    other. Their items' names differ after the last slash only."""
    sums: dict[str, tuple[float, float]] = {}
    for record in records:
        if metric.score in record.scores and (metric.count is None or metric.count in record.scores):
            unit = record.item.rpartition("/")[0] if "turn" in record.group else record.item
            total, count = sums.get(unit, (0.0, 0.0))
            more = record.scores[metric.count] if metric.count else 1.0
            sums[unit] = (total + record.scores[metric.score], count + more)
    return sums


def _columns(sums: dict[str, tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [total for total, _ in sums.values()], [count for _, count in sums.values()]


def _figure(metric: Metric, mean: Interval) -> Interval:
    return Interval(*map(math.exp, (mean.value, mean.low, mean.high))) if metric.kind == "perplexity" else mean


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# ---- which method is best at equal bytes


@dataclass(frozen=True)
class Verdict:
    """The best method within 1/ratio of the full cache's bytes, by one metric of one task.

    Args:
        ratio: the budget is full bytes / ratio, passed by EQUAL at most.
        row: the best method's figure.
        level: other methods with exactly the same figure: the first of them is in `row` by order only.
        tied: all methods within the budget whose paired difference to the best does not exclude 0.
        rivals: how many others there are within the budget.
    """

    ratio: float
    row: Row
    level: tuple[str, ...]
    tied: tuple[str, ...]
    rivals: int

    @property
    def clear(self) -> bool:
        """Whether every other method within the budget is worse beyond chance."""
        return self.rivals > 0 and not self.tied


def verdicts(records: Iterable[Record], ratios: Iterable[float], by: Sequence[str] = ("form",)) -> list[Verdict]:
    """The best method by each task's metric (continuation: two) at each ratio, by really allocated bytes, without the
    reference.

    Args:
        records: of one kind of weights.
    """
    records = [record for record in records if record.method != REFERENCE]
    measures: dict[tuple[str, Group, str], list[Row]] = defaultdict(list)
    rows = summarize(records, by)
    primary = primary_rows(rows)
    for row in rows:
        if row in primary or (row.task, row.metric.name) in ALSO_JUDGED:
            measures[row.task, row.group, row.metric.name].append(row)
    found = []
    every = _cells(records, by)
    for rows in measures.values():
        cells = {row.method: every[row.task, row.group, row.weights, row.method] for row in rows}
        for ratio in ratios:
            within = [row for row in rows if row.ratio >= ratio * (1 - EQUAL)]
            if within:
                found.append(_verdict(ratio, within, cells))
    return sorted(found, key=lambda verdict: verdict.ratio)


def primary_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of each task's primary metric: the one that a verdict goes by."""
    names: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        names[row.task].add(row.metric.name)
    primary = {
        task: next((name for name in PRIMARY_OF.get(task, PRIMARY) if name in known), None)
        for task, known in names.items()
    }
    return [row for row in rows if row.metric.name == primary[row.task]]


def _verdict(ratio: float, within: list[Row], cells: dict[str, list[Record]]) -> Verdict:
    metric = within[0].metric
    best = min(within, key=lambda row: metric.worse_by(row.value.value))
    tied = []
    for row in within:
        if row is not best:
            change = difference(cells[row.method], cells[best.method], metric)
            if change is None or not best.certain or change.low <= 0 <= change.high:
                tied.append(row.method)
    level = [row.method for row in within if row is not best and row.value.value == best.value.value]
    return Verdict(ratio, best, tuple(level), tuple(tied), len(within) - 1)
