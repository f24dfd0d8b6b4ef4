"""Charts as inline SVG: lines with whiskers, heat maps and bars. They draw the numbers they are given and compute none.

Colours and weights are classes of style.css (s0 to s7, dim), so that both themes use one drawing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpleat.bench.report.html import Html, el, join

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 128, 14, 40  # margins; labels of the lines stand in the right one
LABEL_CHARS, LABEL_GAP = 19, 12.5
EARLY, EARLY_CHARS = 0.15, 9  # lines that end within this share of the x axis are named there, in so many letters
MOST_MARKS = 24  # a line of more points has one mark, at its end
MARKS = "osdtosdt"  # one for each colour: circle, square, diamond, triangle


@dataclass(frozen=True)
class Look:
    """How a line looks: colour 0 to 7 (None: dimmed), whether it is emphasised, and the key that toggles it."""

    colour: int | None
    strong: bool
    key: str

    @property
    def css(self) -> str:
        """Classes of the line's group."""
        if self == REFERENCE_LOOK:
            return "ref"
        return " ".join([f"s{self.colour}" if self.colour is not None else "dim", *(["strong"] if self.strong else [])])


REFERENCE_LOOK = Look(None, False, "reference")


@dataclass(frozen=True)
class Point:
    """A figure at x, with its interval where it has one. Hollow: the method masks only."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one line, in the order they are joined in. Without a label nothing stands at its end."""

    label: str
    look: Look
    points: Sequence[Point]


End = tuple[float, str, Look]  # where a line ends, its name, its look


@dataclass(frozen=True)
class Axis:
    """A scale: (value, text) ticks between low and high. A tick's text may have two lines."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    falling: bool = False  # greater values to the left

    def share(self, value: float) -> float:
        """Where a value lies between the axis's start (0) and end (1)."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        place = (v - a) / (b - a) if b > a else 0.5
        return 1 - place if self.falling else place


def nice_axis(label: str, values: Sequence[float], text: Callable[[float], str], *, zero: bool = False) -> Axis:
    """A linear axis around values, with four to seven round ticks; from or to 0 where asked."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        high = low + (abs(low) or 1.0)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(i * step, text(i * step)) for i in range(first, last + 1)]
    return Axis(label, first * step, last * step, ticks)


def log2_axis(label: str, values: Sequence[float], text: Callable[[float], str]) -> Axis:
    """A logarithmic axis with a tick at each value: for contexts and batches, which double."""
    ticks = sorted(set(values))
    return Axis(label, ticks[0], ticks[-1], [(v, text(v)) for v in ticks], log=True)


def line_chart(
    title: str, lines: Sequence[Line], x: Axis, y: Axis, *, note: str = "", reference: tuple[float, str] | None = None
) -> Html:
    """A figure of lines over two axes. Points beyond the y axis stand at its edge as arrows that say their value.

    Args:
        note: a few words under the title. reference: a horizontal line at a value, with its name.
    """
    parts = [*_grid(x, y)]
    early: list[End] = []
    ends: list[End] = []
    beside = 0.0
    if reference is not None:
        at = _y(y, reference[0])
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="reference"))
        ends.append((at, reference[1], REFERENCE_LOOK))
    for line in sorted(lines, key=lambda line: (line.look.colour is not None, line.look.strong)):  # ours on top
        parts.append(_line(line, x, y))
        if line.points and line.label:
            last = line.points[-1]
            end = (_y(y, last.y), line.label, line.look)
            if x.share(last.x) < EARLY:
                early.append(end)
                beside = max(beside, _x(x, last.x))
            else:
                ends.append(end)
    parts += _labels(ends, WIDTH - RIGHT, LABEL_CHARS)
    parts += _labels(early, beside + 3, EARLY_CHARS)
    return figure(title, note, WIDTH, HEIGHT, *parts)


def figure(title: str, note: str, width: float, height: float, *parts: str, css: str = "") -> Html:
    """An SVG with its caption above."""
    caption = el("figcaption", el("b", title), *([el("span", note)] if note else []))
    box = f"0 0 {width:g} {height:g}"
    svg = el("svg", el("title", title), *parts, viewBox=box, role="img", style=f"max-width:{1.25 * width:.0f}px")
    return el("figure", caption, svg, class_=css or None)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - min(max(axis.share(value), 0.0), 1.0) * (HEIGHT - BOTTOM - TOP)


def _grid(x: Axis, y: Axis) -> list[Html]:
    parts = []
    for value, text in y.ticks:
        at = _y(y, value)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(el("text", text, x=LEFT - 6, y=at + 3.5, class_="tick", text_anchor="end"))
    for value, text in x.ticks:
        at = _x(x, value)
        parts.append(el("line", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        for row, words in enumerate(text.split("\n")):
            css = "tick" if row == 0 else "tick faint"
            parts.append(el("text", words, x=at, y=HEIGHT - BOTTOM + 15 + 11 * row, class_=css, text_anchor="middle"))
    base = HEIGHT - BOTTOM
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    parts.append(el("text", x.label, x=WIDTH - RIGHT + 26, y=base + 15, class_="tick faint"))
    return parts


def _line(line: Line, x: Axis, y: Axis) -> Html:
    places = [(_x(x, p.x), _y(y, p.y), p) for p in line.points]
    parts = []
    if len(places) > 1:
        tip = [el("title", line.points[-1].title)]
        parts.append(el("polyline", *tip, points=" ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)))
    if len(places) > MOST_MARKS:
        places = places[-1:]
    for a, b, point in places:
        title = el("title", point.title)
        inside = y.low <= point.y <= y.high
        if inside and point.low is not None and point.high is not None:
            parts.append(el("line", x1=a, x2=a, y1=_y(y, point.low), y2=_y(y, point.high), class_="whisker"))
        mark = MARKS[line.look.colour] if line.look.colour is not None else "o"
        parts.append(_mark(mark if inside else "t" if point.y > y.high else "v", a, b, point.hollow, title))
    return el("g", *parts, class_=f"line {line.look.css}", data_f=line.look.key)


def _mark(shape: str, x: float, y: float, hollow: bool, title: Html) -> Html:
    css = "mark hollow" if hollow else "mark"
    if shape == "o":
        return el("circle", title, cx=x, cy=y, r=3.6, class_=css)
    path = {
        "s": f"M{x - 3.3:.1f},{y - 3.3:.1f}h6.6v6.6h-6.6z",
        "d": f"M{x:.1f},{y - 4.6:.1f}l4.6,4.6l-4.6,4.6l-4.6,-4.6z",
        "t": f"M{x:.1f},{y - 4.4:.1f}l4.4,7.8h-8.8z",
        "v": f"M{x:.1f},{y + 4.4:.1f}l4.4,-7.8h-8.8z",
    }[shape]
    return el("path", title, d=path, class_=css)


def _labels(ends: Sequence[End], left: float, chars: int) -> list[Html]:
    """Names at the lines' ends, pushed apart so that none covers another, with a hair line to where each belongs."""
    ends = sorted(ends, key=lambda end: end[0])
    places = [end[0] for end in ends]
    lowest = HEIGHT - BOTTOM + 2
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    for i in reversed(range(len(places))):
        limit = lowest if i == len(places) - 1 else places[i + 1] - LABEL_GAP
        places[i] = min(places[i], limit)
    parts = []
    for (at, label, look), place in zip(ends, places, strict=True):
        short = label if len(label) <= chars else label[: chars - 1] + "…"
        start = left + 2
        points = f"{start},{at:.1f} {start + 6},{at:.1f} {start + 10},{place:.1f} {start + 13},{place:.1f}"
        text = el("text", short, el("title", label), x=start + 16, y=place + 3.5, class_="label")
        leader = el("polyline", points=points, class_="leader")
        parts.append(el("g", leader, text, class_=f"end {look.css}", data_f=look.key))
    return parts


# ---- heat maps


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[tuple[int, int, float, str, str]],
    *,
    note: str = "",
    cell: tuple[float, float] = (34, 22),
    axes: tuple[str, str] = ("", ""),
    every: int = 1,
) -> Html:
    """A grid of cells, darker the nearer their share is to 1.

    Args:
        cells: (column, row, share 0 to 1, text inside, exact words for the tooltip). Those left out stay blank.
        axes: names of columns and rows. every: columns from one tick to the next.
    """
    wide, high = cell
    left = 8 + 6.2 * max((len(row) for row in rows), default=1)
    width, bottom = left + wide * len(columns) + 4, high * len(rows)
    parts = []
    for column, row, share, text, words in cells:
        x, y = left + wide * column, high * row
        parts.append(el("rect", x=x, y=y, width=wide, height=high, class_="empty"))
        full = el("title", words)
        # An opacity over the page's own colour serves both themes.
        opacity = f"{min(max(share, 0.0), 1.0):.3f}"
        parts.append(el("rect", full, x=x, y=y, width=wide, height=high, class_="heat", fill_opacity=opacity))
        if text:
            css = "inside dark" if share > 0.55 else "inside"
            parts.append(el("text", text, x=x + wide / 2, y=y + high / 2 + 3.5, class_=css, text_anchor="middle"))
    for i, name in enumerate(rows):
        parts.append(el("text", name, x=left - 5, y=high * (i + 0.5) + 3.5, class_="tick", text_anchor="end"))
    for i in range(0, len(columns), every):
        x = left + wide * (i + 0.5)
        parts.append(el("text", columns[i], x=x, y=bottom + 13, class_="tick", text_anchor="middle"))
    words = ", ".join(filter(None, (axes[0] and f"across: {axes[0]}", axes[1] and f"down: {axes[1]}")))
    return figure(title, join(note, " " if note and words else "", words), width, bottom + 18, *parts, css="heatmap")


# ---- bars


@dataclass(frozen=True)
class Bar:
    """A length with its name, the words at its end, and where the floor lies on it (None: unknown)."""

    label: str
    value: float | None
    words: str
    floor: float | None
    strong: bool


def bar_chart(title: str, bars: Sequence[Bar], note: str) -> Html:
    """Horizontal bars with a tick at each one's floor; a bar without a value shows its words only."""
    left, wide, high = 168.0, 230.0, 22.0
    most = max([bar.value or 0.0 for bar in bars] + [bar.floor or 0.0 for bar in bars]) or 1.0
    parts = []
    for i, bar in enumerate(bars):
        y, scale = i * high + 3, wide / most
        label = bar.label if len(bar.label) <= 27 else bar.label[:26] + "…"
        css = "label strong" if bar.strong else "label"
        parts.append(el("text", label, el("title", bar.label), x=left - 7, y=y + 12, class_=css, text_anchor="end"))
        end = left
        if bar.value is not None:
            end = left + scale * bar.value
            shape = "bar strong" if bar.strong else "bar"
            tip = el("title", f"{bar.label}: {bar.words}")
            parts.append(el("rect", tip, x=left, y=y, width=scale * bar.value, height=15, class_=shape))
        if bar.floor is not None and bar.value is not None:
            at = left + scale * bar.floor
            parts.append(el("line", x1=at, x2=at, y1=y - 2, y2=y + 17, class_="floor"))
        parts.append(el("text", bar.words, x=end + 6, y=y + 12, class_="tick"))
    return figure(title, note, left + wide + 162, high * len(bars) + 6, *parts, css="wide")
