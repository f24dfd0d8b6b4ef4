"""Which methods form one line, and how each line looks everywhere on the page."""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from kvpleat.bench.methods import REFERENCE
from kvpleat.bench.report.charts import REFERENCE_LOOK, Look
from kvpleat.bench.report.html import Html, el
from kvpleat.bench.report.results import Results

COLOURS = 8  # lines beyond these are dimmed


@dataclass(frozen=True)
class Family:
    """Methods that differ in how much they compress only."""

    label: str
    look: Look
    specs: tuple[str, ...]


def families(results: Results) -> list[Family]:
    """Families in order of importance: kvpleat's, transformers', kvpress's, each as given. The reference is a line by
    itself in every plot and no family."""
    members: dict[tuple[object, ...], list[str]] = {}
    for spec in results.methods:
        if spec != REFERENCE:
            members.setdefault(_key(results, spec), []).append(spec)
    broken = {key for key, specs in members.items() if results.broken(specs[0])}
    ordered = sorted(members.items(), key=lambda item: (item[0] in broken, _rank(results.methods[item[1][0]])))
    found = []
    for i, (key, specs) in enumerate(ordered):
        colour = i if i < COLOURS and key not in broken else None
        look = Look(colour, results.ours(specs[0]), f"f{i}")
        found.append(Family(_label(results, specs), look, tuple(specs)))
    return found


def _rank(method: dict[str, Any]) -> int:
    """kvpleat's, transformers', kvpress's; last whatever does not compress, such as kvpleat's full cache."""
    if method["ratio"] is None and method["storage"] != "quantized" and not method["options"]:
        return 3
    return {"kvpleat": 0, "transformers": 1}.get(method["family"], 2)


def _key(results: Results, spec: str) -> tuple[object, ...]:
    """Name and options, less the one that sets the size: the ratio, or any number where no ratio is given."""
    name, _, rest = spec.partition(":")
    options = sorted(option for option in rest.split(",") if option and not option.startswith("ratio="))
    if results.methods[spec]["ratio"] is None:
        options = [o.partition("=")[0] if _is_number(o.partition("=")[2]) else o for o in options]
    return name, *options


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _label(results: Results, specs: list[str]) -> str:
    """The words that all members' labels begin with, ratios left out."""
    words = []
    for spec in specs:
        ratio = results.methods[spec]["ratio"]
        words.append([w for w in results.label(spec).split() if ratio is None or w != f"{ratio:g}x"])
    shared = []
    for place in zip(*words, strict=False):
        if len(set(place)) > 1:
            break
        shared.append(place[0])
    return " ".join(shared) or results.label(specs[0])


def common_ratio(results: Results) -> float | None:
    """The ratio that most methods were asked for; the middle one of several."""
    counts = Counter(m["ratio"] for m in results.methods.values() if m["ratio"] in results.ratios)
    most = sorted(ratio for ratio in counts if counts[ratio] == max(counts.values()))
    return most[len(most) // 2] if most else None


def method_looks(found: Sequence[Family], results: Results, specs: Set[str]) -> dict[str, Look]:
    """A look for each of `specs` where every method is a line of its own, the reference first. Of each family the
    member at the common ratio (the middle one, if there is none) keeps its colour, the others are dimmed."""
    looks = {REFERENCE: REFERENCE_LOOK} if REFERENCE in specs else {}
    ratio = common_ratio(results)
    for family in found:
        members = [spec for spec in family.specs if spec in specs]
        at = [spec for spec in members if results.methods[spec]["ratio"] == ratio] or members[len(members) // 2 :]
        for spec in members:
            looks[spec] = family.look if spec == at[0] else Look(None, False, family.look.key)
    return looks


def legend(found: list[Family], results: Results) -> Html:
    """Names with their colours. Where scripts run a click brings one line out of the rest."""
    keys = []
    for family in found:
        mask = [el("span", "mask only", class_="mask")] if any(map(results.masked, family.specs)) else []
        swatch = el("i", class_="swatch")
        keys.append(
            el("button", swatch, family.label, *mask, type="button", data_f=family.look.key, class_=family.look.css)
        )
    return el("div", *keys, class_="legend")
