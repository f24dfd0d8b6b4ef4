"""Encoders on the page: quality and memory against time, the table, and the picture of what was merged."""

from collections.abc import Callable, Sequence

from kvpleat.accounting import human_bytes
from kvpleat.bench.encoder.figures import Figures, figures
from kvpleat.bench.encoder.methods import REFERENCE
from kvpleat.bench.metrics import Interval
from kvpleat.bench.records import ResultFile
from kvpleat.bench.report.charts import Line, Look, Point, line_chart, nice_axis
from kvpleat.bench.report.html import Html
from kvpleat.bench.report.merged import draw
from kvpleat.bench.report.tables import NONE, Cell, Table

OURS, LORA = "merge", " lora="


def plots(file: ResultFile) -> list[Html]:
    """R@1 as a share of the full model's, its tokens' cosine, and peak memory, each over how much faster."""
    found = figures(file.records)
    return [
        _plot(found, "Retrieval", "R@1, share of the full model's", lambda f: f.kept, "{:.0%}"),
        _plot(found, "Sentiment", "accuracy of a linear probe", lambda f: f.accuracy, "{:.0%}"),
        _plot(found, "Tokens after unmerging", "mean cosine to the full model's", lambda f: _bare(f.cosine), "{:.2f}"),
        _plot(found, "Peak activations", "times less than the full model's", lambda f: _bare(f.memory), "{:g}x"),
    ]


def _bare(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, value, value)


def _plot(found: Sequence[Figures], title: str, note: str, of: Callable[[Figures], Interval | None], form: str) -> Html:
    lines = []
    known = [f for f in found if of(f) is not None]
    names = list(dict.fromkeys(_family(f) for f in known if f.method != REFERENCE))
    learned = [name for name in names if LORA in name]
    for i, name in enumerate(names):
        points = [_point(f, of(f), form) for f in known if _family(f) == name]
        look = Look(i % 8, name.startswith("EncoderMerge"), f"e{i}")
        shown = f"{name.partition(LORA)[0]}, LoRA" if learned == [name] else name  # its name is longer than the room
        lines.append(Line(shown, look, sorted(points, key=lambda point: point.x)))
    full = next((of(f) for f in known if f.method == REFERENCE), None)
    every = [p for line in lines for p in line.points]
    if not every or full is None:
        return Html()
    x = nice_axis("times faster", [1.0, *(p.x for p in every)], lambda value: f"{value:g}x")
    spread = [end for p in every for end in (p.y, p.low, p.high) if end is not None]
    y = nice_axis(title, [*spread, full.value], lambda value: form.format(value))
    return line_chart(title, lines, x, y, note=note, reference=(full.value, "full model"))


def _family(f: Figures) -> str:
    """Methods that differ in how strong they are only: the name, and options that are no number."""
    name, *options = f.label.split()
    kept = [o for o in options if not o.partition("=")[2].replace(".", "", 1).isdigit()]
    kinds = [o.partition("=")[0] for o in options if o not in kept and o.startswith("coverage")]
    return " ".join([name, *kinds, *kept])


def _point(f: Figures, figure: Interval | None, form: str) -> Point:
    assert figure is not None
    tip = f"{f.label}: {form.format(figure.value)} at {f.speed.value:.2f}x"
    sure = figure.low < figure.high
    return Point(f.speed.value, figure.value, tip, figure.low if sure else None, figure.high if sure else None)


def table(file: ResultFile) -> Table:
    """Every method: time, retrieval, probe, tokens and memory, with intervals and paired differences."""
    heads = ["method", "texts/s", "times faster", "R@1", "of the full model's", "R@10", "MRR"]
    found = Table(
        "Encoders",
        [*heads, "R@1, first / later paragraphs", "R@1, full questions", "probe", "token cosine", "long texts", "peak"],
    )
    for f in figures(file.records):
        found.rows.append((f.label, "", f.method.startswith(OURS), _cells(f)))
    _leave_out_empty(found)
    count, settings = file.settings["count"], file.settings
    found.note = (
        f"{count['texts']} texts of {settings['tokens'] / count['texts']:.0f} tokens on average, {count['questions']} "
        f"questions from {settings['retrieval']}. Times faster: the full model's seconds over these, batches paired. "
        "First and later paragraphs: R@1 of questions about the first paragraph of a text, and about the others, which "
        "truncation may not see. Full questions: encoded by the full model, texts by the method. Token cosine: to its "
        "last hidden states, mean and 5% quantile; a token that was cut off counts 0. Peak: of activations for one "
        f"batch of {settings['batch']} of the longest texts, in a fresh process."
    )
    return found


def _leave_out_empty(table: Table) -> None:
    """Drop the columns in which no row has a figure: what the run did not measure."""
    full = [any(row[-1][i].text != NONE for row in table.rows) for i in range(len(table.heads) - 1)]
    table.heads = [head for head, has in zip(table.heads, [True, *full], strict=True) if has]
    table.rows = [(*row[:-1], [cell for cell, has in zip(row[-1], full, strict=True) if has]) for row in table.rows]


def _cells(f: Figures) -> list[Cell]:
    return [
        Cell(f"{f.texts_per_s:.1f}"),
        Cell(f"{f.speed.value:.2f}x", [_interval(f.speed, "{:.2f}")]),
        Cell(f"{f.recall.value:.1%}", [_interval(f.recall, "{:.1%}")]),
        Cell(f"{f.kept.value:.1%}", [_interval(f.kept, "{:.1%}")]),
        Cell(f"{f.recall_top:.1%}"),
        Cell(f"{f.mrr:.3f}"),
        Cell(" / ".join(NONE if x is None else f"{x:.1%}" for x in (f.recall_begins, f.recall_later))),
        Cell(f"{f.recall_full_questions:.1%}"),
        Cell(f"{f.accuracy.value:.1%}", [_interval(f.accuracy, "{:.1%}")]) if f.accuracy else Cell(NONE),
        Cell(f"{f.cosine:.3f}", [f"5%: {f.low:.3f}"]) if f.cosine is not None else Cell(NONE),
        Cell(f"{f.cosine_long:.3f}") if f.cosine_long is not None else Cell(NONE),
        Cell(human_bytes(f.peak_bytes), [f"{f.memory:.2f}x less"]) if f.peak_bytes and f.memory else Cell(NONE),
    ]


def _interval(figure: Interval, form: str) -> str:
    return f"[{form.format(figure.low).rstrip('%')}, {form.format(figure.high).rstrip('%')}]"


def pictures(file: ResultFile) -> list[Html]:
    """The sentence that the run followed through each method, where it did."""
    return [
        draw(record["picture"]["tokens"], record["picture"]["layers"], record["label"])
        for record in file.records
        if record.get("picture")
    ]
