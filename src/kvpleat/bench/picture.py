"""The picture in the README: `python -m kvpleat.bench.picture TEXT --out FILE.svg` compresses a text, draws the rest.

Left, the bytes of the full cache beside what the compressed one allocates; right, how many entries each layer and KV
head kept. Every number comes from the run that draws it.
"""

import argparse
from pathlib import Path

import torch

from kvpleat import MemoryReport, compress
from kvpleat.accounting import human_bytes
from kvpleat.bench.methods import parse
from kvpleat.bench.methods.pleated import PleatedMethod
from kvpleat.errors import OptionError
from kvpleat.hf.models import load

WIDTH, HEIGHT, BASE = 860, 270, 210
GREY, BLUE, PALE = "#808890", "#3572d4", "#9db9e8"  # readable on light and on dark pages


def measure(model: str, text: str, policy: str) -> MemoryReport:
    """Memory after the text as a prompt."""
    loaded = load(model, dtype="float32")
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]], device=loaded.model.device)
    method = parse(policy)
    if not isinstance(method, PleatedMethod):
        raise OptionError(f"{policy!r} is no policy of kvpleat, so its cache keeps no record of its heads.")
    with compress(loaded.model, method.policy) as pleated:
        pleated.prefill(ids, cache=pleated.new_cache())
        return pleated.report()


def draw(report: MemoryReport, title: str) -> str:
    """The report as an SVG page."""
    parts = [_text(20, 24, title, size=15, weight="bold")]
    bars = (
        ("full cache", report.full_bytes, GREY),
        ("peak", report.peak_allocated_bytes, PALE),
        ("allocated", report.allocated_bytes, BLUE),
    )
    for i, (name, count, colour) in enumerate(bars):
        height = 140 * count / report.full_bytes
        x = 30 + 100 * i
        parts.append(f'<rect x="{x}" y="{BASE - height:.1f}" width="70" height="{height:.1f}" rx="3" fill="{colour}"/>')
        parts.append(_text(x + 35, BASE - height - 7, human_bytes(count), anchor="middle"))
        parts.append(_text(x + 35, BASE + 18, name, anchor="middle"))
    ratio = f"{report.compression_ratio:.2f}x smaller after {report.seen_tokens:,} tokens"
    parts.append(_text(30, BASE + 42, ratio, weight="bold"))
    return _page(parts + _heat(report, left=370))


def _heat(report: MemoryReport, left: int) -> list[str]:
    """One cell for each layer and KV head, darker the more of its entries it kept."""
    layers, heads = report.kept.shape
    wide, high = (WIDTH - left - 20) / layers, 150 / heads
    share = report.kept / (report.seen_tokens or 1)
    cells = [_text(left, 58, "share of entries that each KV head kept")]
    for layer in range(layers):
        for head in range(heads):
            kept = float(share[layer, head])
            cells.append(
                f'<rect x="{left + layer * wide:.1f}" y="{66 + head * high:.1f}" '
                f'width="{wide - 1:.1f}" height="{high - 1:.1f}" '
                f'fill="{BLUE}" fill-opacity="{0.06 + 0.94 * kept:.3f}"><title>layer {layer}, head {head}: '
                f"{kept:.1%}</title></rect>"
            )
    cells += [_text(left + (i + 0.5) * wide, 234, str(i), anchor="middle") for i in range(0, layers, 5)]
    cells.append(
        _text(
            left, 252, f"layer; from {float(share.min()):.0%} (palest) to {float(share.max()):.0%} of a head's entries"
        )
    )
    return cells


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{GREY}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def _page(parts: list[str]) -> str:
    box = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="system-ui, sans-serif">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line of the picture."""
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.picture", description=__doc__)
    parser.add_argument("text", type=Path, help="UTF-8 text to compress")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="attention:ratio=4")
    args = parser.parse_args(argv)
    report = measure(args.model, args.text.read_text(encoding="utf-8"), args.policy)
    args.out.write_text(draw(report, f"{args.model}, {args.policy}, {args.text.name}"), encoding="utf-8")


if __name__ == "__main__":
    main()
