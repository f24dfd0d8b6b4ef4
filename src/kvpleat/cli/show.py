"""What the command line shows people: prefill progress, the meter side by side, kept entries as a picture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kvpleat.accounting import MemoryReport, human_bytes
from kvpleat.cli.run import Answer, Prefilling, agreement

BLOCKS = "▁▂▃▄▅▆▇█"
SHADES = ("grey42", "steel_blue", "dark_cyan", "green3", "yellow3", "orange1")  # few entries to many
MAX_HEADS = 8  # more heads than this become four rows: the one that keeps most, the quartile above, below, the least


class _SeenTokens(ProgressColumn):
    """Asks the cache how many tokens it has seen; generate() itself reports nothing before the first token."""

    def __init__(self, seen: Callable[[], int] | None, total: int) -> None:
        super().__init__()
        self._seen = seen
        self._total = total

    def render(self, task: Task) -> Text:
        if self._seen is None:
            return Text(f"{self._total:,} tokens")
        task.completed = self._seen()
        return Text(f"{int(task.completed):>6,} of {self._total:,} tokens")


def prefilling(console: Console, title: str) -> Prefilling:
    """A progress bar for prefills on `console`, gone when the first token comes; nothing where it is no terminal."""

    @contextmanager
    def show(seen: Callable[[], int] | None, total: int) -> Iterator[Callable[[], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn(title),
            _SeenTokens(seen, total),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        bar.add_task(title, total=None if seen is None else total)  # None: a pulse
        with bar:
            yield bar.stop

    return show


def meter(full: Answer | None, compressed: Answer, label: str) -> Table:
    """Memory and time of one answer, or of two side by side."""
    answers = [answer for answer in (full, compressed) if answer is not None]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for title in (["full cache"] if full is not None else []) + [label]:
        table.add_column(title, justify="right")
    for name, value in _ROWS.items():
        table.add_row(name, *(value(answer) for answer in answers))
    if full is not None:
        share = agreement(full.tokens, compressed.tokens)
        table.add_row("equal tokens", "", f"{share:.0%}" if full.tokens != compressed.tokens else "all")
    return table


_ROWS: dict[str, Callable[[Answer], str]] = {
    "tokens, prompt + new": lambda answer: f"{answer.prompt_tokens:,} + {len(answer.tokens)}",
    "a full cache": lambda answer: human_bytes(answer.memory.full_bytes),
    "live": lambda answer: human_bytes(answer.memory.live_bytes),
    "allocated": lambda answer: human_bytes(answer.memory.allocated_bytes),
    "peak allocated": lambda answer: human_bytes(answer.memory.peak_allocated_bytes),
    "compression ratio": lambda answer: f"{answer.memory.compression_ratio:.2f}x",
    "prefill": lambda answer: f"{answer.prefill_s:.1f} s",
    "decode": lambda answer: f"{rate:.1f} tokens/s" if (rate := answer.decode_tokens_per_s) else "one token only",
}


def status_line(report: MemoryReport) -> str:
    """A cache in one line, for the chat."""
    held, full = human_bytes(report.allocated_bytes), human_bytes(report.full_bytes)
    return f"{report.seen_tokens:,} tokens · {held} allocated of {full} full · ratio {report.compression_ratio:.2f}x"


def kept_picture(kept: Tensor, tokens: int, width: int = 80) -> Text:
    """Kept entries as a picture: a column per layer, a row per KV head; the fullest stream is a full block.

    Args:
        kept: [layers, kv_heads] mean entries per row.
        tokens: that the cache has seen.
        width: of the terminal, in characters; more layers than fit are continued below.
    """
    rows = _head_rows(kept)
    layers, most = kept.shape[0], float(kept.max())
    margin = max(len(name) for name, _ in rows) + 2
    cell = 2 if layers * 2 + margin <= width else 1
    parts = -(-layers * cell // (width - margin))
    step = -(-layers // (5 * parts)) * 5
    picture = Text(f"entries kept of {tokens:,} tokens, by layer (across) and KV head; {BLOCKS[-1]} = {most:,.0f}\n")
    for first in range(0, layers, step):
        part = range(first, min(first + step, layers))
        for name, counts in rows:
            picture.append(f"{name:<{margin}}")
            for layer in part:
                _append_cell(picture, counts[layer] / max(most, 1), cell)
            picture.append("\n")
        picture.append(f"{'layer':<{margin}}{_ruler(part, cell)}\n", style="dim")
    picture.rstrip()
    return picture


def _ruler(layers: range, cell: int) -> str:
    """Every fifth layer's number, above which its column begins."""
    line = ""
    for place, layer in enumerate(layers):
        if layer % 5 == 0:
            line = f"{line:<{place * cell}}{layer}"
    return line


def _append_cell(picture: Text, share: float, cell: int) -> None:
    """One stream: a block as high as its share of the fullest stream, and the space to the next layer."""
    block = BLOCKS[max(round(share * len(BLOCKS)), 1) - 1]
    shade = SHADES[max(round(share * len(SHADES)), 1) - 1]
    picture.append(block.ljust(cell), style=shade)


def _head_rows(kept: Tensor) -> list[tuple[str, list[float]]]:
    """(name, entries by layer) of each head, or of four quantiles over the heads of a layer where heads are many."""
    heads = kept.shape[1]
    if heads <= MAX_HEADS:
        return [(f"head {head}", kept[:, head].tolist()) for head in range(heads)]
    ranked = kept.sort(dim=1, descending=True).values
    places = {"most": 0, "upper": heads // 4, "lower": 3 * heads // 4, "least": heads - 1}
    return [(f"{name} of {heads}", ranked[:, place].tolist()) for name, place in places.items()]
