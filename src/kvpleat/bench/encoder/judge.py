"""A run of the judge: all methods on the same questions, sentences and long texts, in turns. See `__main__.py`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kvpleat.bench.encoder import quality
from kvpleat.bench.encoder.memory import peak_bytes
from kvpleat.bench.encoder.methods import Merge, Method, parse
from kvpleat.bench.encoder.picture import SENTENCE, trace
from kvpleat.bench.encoder.texts import Retrieval
from kvpleat.bench.encoder.turns import Entrant, entrants, in_turns, matched
from kvpleat.bench.memory import can_measure
from kvpleat.bench.records import ResultFile, environment
from kvpleat.hf.embed import embed
from kvpleat.hf.models import LoadedModel

SHARES = (0.0, 0.3)  # of ToMe, between which its strength is looked for
PROBED, PROBED_BATCH = 5, 8  # batches that a strength is measured with, and texts of each
TINY_SHARE = 1e-4


@dataclass(frozen=True)
class Asked:
    """What methods are judged by.

    Args:
        retrieval: questions and texts. long: texts as long as the model takes, for fidelity.
        sentences, labels: of the probe; empty: none.
        batch: texts of a forward. passes: how often the texts are timed. watched: texts whose tokens are compared.
        memory: whether peak memory is measured, in a fresh process for each method.
        sentence: whose tokens are followed through the layers, for the picture.
    """

    retrieval: Retrieval
    long: list[list[int]]
    sentences: list[list[int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    batch: int = 16
    passes: int = 1
    watched: int = 32
    memory: bool = True
    sentence: str = SENTENCE


def judge(
    loaded: LoadedModel, methods: Sequence[Method], asked: Asked, say: Callable[[str], None] = lambda words: None
) -> list[dict[str, Any]]:
    """Records of all methods (see figures.py), the full model being the first of `methods`."""
    texts, batch = asked.retrieval.texts, asked.batch
    with entrants(loaded, methods) as chosen:
        say(f"{len(texts)} texts by {len(methods)} methods in turns")
        encoded = in_turns(loaded, chosen, texts, batch, passes=asked.passes, say=say)
        asking = [
            embed(loaded, entrant.method.cut(asked.retrieval.questions), model=entrant.model, normalize=True)
            for entrant in chosen
        ]
        records = []
        for entrant, made, questions in zip(chosen, encoded, asking, strict=True):
            say(f"{entrant.method.label}: quality")
            record = {
                **entrant.method.to_dict(),
                "method": entrant.method.spec,
                "texts": asked.passes * len(texts),
                "seconds": made.seconds,
                "begins": asked.retrieval.begins,
                "ranks": quality.ranks(questions, made.vectors, asked.retrieval.right),
                "ranks_full_questions": quality.ranks(asking[0], made.vectors, asked.retrieval.right),
                **_more(loaded, chosen[0], entrant, asked),
            }
            records.append(record)
    for method, record in zip(methods, records, strict=True):
        tokens, layers = trace(loaded, method, asked.sentence)
        record["picture"] = {"tokens": tokens, "layers": layers} if layers else None
        say(f"{method.label}: memory")
        record["peak_bytes"] = _peak(loaded, method.spec, asked)
    return records


def _more(loaded: LoadedModel, full: Entrant, entrant: Entrant, asked: Asked) -> dict[str, Any]:
    """What the probe and the fidelity of tokens give."""
    hits: list[int] = []
    if asked.labels:
        fed = entrant.method.cut(asked.sentences)
        vectors = embed(loaded, fed, model=entrant.model, normalize=True)
        hits = quality.probe(vectors, asked.labels)
    watched = asked.retrieval.texts[: asked.watched]
    return {
        "sentiment": hits,
        "cosines": quality.fidelity(loaded, full, entrant, watched, asked.batch),
        "cosines_long": quality.fidelity(loaded, full, entrant, asked.long, asked.batch),
    }


def _peak(loaded: LoadedModel, spec: str, asked: Asked) -> int | None:
    """Of one batch of the texts as long as the model takes."""
    rows = asked.long[: asked.batch]
    if not asked.memory or not rows or not can_measure(loaded.model.device):
        return None
    return peak_bytes(loaded, spec, rows)


def equal_time(
    loaded: LoadedModel, methods: Sequence[Method], asked: Asked, say: Callable[[str], None] = lambda words: None
) -> list[Method]:
    """ToMe and truncation of such strengths that they take as long as each EncoderMerge among the methods."""
    texts, batch = asked.retrieval.texts, min(asked.batch, PROBED_BATCH)
    step = max(1, len(texts) // (PROBED * batch))
    rows = texts[::step][: PROBED * batch]
    longest = max(map(len, texts))
    makers: tuple[tuple[Callable[[float], Method], tuple[float, float]], ...] = (
        (lambda share: parse(f"tome:share={max(share, TINY_SHARE):.4f}"), SHARES),
        (lambda tokens: parse(f"truncate:tokens={max(2, round(tokens))}"), (longest, 2)),
    )
    found = []
    for method in methods:
        for make, bounds in makers if isinstance(method, Merge) else ():
            found.append(matched(loaded, method, make, bounds, rows, batch))
            say(f"{found[-1].label} takes as long as {method.label}")
    return found


def result_file(
    loaded: LoadedModel, settings: dict[str, Any], records: list[dict[str, Any]], command: str
) -> ResultFile:
    """The run as a file for `kvpleat report`."""
    config = loaded.model.config
    return ResultFile(
        kind="encoder",
        settings={**settings, "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None},
        model={
            "name": loaded.name,
            "source": loaded.source,
            "family": config.model_type,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
        },
        methods=[],
        records=records,
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        environment=environment(loaded.model.device),
    )
