"""Memory over time, and speed: curves over context and batch, the step beside its floor, and the table of times."""

from collections.abc import Callable, Sequence

from kvpleat.accounting import human_bytes
from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.profiles import Speed, example_traces, speeds
from kvpleat.bench.records import ResultFile
from kvpleat.bench.report import words
from kvpleat.bench.report.charts import Axis, Bar, Line, Point, bar_chart, line_chart, log2_axis, nice_axis
from kvpleat.bench.report.families import Family, method_looks
from kvpleat.bench.report.figures import MASK, ordered
from kvpleat.bench.report.html import Html
from kvpleat.bench.report.results import Results
from kvpleat.bench.report.tables import NONE, Cell, Table


def traces(results: Results, found: Sequence[Family]) -> list[Html]:
    """Allocated bytes over tokens: one item of the generation task, and the greatest cell of each benchmark."""
    plots = []
    item, curves = example_traces(results.main_records)
    if curves:
        plots.append(
            _trace_plot(f"One item of {words.task_name(item.partition('/')[0]).lower()}", curves, results, found)
        )
    for bench in results.benches:
        cells = [speed for speed in speeds(bench.records) if speed.trace]
        if cells:
            batch, context = max((speed.batch, speed.context) for speed in cells)
            curves = {s.method: s.trace for s in cells if (s.batch, s.context) == (batch, context)}
            plots.append(_trace_plot(f"Decoding, {_cell_name(batch, context)}", curves, results, found))
    return plots


def _trace_plot(
    title: str, curves: dict[str, list[tuple[float, float]]], results: Results, found: Sequence[Family]
) -> Html:
    lines = []
    for spec, look in method_looks(found, results, set(curves)).items():
        points = [
            Point(
                at, held, f"{results.label(spec)}: {human_bytes(held)} at {at:,.0f} tokens", hollow=results.masked(spec)
            )
            for at, held in curves[spec]
        ]
        lines.append(Line("" if look.css == "dim" else results.label(spec), look, points))
    x = nice_axis("tokens", [p.x for line in lines for p in line.points], lambda value: f"{value:g}")
    y = nice_axis(
        "allocated", [p.y / 2**20 for line in lines for p in line.points], lambda value: f"{value:g}", zero=True
    )
    scaled = Axis(y.label, y.low * 2**20, y.high * 2**20, [(value * 2**20, text) for value, text in y.ticks])
    return line_chart(title, lines, x, scaled, note="allocated MiB over tokens seen")


def speed_plots(bench: ResultFile, results: Results, found: Sequence[Family]) -> list[Html]:
    """Tokens a second over context for each batch, and over batch for the greatest context."""
    cells = [speed for speed in speeds(bench.records) if speed.tokens_per_s is not None]
    batches, contexts = sorted({s.batch for s in cells}), sorted({s.context for s in cells})
    plots = []
    for batch in batches if len(contexts) > 1 else []:
        mine = [s for s in cells if s.batch == batch]
        plots.append(_rate_plot(f"Over context, batch {batch}", mine, lambda s: s.context, "context", results, found))
    if len(batches) > 1:
        mine = [s for s in cells if s.context == contexts[-1]]
        title = f"Over batch, context {contexts[-1]:,}"
        plots.append(_rate_plot(title, mine, lambda s: s.batch, "batch", results, found))
    return plots


def _rate_plot(
    title: str, cells: Sequence[Speed], at: Callable[[Speed], int], axis: str, results: Results, found: Sequence[Family]
) -> Html:
    lines = []
    for spec, look in method_looks(found, results, {s.method for s in cells}).items():
        points = []
        for s in sorted((s for s in cells if s.method == spec), key=at):
            tip = f"{results.label(spec)}: {s.tokens_per_s:.1f} tokens/s, {axis} {at(s):,}"
            points.append(Point(at(s), s.tokens_per_s or 0.0, tip, hollow=results.masked(spec)))
        lines.append(Line("" if look.css == "dim" else results.label(spec), look, points))
    x = log2_axis(axis, [p.x for line in lines for p in line.points], words.tokens_name)
    y = nice_axis("tokens/s", [p.y for line in lines for p in line.points], lambda value: f"{value:g}", zero=True)
    return line_chart(title, lines, x, y, note="output tokens a second, all rows together, higher is better")


def step_bars(bench: ResultFile, results: Results) -> list[Html]:
    """The median decode step beside its floor, for each batch at its greatest context."""
    cells = speeds(bench.records)
    charts = []
    for batch in sorted({s.batch for s in cells}):
        context = max(s.context for s in cells if s.batch == batch)
        mine = {s.method: s for s in cells if (s.batch, s.context) == (batch, context)}
        bars = [_bar(mine[spec], results) for spec in _order(results, list(mine.values()))]
        note = "median step in ms; the tick is the floor, bytes to be read over the bandwidth; its share is of TPOT"
        charts.append(bar_chart(f"Decode step, {_cell_name(batch, context)}", bars, note))
    return charts


def _bar(speed: Speed, results: Results) -> Bar:
    label, ours = results.label(speed.method), results.ours(speed.method)
    if speed.step is None:
        return Bar(label, None, "refused, see the table" if speed.refused else "not measured", None, ours)
    share = f", {speed.floor_share:.0%} of floor" if speed.floor_share is not None else ""
    return Bar(label, speed.step[0], f"{1000 * speed.step[0]:.1f} ms{share}", speed.floor, ours)


def speed_table(bench: ResultFile, results: Results) -> Table:
    """Every method, batch and context: times by vLLM's definitions, memory, and what was refused and why."""
    cells = speeds(bench.records)
    heads = [
        "method",
        "batch",
        "context",
        "tokens/s",
        "speed-up",
        "TTFT ms",
        "TPOT ms",
        "ITL p50 / p90 / p99 ms",
        "step ms",
    ]
    table = Table("Speed", [*heads, "floor ms", "of floor", "allocated", "peak"])
    for batch, context in sorted({(s.batch, s.context) for s in cells}):
        mine = {s.method: s for s in cells if (s.batch, s.context) == (batch, context)}
        for spec in _order(results, list(mine.values())):
            mark = MASK if results.masked(spec) else ""
            table.rows.append((results.label(spec), mark, results.ours(spec), _speed_cells(mine[spec])))
    table.note = (
        "Tokens/s: rows over TPOT. Speed-up: the full cache's TPOT over this one's, steps taken in turns. TTFT: start "
        "of the prompt to the first token's logits. TPOT: (end - first token) / (tokens - 1). ITL: time between "
        "tokens. Medians, with the least and the greatest below; moments of compression are included. Of floor: floor "
        "over TPOT."
    )
    return table


def _speed_cells(speed: Speed) -> list[Cell]:
    start = [Cell(str(speed.batch)), Cell(f"{speed.context:,}")]
    if speed.refused:
        return [*start, Cell(f"refused: {speed.refused}", css="refused")]
    itl = " / ".join(_ms(speed.itl.get(name)) for name in ("p50", "p90", "p99"))
    return [
        *start,
        Cell(NONE if speed.tokens_per_s is None else f"{speed.tokens_per_s:.1f}"),
        _speedup_cell(speed.speedup),
        _spread_cell(speed.ttft),
        Cell(_ms(speed.tpot)),
        Cell(itl),
        _spread_cell(speed.step),
        Cell(_ms(speed.floor)),
        Cell(NONE if speed.floor_share is None else f"{speed.floor_share:.0%}"),
        Cell(NONE if speed.allocated_bytes is None else human_bytes(speed.allocated_bytes)),
        Cell(NONE if speed.peak_bytes is None else human_bytes(speed.peak_bytes)),
    ]


def _spread_cell(times: tuple[float, float, float] | None) -> Cell:
    if times is None:
        return Cell(NONE)
    return Cell(_ms(times[0]), [f"{_ms(times[1])} to {_ms(times[2])}"])


def _speedup_cell(gain: tuple[float, float, float] | None) -> Cell:
    if gain is None:
        return Cell(NONE)
    return Cell(f"{gain[0]:.2f}x", [f"{gain[1]:.2f} to {gain[2]:.2f}"])


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return (
        f"{1000 * seconds:,.0f}"
        if seconds >= 1
        else f"{1000 * seconds:.1f}"
        if seconds >= 0.01
        else f"{1000 * seconds:.2f}"
    )


def _order(results: Results, cells: Sequence[Speed]) -> list[str]:
    held = {s.method: s.allocated_bytes or 0.0 for s in cells}
    full = held.get(REFERENCE) or max(held.values(), default=1.0)
    return ordered(results, list(held), {spec: full / (count or full or 1.0) for spec, count in held.items()})


def _cell_name(batch: int, context: int) -> str:
    return f"batch {batch}, context {context:,}"
