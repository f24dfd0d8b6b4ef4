"""A picture of which tokens of a text were merged, layer by layer.

The first line is the text's tokens. Under it a line for each layer, as its MLP sees them: tokens that are one share a
box, or a colour where others stand between them; the number is how many they are.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from kvpleat.bench.report.html import Html, el

GREY = "#808890"  # readable on light and on dark pages
COLOURS = ("#3572d4", "#d9822b", "#2f9e62", "#c2475a", "#8a5cc9", "#3aa0a8", "#b0892c", "#7d8b3a")
CHAR, PAD, HIGH, GAP, LEFT, TOP = 7.2, 10.0, 20.0, 6.0, 62.0, 34.0  # pixels
LEAST = 22.0  # width of a token


def draw(tokens: Sequence[str], layers: Sequence[Sequence[int]], title: str, **attributes: str) -> Html:
    """The picture as SVG.

    Args:
        tokens: of the text. layers: for each layer the group of each token; equal numbers are one token.
        attributes: more of the SVG's own.
    """
    wide = [max(LEAST, CHAR * len(token) + PAD) for token in tokens]
    starts = [LEFT + sum(wide[:i]) for i in range(len(wide) + 1)]
    parts = [_text(LEFT, 18, title, "start", bold=True)]
    for i, token in enumerate(tokens):
        parts.append(_text((starts[i] + starts[i + 1]) / 2, TOP + 14, token, "middle"))
    for depth, groups in enumerate(layers):
        y = TOP + (depth + 1) * (HIGH + GAP)
        parts.append(_text(LEFT - 8, y + 14, f"layer {depth + 1}", "end"))
        parts += _boxes(groups, starts, y)
    left = [len(set(groups)) for groups in layers]
    y = TOP + (len(layers) + 1) * (HIGH + GAP)
    parts.append(_text(LEFT, y + 14, f"{len(tokens)} tokens; in each layer {', '.join(map(str, left))}", "start"))
    width, height = starts[-1] + 8, y + HIGH
    box = f"0 0 {width:.0f} {height:.0f}"
    return el("svg", *parts, viewBox=box, role="img", style=f"max-width:{width:.0f}px", **attributes)


def _boxes(groups: Sequence[int], starts: Sequence[float], y: float) -> list[Html]:
    """One box for each run of tokens of one group: pale where a token is alone, with the group's size where not."""
    parts, place = [], 0
    sizes = Counter(groups)
    shared = [group for group in dict.fromkeys(groups) if sizes[group] > 1]
    for group, run in groupby(groups):
        count, size = len(list(run)), sizes[group]
        x, width = starts[place] + 1.5, starts[place + count] - starts[place] - 3
        colour = COLOURS[shared.index(group) % len(COLOURS)] if size > 1 else GREY
        opacity = "0.85" if size > 1 else "0.15"
        parts.append(el("rect", x=x, y=y, width=width, height=HIGH, rx=4, fill=colour, fill_opacity=opacity))
        if size > 1:
            parts.append(_text(x + width / 2, y + 14, str(size), "middle", fill="#ffffff"))
        place += count
    return parts


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False, fill: str = GREY) -> Html:
    weight = "bold" if bold else "normal"
    return el("text", text, x=x, y=y, font_size=13, text_anchor=anchor, font_weight=weight, fill=fill)
