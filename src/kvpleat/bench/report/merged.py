"""A picture of which tokens of a text were merged, layer by layer.

Under the text's tokens stands a line for each layer, as its MLP sees them (one for several layers that see the same):
tokens that are one have the same number and colour, next to each other or not. Those that are alone are pale. Long
texts go on below.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from kvpleat.bench.report.html import Html, el

GREY = "#808890"  # readable on light and on dark pages
COLOURS = ("#3572d4", "#d9822b", "#2f9e62", "#c2475a", "#8a5cc9", "#3aa0a8", "#b0892c", "#7d8b3a")
CHAR, PAD, HIGH, GAP, LEFT, TOP = 7.4, 10.0, 20.0, 4.0, 78.0, 30.0  # pixels
LEAST, WIDEST = 24.0, 1010.0  # of a token, and of a line of them


def draw(tokens: Sequence[str], layers: Sequence[Sequence[int]], title: str, **attributes: str) -> Html:
    """The picture as SVG.

    Args:
        tokens: of the text. layers: for each layer the group of each token; equal numbers are one token.
        attributes: more of the SVG's own.
    """
    wide = [max(LEAST, CHAR * len(token) + PAD) for token in tokens]
    rows = _rows(layers)
    counts = ", ".join(f"{len(set(groups))} in {name}" for name, groups in rows)
    parts = [_text(0, 16, title, "start", bold=True, size=13)]
    y, right = TOP, 0.0
    for first, last in _lines(wide):
        starts = [LEFT + sum(wide[first:i]) for i in range(first, last + 1)]
        for i in range(first, last):
            parts.append(_text(starts[i - first] + wide[i] / 2, y + 14, tokens[i], "middle", size=12))
        for name, groups in rows:
            y += HIGH + GAP
            parts.append(_text(LEFT - 8, y + 14, name, "end", size=12))
            parts += _boxes(groups, first, starts, y)
        y += HIGH + 3 * GAP
        right = max(right, starts[-1])
    parts.append(_text(0, y + 12, f"{len(tokens)} tokens, {counts}", "start", size=12))
    width = f"{right + 4:.0f}"
    box = f"0 0 {width} {y + 20:.0f}"
    return el("svg", *parts, viewBox=box, width=width, role="img", style=f"max-width:{width}px", **attributes)


def _rows(layers: Sequence[Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, groups) of each run of layers that have the same groups."""
    found, first = [], 1
    for groups, run in groupby(layers, key=tuple):
        last = first + len(list(run)) - 1
        found.append((f"layer {first}" if first == last else f"layers {first}-{last}", groups))
        first = last + 1
    return found


def _lines(wide: Sequence[float]) -> Iterator[tuple[int, int]]:
    """(first token, one after the last) of each line."""
    first, held = 0, 0.0
    for i, width in enumerate(wide):
        if held + width > WIDEST and i > first:
            yield first, i
            first, held = i, 0.0
        held += width
    yield first, len(wide)


def _boxes(groups: Sequence[int], first: int, starts: Sequence[float], y: float) -> list[Html]:
    """The boxes of a line that begins with a token: one for each run of tokens of one group."""
    sizes = Counter(groups)
    shared = [group for group in dict.fromkeys(groups) if sizes[group] > 1]
    parts, place = [], 0
    for group, run in groupby(groups[first : first + len(starts) - 1]):
        count, number = len(list(run)), shared.index(group) if sizes[group] > 1 else None
        x, width = starts[place] + 1, starts[place + count] - starts[place] - 2
        colour, opacity = (GREY, "0.15") if number is None else (COLOURS[number % len(COLOURS)], "0.9")
        parts.append(el("rect", x=x, y=y, width=width, height=HIGH, rx=4, fill=colour, fill_opacity=opacity))
        if number is not None:
            parts.append(_text(x + width / 2, y + 14, str(number + 1), "middle", size=12, fill="#ffffff"))
        place += count
    return parts


def _text(x: float, y: float, text: str, anchor: str, *, size: int, bold: bool = False, fill: str = GREY) -> Html:
    weight = "bold" if bold else None
    style = f"font-size:{size}px;font-family:system-ui,sans-serif"
    return el("text", text, x=x, y=y, style=style, text_anchor=anchor, font_weight=weight, fill=fill)
