"""Plots of quality: against memory, over depth and length, over layers and heads, by turn and along a generation."""

import math
from collections.abc import Callable, Sequence

from kvpleat.accounting import human_bytes
from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.metrics import Interval
from kvpleat.bench.profiles import kept_shares, kl_along
from kvpleat.bench.records import Record
from kvpleat.bench.report import words
from kvpleat.bench.report.charts import Axis, Line, Point, heat_map, line_chart, nice_axis
from kvpleat.bench.report.families import Family, method_looks
from kvpleat.bench.report.html import Html
from kvpleat.bench.report.results import Results
from kvpleat.bench.summary import METRICS, Metric, Row, primary_rows, summarize

TURNS = "turn"


def against_memory(records: Sequence[Record], results: Results, found: Sequence[Family]) -> list[Html]:
    """One plot for each task, form and plotted metric."""
    rows = summarize(records)
    plots = []
    for (task, group), metrics in _measures(rows).items():
        chosen = words.PLOTS.get(task, (metrics[0],))
        for name in metrics:
            if name in chosen:
                mine = [row for row in rows if (row.task, row.group, row.metric.name) == (task, group, name)]
                if any(row.method != REFERENCE for row in mine):
                    plots.append(_memory_plot(mine, results, found))
    return plots


def _measures(rows: Sequence[Row]) -> dict[tuple[str, tuple[tuple[str, object], ...]], list[str]]:
    """(task, group) -> names of its metrics; the tasks in the order of words.TASKS."""
    measures: dict[tuple[str, tuple[tuple[str, object], ...]], list[str]] = {}
    for row in sorted(rows, key=lambda row: words.task_place(row.task)):
        names = measures.setdefault((row.task, row.group), [])
        if row.metric.name not in names:
            names.append(row.metric.name)
    return measures


def _memory_plot(rows: Sequence[Row], results: Results, found: Sequence[Family]) -> Html:
    """Figure against really allocated bytes; perplexity as the increase over the reference where there is one."""
    by_method = {row.method: row for row in rows}
    base, metric = by_method.get(REFERENCE), rows[0].metric
    relative = metric.kind == "perplexity" and base is not None
    lines = []
    for family in found:
        members = [by_method[spec] for spec in family.specs if spec in by_method]
        members = [row for row in members if not relative or row.difference is not None]
        points = [
            _memory_point(row, results, relative) for row in sorted(members, key=lambda row: -row.allocated_bytes)
        ]
        if points:
            lines.append(Line(family.label, family.look, points))
    level = None if base is None else 0.0 if relative else base.value.value
    y = _y_axis(metric, lines, level, relative)
    x = _bytes_axis(rows)
    reference = None if level is None else (level, "full cache")
    title = ", ".join(filter(None, (words.task_name(rows[0].task), words.group_name(rows[0].group))))
    what = "perplexity, increase over the full cache" if relative else metric.label
    better = {"lower": "lower is better", "higher": "higher is better"}.get(metric.better or "", "")
    items = f"{max(row.items for row in rows)} items"
    return line_chart(title, lines, x, y, note=", ".join(filter(None, (what, better, items))), reference=reference)


def _memory_point(row: Row, results: Results, relative: bool) -> Point:
    value = row.difference if relative and row.difference is not None else row.value
    figure, interval = words.value_words(row)
    masked = results.masked(row.method)
    parts = [
        f"{results.label(row.method)}: {figure} {interval}",
        f"to the full cache {words.difference_words(row)}" if row.difference else "",
        f"{human_bytes(row.allocated_bytes)} allocated of {human_bytes(row.full_bytes)} ({row.ratio:.2f}x)",
        f"masks only: it claims {human_bytes(row.claimed_bytes)}" if masked else "",
    ]
    low, high = (value.low, value.high) if row.certain else (None, None)
    return Point(row.allocated_bytes, value.value, "\n".join(filter(None, parts)), low, high, masked)


def _y_axis(metric: Metric, lines: Sequence[Line], level: float | None, relative: bool) -> Axis:
    """An axis that a single hopeless method does not stretch: points three times as far off as three quarters of all
    (from the full cache, in the direction that is worse) are not given room."""
    points = [point for line in lines for point in line.points]
    worse = {point: metric.worse_by(point.y - (level or 0.0)) for point in points}
    ordered = sorted(worse.values())
    limit = 3 * max(ordered[3 * len(ordered) // 4], 0.0) if len(ordered) > 3 else math.inf
    points = [point for point in points if worse[point] <= limit] or points
    spread = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    spread += [] if level is None else [level]
    text = _tick(metric, relative)
    return nice_axis(
        metric.label, spread, text, zero=metric.better == "lower" and (relative or metric.kind != "perplexity")
    )


def _tick(metric: Metric, relative: bool) -> Callable[[float], str]:
    if relative:
        return lambda value: f"{100 * value:+.3g}%" if value else "0%"
    if metric.kind == "share":
        return lambda value: f"{100 * value:.3g}%"
    return lambda value: f"{value:.3g}"


def _bytes_axis(rows: Sequence[Row]) -> Axis:
    """Allocated bytes, less to the right, with ticks at halves of the full cache."""
    full = max(row.full_bytes for row in rows)
    counts = [row.allocated_bytes for row in rows] + [full]
    low, high = min(counts) / 1.08, max(counts) * 1.08
    ticks, part = [], 1
    while full / part >= low:
        ticks.append(
            (full / part, f"{'1/' if part > 1 else ''}{part if part > 1 else 'full'}\n{human_bytes(full / part)}")
        )
        part *= 2
    return Axis("allocated", low, high, ticks, log=True, falling=True)


def retrieval_grids(
    records: Sequence[Record], results: Results, found: Sequence[Family]
) -> list[tuple[str, list[Html], list[Html]]]:
    """For each task and form with depths: (title, heat maps of depth over length for the methods that are coloured
    elsewhere, the same for all others)."""
    rows = summarize([r for r in records if "depth" in r.group and "length" in r.group], ("form", "length", "depth"))
    grids: dict[str, dict[str, list[Row]]] = {}
    for row in primary_rows(rows):
        title = ", ".join(filter(None, (words.task_name(row.task), words.group_name(row.group[:-2]))))
        grids.setdefault(title, {}).setdefault(row.method, []).append(row)
    parts = []
    for title, methods in grids.items():
        looks = method_looks(found, results, set(methods))
        maps = {spec: _grid(results, spec, methods[spec]) for spec in looks}
        shown = [spec for spec in looks if looks[spec].css != "dim"]
        others = [maps[spec] for spec in looks if looks[spec].css == "dim"]
        parts.append((title, [maps[spec] for spec in shown], others))
    return parts


def _grid(results: Results, spec: str, rows: Sequence[Row]) -> Html:
    places = [(dict(row.group)["length"], dict(row.group)["depth"]) for row in rows]
    lengths, depths = sorted({length for length, _ in places}), sorted({depth for _, depth in places})
    cells = []
    for row, (length, depth) in zip(rows, places, strict=True):
        share = row.value.value
        tip = f"{row.metric.label} {row.metric.text(share)} of {row.items} at {length} tokens, depth {depth:.0%}"
        cells.append((lengths.index(length), depths.index(depth), share, f"{100 * share:.0f}", tip))
    ratio = sum(row.full_bytes * row.items for row in rows) / sum(row.allocated_bytes * row.items for row in rows)
    note = f"{ratio:.1f}x" + (", masks only" if results.masked(spec) else "")
    columns, names = [words.tokens_name(length) for length in lengths], [f"{depth:.0%}" for depth in depths]
    return heat_map(results.label(spec), columns, names, cells, note=note)


def kept_maps(records: Sequence[Record], results: Results) -> list[Html]:
    """A heat map of kept entries over layers and KV heads for every method that says what it keeps."""
    shares = kept_shares(records, results.model)
    maps = []
    for spec in (spec for spec in results.methods if spec in shares and spec != REFERENCE):
        layers = shares[spec]
        cells = [
            (layer, head, share, "", f"layer {layer}, KV head {head}: {share:.1%}")
            for layer, heads in enumerate(layers)
            for head, share in enumerate(heads)
        ]
        flat = [share for heads in layers for share in heads]
        note = f"{min(flat):.0%} to {max(flat):.0%} of a head's entries, {sum(flat) / len(flat):.0%} on average"
        size = (max(6.0, min(16.0, 420 / len(layers))), max(5.0, min(18.0, 90 / len(layers[0]))))
        columns = [str(layer) for layer in range(len(layers))]
        names = [str(head) if head % max(1, len(layers[0]) // 8) == 0 else "" for head in range(len(layers[0]))]
        maps.append(heat_map(results.label(spec), columns, names, cells, note=note, cell=size, every=5))
    return maps


def by_turn(records: Sequence[Record], results: Results, found: Sequence[Family]) -> list[Html]:
    """The plotted metric of tasks with turns, turn by turn, one line for each method."""
    rows = [row for row in summarize([r for r in records if TURNS in r.group], (TURNS,)) if row.group]
    plots = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        metric = next((row.metric for row in mine if row.metric.name in ("f1", "kl")), mine[0].metric)
        curves: Curves = {}
        for row in (row for row in mine if row.metric == metric):
            turn = int(dict(row.group)[TURNS])
            curves.setdefault(row.method, []).append((turn, row.value, row.certain))
        note = f"{metric.label}, by turn"
        plots.append(_curves(words.task_name(task), note, curves, metric, results, found, "turn"))
    return plots


def along_generation(records: Sequence[Record], results: Results, found: Sequence[Family]) -> list[Html]:
    """KL to the full cache along a generation, one line for each method."""
    metric = next(metric for metric in METRICS if metric.name == "kl")
    curves = {
        method: [(tokens, value, True) for tokens, value in points] for method, points in kl_along(records).items()
    }
    return [_curves("Long generation", metric.label, curves, metric, results, found, "tokens")] if curves else []


Curves = dict[str, list[tuple[int, Interval, bool]]]


def _curves(
    title: str, note: str, curves: Curves, metric: Metric, results: Results, found: Sequence[Family], axis: str
) -> Html:
    """One line for each method, coloured as `method_looks` says."""
    lines = []
    for spec, look in method_looks(found, results, set(curves)).items():
        points = []
        for at, value, certain in sorted(curves[spec], key=lambda point: point[0]):
            low, high = (value.low, value.high) if certain and look.strong else (None, None)
            interval = words.interval_words(metric.text, value, certain)
            tip = f"{results.label(spec)}, {axis} {at}: {metric.text(value.value)} {interval}"
            points.append(Point(at, value.value, tip, low, high, results.masked(spec)))
        lines.append(Line("" if look.css == "dim" else results.label(spec), look, points))
    y = _y_axis(metric, lines, None, False)
    stops = sorted({at for points in curves.values() for at, _, _ in points})
    step = max(1, -(-len(stops) // 8))
    x = Axis(axis, stops[0], stops[-1], [(at, str(at)) for at in stops[::step]])
    return line_chart(title, lines, x, y, note=note)
