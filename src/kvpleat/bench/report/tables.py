"""A table once, written as HTML or as GitHub markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpleat.bench.report.html import Html, el

NONE = "\N{EN DASH}"  # in place of a figure that there is none of


@dataclass(frozen=True)
class Cell:
    """What stands in a place of a table.

    Args:
        text: the figure.
        under: smaller lines below it (interval, difference).
        css: "good", "bad", "best" or "refused".
        tip: words shown on hovering.
    """

    text: str = ""
    under: Sequence[str] = ()
    css: str = ""
    tip: str = ""


@dataclass
class Table:
    """A table of methods. The first column is the row's name; `span` cells run to the row's end.

    Args:
        title: above it. heads: of the columns, the first one included. note: below it.
        rows: (name, mark beside the name, ours?, cells).
    """

    title: str
    heads: Sequence[str]
    rows: list[tuple[str, str, bool, list[Cell]]] = field(default_factory=list)
    note: str = ""

    def html(self) -> Html:
        """The table in a box that scrolls sideways where the screen is narrow."""
        head = el("tr", *(el("th", name, scope="col") for name in self.heads))
        body = []
        for name, mark, ours, cells in self.rows:
            marks = [el("span", mark, class_="mask")] if mark else []
            first = el("th", name, *marks, scope="row")
            body.append(el("tr", first, *self._cells(cells), class_="ours" if ours else None))
        table = el("table", el("caption", self.title), el("thead", head), el("tbody", *body))
        note = [el("p", self.note, class_="note")] if self.note else []
        return el("div", el("div", table, class_="scroll"), *note)

    def _cells(self, cells: Sequence[Cell]) -> list[Html]:
        written = []
        for i, cell in enumerate(cells):
            rest = len(self.heads) - 1 - i
            span = str(rest) if i == len(cells) - 1 and rest > 1 else None
            under = [el("small", line) for line in cell.under]
            written.append(
                el("td", el("span", cell.text), *under, class_=cell.css or None, title=cell.tip or None, colspan=span)
            )
        return written

    def markdown(self) -> str:
        """The table as GitHub markdown, a heading above it."""
        lines = [f"### {_plain(self.title)}", "", _row(self.heads)]
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in self.heads[1:])]) + "|")
        for name, mark, ours, cells in self.rows:
            shown = f"**{_plain(name)}**" if ours else _plain(name)
            texts = ["; ".join(map(_plain, filter(None, (cell.text, *cell.under)))) for cell in cells]
            texts += [""] * (len(self.heads) - 1 - len(texts))
            lines.append("| " + " | ".join([f"{shown} ({_plain(mark)})" if mark else shown, *texts]) + " |")
        return "\n".join([*lines, "", *([_plain(self.note), ""] if self.note else [])])


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, texts)) + " |"


def _plain(text: str) -> str:
    """Text that markdown shows as it is: no markup, no end of a cell or of a line."""
    for sign in ("\\", "`", "*", "_", "|", "~"):
        text = text.replace(sign, "\\" + sign)
    text = text.replace("](", "]\\(")  # no link, and intervals stay readable
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
