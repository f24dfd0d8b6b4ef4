"""From the records of a run to figures with intervals: what the command prints and `kvpleat report` draws.

A record is what one method made of everything: seconds of each batch, places of the right texts, hits of the probe,
cosines of tokens. Figures are paired with the full model's on the same batches, questions and sentences.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpleat.bench.encoder.methods import REFERENCE
from kvpleat.bench.metrics import Interval, bootstrap_mean, paired_bootstrap

TOP = 10


@dataclass(frozen=True)
class Figures:
    """One method's figures; None where nothing was measured.

    Args:
        method, label: its spec, and its name for people.
        texts_per_s: of all timed batches.
        speed: the full model's time over this one's, over batches.
        recall: R@1; `kept` is it over the full model's; `change` the difference. recall_top: R@TOP. mrr: mean
            reciprocal rank. recall_full_questions: R@1 where questions are encoded by the full model. recall_begins,
        recall_later: R@1 of questions about a text's first paragraph, and about the others.
        accuracy, accuracy_change: of the sentiment probe.
        cosine, low: of tokens of the texts, mean and 5% quantile; cosine_long: of texts as long as the model takes.
        peak_bytes: activations of one batch. memory: the full model's over this.
    """

    method: str
    label: str
    texts_per_s: float
    speed: Interval
    recall: Interval
    kept: Interval
    change: Interval
    recall_top: float
    mrr: float
    recall_full_questions: float
    recall_begins: float | None
    recall_later: float | None
    accuracy: Interval | None
    accuracy_change: Interval | None
    cosine: float | None
    low: float | None
    cosine_long: float | None
    peak_bytes: int | None
    memory: float | None


def figures(records: Sequence[dict[str, Any]]) -> list[Figures]:
    """Figures of all methods, the full model first, then the faster the further down."""
    full = next(record for record in records if record["method"] == REFERENCE)
    found = [_figures(record, full) for record in records]
    return sorted(found, key=lambda f: (f.method != REFERENCE, f.speed.value))


def _figures(record: dict[str, Any], full: dict[str, Any]) -> Figures:
    hits, wanted = _hits(record), _hits(full)
    probed, base = record["sentiment"], full["sentiment"]
    peak, whole = record["peak_bytes"], full["peak_bytes"]
    return Figures(
        method=record["method"],
        label=record["label"],
        texts_per_s=len(record["seconds"]) and record["texts"] / sum(record["seconds"]),
        speed=bootstrap_mean(full["seconds"], record["seconds"]),
        recall=bootstrap_mean(hits),
        kept=bootstrap_mean(hits, wanted),
        change=paired_bootstrap(hits, wanted),
        recall_top=statistics.mean(float(rank <= TOP) for rank in record["ranks"]),
        mrr=statistics.mean(1 / rank for rank in record["ranks"]),
        recall_full_questions=statistics.mean(float(rank == 1) for rank in record["ranks_full_questions"]),
        recall_begins=_share(hits, record["begins"], True),
        recall_later=_share(hits, record["begins"], False),
        accuracy=bootstrap_mean(probed) if probed else None,
        accuracy_change=paired_bootstrap(probed, base) if probed else None,
        cosine=_mean(record["cosines"], 0),
        low=_mean(record["cosines"], 1),
        cosine_long=_mean(record["cosines_long"], 0),
        peak_bytes=peak,
        memory=whole / peak if peak and whole else None,
    )


def _hits(record: dict[str, Any]) -> list[float]:
    return [float(rank == 1) for rank in record["ranks"]]


def _mean(rows: Sequence[Sequence[float]], column: int) -> float | None:
    return statistics.mean(row[column] for row in rows) if rows else None


def _share(hits: Sequence[float], begins: Sequence[bool], which: bool) -> float | None:
    chosen = [hit for hit, begin in zip(hits, begins, strict=True) if begin == which]
    return statistics.mean(chosen) if chosen else None
