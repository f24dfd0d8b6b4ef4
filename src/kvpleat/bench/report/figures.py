"""The tables of a report: memory, every figure with interval and difference, verdicts, and weights against methods."""

from collections import Counter
from collections.abc import Sequence

from kvpleat.accounting import human_bytes
from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.profiles import MemoryRow, memory_rows
from kvpleat.bench.records import Record
from kvpleat.bench.report import words
from kvpleat.bench.report.results import Results
from kvpleat.bench.report.tables import NONE, Cell, Table
from kvpleat.bench.summary import EQUAL, Row, Verdict, primary_rows, summarize

MASK = "mask only"
MOST_NAMES = 4  # methods that a verdict's sentence names
READING = (
    "Under a figure: its 95% interval, and the difference to the full cache on the same items with its own 95% "
    "interval (perplexity: relative; pp: percentage points). Coloured where that interval leaves out 0."
)


def ordered(results: Results, specs: Sequence[str], ratios: dict[str, float]) -> list[str]:
    """Methods in a table: the reference, then by ratio asked for (allocated, where none was), kvpleat's first."""
    order = list(results.methods)

    def place(spec: str) -> tuple[bool, float, bool, int]:
        return (
            spec != REFERENCE,
            results.methods[spec]["ratio"] or ratios[spec],
            not results.ours(spec),
            order.index(spec),
        )

    return sorted(specs, key=place)


def ratio_text(full: float, held: float) -> str:
    """A ratio of bytes: 3.98x."""
    return f"{full / held:.2f}x" if held else NONE


def asked_text(results: Results, spec: str) -> str:
    """The ratio a method was asked for."""
    ratio = results.methods[spec]["ratio"]
    return f"{ratio:g}x" if ratio else NONE


def _name(results: Results, spec: str) -> tuple[str, str, bool]:
    return results.label(spec), MASK if results.masked(spec) else "", results.ours(spec)


def memory_table(records: Sequence[Record], results: Results) -> Table | None:
    """Ratios asked for, claimed and really allocated, and what a process of its own measured where that ran."""
    rows = {row.method: row for row in memory_rows(records)}
    if not rows:
        return None
    measured = any(row.process for row in rows.values())
    heads = ["method", "storage", "ratio asked", "claimed", "allocated", "at the end"]
    table = Table("Memory", [*heads, *(["process", "process ratio", "peak"] if measured else [])])
    ratios = {spec: row.full_bytes / (row.allocated_bytes or 1) for spec, row in rows.items()}
    for spec in ordered(results, list(rows), ratios):
        table.rows.append((*_name(results, spec), _memory_cells(results, rows[spec], measured)))
    table.note = (
        "Ratios are full bytes over bytes held, sums over all items right after their prompts; at the end: once the "
        "answer or continuation followed, which kvpress leaves uncompressed. Allocated: storage of the tensors that "
        "the cache really holds, overhead included. Claimed: what the method says it keeps."
    )
    lengths = {row.process["length"] for row in rows.values() if row.process}
    if lengths:
        at = words.joined([f"{length:,.0f}" for length in sorted(lengths)])
        table.note += f" Process: growth of a fresh process after {at} tokens; peak: while they were fed."
    return table


def _memory_cells(results: Results, row: MemoryRow, measured: bool) -> list[Cell]:
    masked = results.masked(row.method)
    cells = [
        Cell(str(results.methods[row.method]["storage"])),
        Cell(asked_text(results, row.method)),
        Cell(ratio_text(row.full_bytes, row.claimed_bytes), css="struck" if masked else ""),
        Cell(ratio_text(row.full_bytes, row.allocated_bytes)),
        Cell(ratio_text(row.end_full_bytes, row.end_allocated_bytes)),
    ]
    if measured:
        held, peak = (row.process.get(name) for name in ("process_bytes", "peak_bytes"))
        cells.append(Cell(NONE if held is None else human_bytes(held)))
        cells.append(Cell(NONE if held is None else ratio_text(row.process["full_bytes"], held)))
        cells.append(Cell(NONE if peak is None else human_bytes(peak)))
    return cells


def quality_tables(records: Sequence[Record], results: Results) -> list[Table]:
    """One row a method with every figure of the tasks that belong together."""
    rows = summarize(records)
    known = {task for tasks in words.TABLES.values() for task in tasks}
    others = tuple(dict.fromkeys(row.task for row in rows if row.task not in known))
    tables = []
    for title, tasks in [*words.TABLES.items(), ("Other tasks", others)]:
        mine = sorted((row for row in rows if row.task in tasks), key=lambda row: tasks.index(row.task))
        if mine:
            tables.append(_quality_table(title, mine, results))
    if tables:
        tables[0].note = READING
    return tables


def breakdown_tables(records: Sequence[Record], results: Results) -> list[Table]:
    """Perplexity of continuations by length and by kind of text, where there are several."""
    continuations = [record for record in records if record.task == "continuation"]
    tables = []
    for key, title in (("length", "Continuing a text, by length"), ("source", "Continuing a text, by kind of text")):
        rows = [row for row in summarize(continuations, (key,)) if row.metric.name == "perplexity"]
        if len({row.group for row in rows}) > 1:
            tables.append(_quality_table(title, rows, results))
    return tables


def _quality_table(title: str, rows: Sequence[Row], results: Results) -> Table:
    columns = dict.fromkeys((row.task, row.group, row.metric) for row in rows)
    by_place = {(row.method, row.task, row.group, row.metric): row for row in rows}
    several = len({task for task, _, _ in columns}) > 1
    heads = []
    for task, group, metric in columns:
        parts = (words.task_name(task) if several or task not in words.TASKS else "", metric.label)
        heads.append(", ".join(filter(None, (*parts, words.group_name(group)))))
    table = Table(title, ["method", "ratio asked", "allocated", *heads])
    ratios = _ratios(rows)
    for spec in ordered(results, list(ratios), ratios):
        cells = [Cell(asked_text(results, spec)), Cell(f"{ratios[spec]:.2f}x")]
        cells += [figure_cell(by_place.get((spec, *column))) for column in columns]
        table.rows.append((*_name(results, spec), cells))
    return table


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Method -> full over allocated bytes of the items of these rows, each item once."""
    sums: dict[str, list[float]] = {}
    for row in {(row.method, row.task, row.group): row for row in rows}.values():
        both = sums.setdefault(row.method, [0.0, 0.0])
        both[0] += row.full_bytes * row.items
        both[1] += row.allocated_bytes * row.items
    return {method: full / (held or 1.0) for method, (full, held) in sums.items()}


def figure_cell(row: Row | None, more: str = "") -> Cell:
    """A figure with its interval and difference; a dash where the method has none."""
    if row is None:
        return Cell(NONE)
    value, interval = words.value_words(row)
    under = tuple(filter(None, (interval, words.difference_words(row), more)))
    tip = f"{row.items} items, {human_bytes(row.allocated_bytes)} allocated of {human_bytes(row.full_bytes)}"
    return Cell(value, under, words.verdict(row), tip)


def verdict_lines(found: Sequence[Verdict], results: Results) -> list[tuple[str, str]]:
    """For each ratio: (its name, a sentence that says which method is best how often). Equal figures count for each."""
    lines = []
    for ratio in dict.fromkeys(verdict.ratio for verdict in found):
        mine = [verdict for verdict in found if verdict.ratio == ratio]
        wins = Counter(spec for verdict in mine for spec in (verdict.row.method, *verdict.level))
        clear = Counter(verdict.row.method for verdict in mine if verdict.clear)
        parts: list[str] = []
        for spec, count in wins.most_common(MOST_NAMES):
            verb = "" if parts else "is best "
            parts.append(f"{results.label(spec)} {verb}in {count}" + f" ({clear[spec] or 'none'} clearly)")
        if len(wins) > MOST_NAMES:
            parts.append(f"{len(wins) - MOST_NAMES} more in up to {wins.most_common()[MOST_NAMES][1]}")
        many = "measure" if len(mine) == 1 else "measures"
        lines.append((f"1/{ratio:g} of the bytes", f"of {len(mine)} {many}, {words.joined(parts)}."))
    return lines


def verdict_table(found: Sequence[Verdict], results: Results) -> Table:
    """The best method by measure and ratio, and which others cannot be told from it."""
    ratios = sorted({verdict.ratio for verdict in found})
    found = sorted(found, key=lambda verdict: words.task_place(verdict.row.task))
    by_place = {(words.measure_name(v.row), v.ratio): v for v in found}
    table = Table(
        "Best method at equal allocated bytes", ["measure", *(f"1/{ratio:g} of the bytes" for ratio in ratios)]
    )
    for name in dict.fromkeys(name for name, _ in by_place):
        cells = [_verdict_cell(by_place.get((name, ratio)), results) for ratio in ratios]
        table.rows.append((name, "", False, cells))
    table.note = (
        f"Within 1/R of the full cache's bytes, really allocated, passed by {EQUAL:.0%} at most. Methods that mask "
        "only hold the full cache and are in no budget. Not told apart: the paired 95% interval of the difference to "
        "the best holds 0. The best of many is picked by its figure, which favours it a little; equal figures count "
        "for each method that has them."
    )
    return table


def _verdict_cell(verdict: Verdict | None, results: Results) -> Cell:
    if verdict is None:
        return Cell(NONE)
    tied = [results.label(spec) for spec in verdict.tied]
    some = tied if len(tied) <= MOST_NAMES else [*tied[: MOST_NAMES - 1], f"{len(tied) - MOST_NAMES + 1} more"]
    beside = f"not told apart: {words.joined(some)}" if tied else "clearly" if verdict.rivals else "the only one"
    figure = verdict.row.metric.text(verdict.row.value.value)
    figure += "" if verdict.level else f" at {verdict.row.ratio:.2f}x"
    best = sorted([verdict.row.method, *verdict.level], key=lambda spec: not results.ours(spec))
    level = f" and {len(best) - 1} level with it" if len(best) > 1 else ""
    css = "best" if any(map(results.ours, best)) else ""
    return Cell(results.label(best[0]) + level, (figure, beside), css, "; ".join(tied))


def weights_tables(results: Results) -> list[Table]:
    """Weights against methods, a table for each task's primary metric; differences are to full cache and weights."""
    if len(results.weights) < 2:
        return []
    against = results.weights[0]
    rows = primary_rows(summarize(results.records, reference_weights=against))
    sizes: dict[str, float] = {}
    for file in results.files:
        sizes |= file.model.get("weights_bytes", {})
    tables = []
    for task, group in dict.fromkeys((row.task, row.group) for row in rows):
        mine = {(row.weights, row.method): row for row in rows if (row.task, row.group) == (task, group)}
        if len({weights for weights, _ in mine}) < 2:
            continue
        first = next(iter(mine.values()))
        table = Table(words.measure_name(first), ["method", *results.weights])
        several = Counter(method for _, method in mine)
        ratios = {method: row.ratio for (_, method), row in mine.items() if several[method] > 1}
        for spec in ordered(results, list(ratios), ratios):
            cells = [_weights_cell(mine.get((weights, spec)), sizes.get(weights)) for weights in results.weights]
            table.rows.append((*_name(results, spec), cells))
        tables.append(table)
    if tables:
        tables[0].note = f"{READING} Here the full cache is the one at {against} weights."
    return tables


def _weights_cell(row: Row | None, weights_bytes: float | None) -> Cell:
    if row is None:
        return Cell(NONE)
    model = f" + {human_bytes(weights_bytes)} weights" if weights_bytes else ""
    return figure_cell(row, f"{human_bytes(row.allocated_bytes)} cache{model}")
