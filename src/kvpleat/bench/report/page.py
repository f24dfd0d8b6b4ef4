"""One self-contained HTML page, and the same tables as markdown, from merged result files."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from kvpleat.bench.records import ResultFile
from kvpleat.bench.report import encoders, figures, quality, speed
from kvpleat.bench.report.families import common_ratio, families, legend
from kvpleat.bench.report.html import Html, el, join
from kvpleat.bench.report.results import Results
from kvpleat.bench.report.tables import Table
from kvpleat.bench.summary import verdicts

DIMMED = "Methods at other ratios are the pale lines; point at one to see which it is."


def page(results: Results) -> str:
    """The page as text. Sections without data are left out."""
    here = files("kvpleat.bench.report")
    style, script = (Html((here / name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    what = "KV cache compression" if results.methods or not results.encoders else "merging tokens"
    title = f"{results.model['name']}: what {what} keeps"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", style),
    )
    sections = [section for section in _sections(results) if section]
    body = el("body", el("main", _header(results, title), *sections, _foot(results)), el("script", script))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def tables(results: Results) -> list[Table]:
    """The main tables, in the page's order: verdicts, memory, quality, weights, speed."""
    records, found = results.main_records, verdicts(results.main_records, results.ratios)
    memory = figures.memory_table(records, results)
    return [
        *([figures.verdict_table(found, results)] if found else []),
        *([memory] if memory else []),
        *figures.quality_tables(records, results),
        *figures.breakdown_tables(records, results),
        *figures.weights_tables(results),
        *(speed.speed_table(bench, results) for bench in results.benches if bench.records),
        *(encoders.table(file) for file in results.encoders),
    ]


def markdown(results: Results) -> str:
    """The main tables as GitHub markdown."""
    return "\n".join(table.markdown() for table in tables(results))


def _sections(results: Results) -> list[Html]:
    records, found = results.main_records, families(results)
    key = legend(found, results)
    masked = any(results.masked(record.method) for record in records)
    hollow = (
        " Hollow: the method masks only, so it stands at the full bytes that it really allocates, whatever ratio it "
        "was asked for."
        if masked
        else ""
    )
    plots = quality.against_memory(records, results, found)
    memory = figures.memory_table(records, results)
    shown = [*([memory] if memory else []), *figures.quality_tables(records, results)]
    shown += figures.breakdown_tables(records, results)
    ratio = common_ratio(results)
    at = f"In colour: methods at ratio {ratio:g}, or those without one. {DIMMED}" if ratio else ""
    return [
        _section(
            "Quality against memory",
            f"Each line is one method over its ratios; less memory to the right. Whiskers are 95% intervals.{hollow}",
            [key, _grid(plots)] if plots else [],
        ),
        _section("Figures", "", [table.html() for table in shown]),
        *_retrieval(quality.retrieval_grids(records, results, found)),
        _section(
            "What is kept, by layer and KV head",
            "Share of the tokens seen whose entries attention can still read; layers run across, KV heads down.",
            _if(_grid(quality.kept_maps(records, results))),
        ),
        _section("Turn by turn", at, _if(_grid(quality.by_turn(records, results, found)))),
        _section("Along a generation", at, _if(_grid(quality.along_generation(records, results, found)))),
        _section("Memory over time", at, _if(_grid(speed.traces(results, found)))),
        *(_speed(i, results, found) for i in range(len(results.benches))),
        *(_encoder(file) for file in results.encoders),
        _section("Weights and methods together", "", [table.html() for table in figures.weights_tables(results)]),
    ]


def _speed(index: int, results: Results, found: Sequence[Any]) -> Html:
    bench = results.benches[index]
    if not bench.records:
        return Html()
    machine, settings = bench.environment.get("machine", "an unknown machine"), bench.settings
    bandwidth = settings.get("bandwidth_bytes_per_s")
    said = [
        f"On {machine}, {bench.environment.get('threads', '?')} threads.",
        f"Measured copy bandwidth {bandwidth / 1e9:.1f} GB/s." if bandwidth else "",
        f"{settings['repeats']} repeats of {settings.get('steps', '?')} steps." if "repeats" in settings else "",
    ]
    parts = [
        _grid(speed.speed_plots(bench, results, found)),
        _grid(speed.step_bars(bench, results)),
        speed.speed_table(bench, results).html(),
    ]
    return _section("Speed", " ".join(filter(None, said)), [part for part in parts if part])


def _encoder(file: ResultFile) -> Html:
    pictures = encoders.pictures(file)
    merged = (
        [el("h3", "Which tokens were merged, layer by layer"), el("div", *pictures, class_="scroll")]
        if pictures
        else []
    )
    settings = file.settings
    lead = (
        f"All methods on the same {settings['count']['texts']} texts ({settings['texts']}, {settings['retrieval']}), a "
        "batch each in turns; each line is one method over its strengths."
    )
    parts = [_grid(encoders.plots(file)), encoders.table(file).html(), *merged]
    return _section("Encoders: quality against time", lead, parts)


def _retrieval(grids: Sequence[tuple[str, list[Html], list[Html]]]) -> list[Html]:
    parts = []
    for title, shown, others in grids:
        parts += [el("h3", title), el("div", *shown, class_="maps")]
        if others:
            more = el("summary", f"{len(others)} more, other ratios and methods")
            parts.append(el("details", more, el("div", *others, class_="maps")))
    return [_section("Retrieval by depth and length", "Percent right; length across, depth of the key down.", parts)]


def _section(title: str, lead: str, parts: Sequence[Html]) -> Html:
    if not parts:
        return Html()
    return el("section", el("h2", title), *([el("p", lead, class_="lead")] if lead else []), *parts)


def _grid(plots: Sequence[Html]) -> Html:
    return el("div", *plots, class_="plots") if plots else Html()


def _if(part: Html) -> list[Html]:
    return [part] if part else []


# ---- head and foot


def _header(results: Results, title: str) -> Html:
    model, records = results.model, results.main_records
    items = len({record.item for record in records})
    first = results.files[0]
    size = f", {model['parameters'] / 1e6:,.0f} M parameters" if model.get("parameters") else ""
    shape = f"{model['layers']} layers of {model['kv_heads']} KV heads" if model.get("layers") else ""
    facts = {
        "model": f"{model['name']} ({model['dtype']}){size}" + (f", {shape}" if shape else ""),
        "machine": _once(file.environment.get("machine") for file in results.files),
        "measured": _once(file.created for file in results.files),
        "methods": str(len(results.methods) or "") + (f", on {items:,} items" if items else ""),
        "kvpleat": first.environment.get("versions", {}).get("kvpleat", ""),
        "command": first.command
        + (f" (and {len(results.files) - 1} more, see the end)" if len(results.files) > 1 else ""),
    }
    rows = [join(el("dt", name), el("dd", text)) for name, text in facts.items() if text]
    found = verdicts(records, results.ratios)
    lines = [el("li", el("b", name), ": ", text) for name, text in figures.verdict_lines(found, results)]
    table = el("details", el("summary", "measure by measure"), figures.verdict_table(found, results).html())
    verdict = [el("h2", "Best at equal allocated bytes"), el("ul", *lines, class_="verdict"), table] if lines else []
    return el("header", el("h1", title), el("dl", *rows), *verdict)


def _once(texts: Any) -> str:
    return "; ".join(dict.fromkeys(str(text) for text in texts if text))


def _foot(results: Results) -> Html:
    masked = [results.label(spec) for spec in results.methods if results.masked(spec)]
    reading = [
        "Intervals are 95% percentile bootstraps over items (over conversations where a record is a turn). An interval "
        "of no width means that all items came out alike, not that the figure is certain.",
        "Differences are paired: both methods on the same items, resampled together. They are far narrower than the "
        "intervals of the figures, so look at them, not at whether two intervals overlap.",
        "Many differences are shown, and no interval is widened for that: about one in twenty leaves out 0 by chance.",
    ]
    if results.methods:
        reading.append(
            "The compression ratio is the bytes of a full cache over the bytes really allocated, as a ratio of sums."
        )
    if masked:
        reading.append(f"Masked only, with the full cache in memory: {', '.join(masked)}.")
    runs = []
    for file in results.files:
        versions = ", ".join(f"{name} {number}" for name, number in file.environment.get("versions", {}).items())
        machine = f"{file.environment.get('machine', '?')}, Python {file.environment.get('python', '?')}"
        settings = json.dumps(file.settings, ensure_ascii=False)
        source = f"weights from {file.model['source']}" if file.model.get("source") else ""
        about = ". ".join(filter(None, (file.created, machine, versions, source)))
        runs.append(el("li", el("code", file.command), el("p", about), el("code", settings, class_="settings")))
    parts = [
        el("h2", "How to read this"),
        el("ul", *(el("li", text) for text in reading)),
        el("h2", "How to reproduce it"),
        el("ol", *runs, class_="runs"),
    ]
    return el("footer", *parts)
