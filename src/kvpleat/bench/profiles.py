"""What goes along tokens, layers, context and time: the curves of a report, from records of `eval` and `bench`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from kvpleat.bench.metrics import Interval, bootstrap_mean
from kvpleat.bench.records import Record
from kvpleat.bench.summary import BYTES, held
from kvpleat.errors import OptionError

CHUNK = 64  # tokens that each kl_N of a generation sums over; the last one may hold fewer


@dataclass
class MemoryRow:
    """Memory of one method over all items of the quality tasks (sums of bytes), and as its process measured it.

    Args:
        full_bytes, allocated_bytes, claimed_bytes: right after the prompts. end_full_bytes, end_allocated_bytes: at the
            ends of the items.
        process: mean scores of the task "memory" at its greatest length: "length", "process_bytes", "peak_bytes",
            "claimed_bytes", "full_bytes", "weights_bytes"; empty where it did not run.
    """

    weights: str
    method: str
    full_bytes: float = 0.0
    allocated_bytes: float = 0.0
    claimed_bytes: float = 0.0
    end_full_bytes: float = 0.0
    end_allocated_bytes: float = 0.0
    process: dict[str, float] = field(default_factory=dict)


def memory_rows(records: Iterable[Record]) -> list[MemoryRow]:
    """One row for each (weights, method)."""
    rows: dict[tuple[str, str], MemoryRow] = {}
    processes: dict[tuple[str, str], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        key = (record.weights, record.method)
        row = rows.setdefault(key, MemoryRow(*key))
        if record.task == "memory":
            processes[key][record.group.get("length", 0)].append(record)
        else:
            for name in BYTES:
                setattr(row, name, getattr(row, name) + held(record).get(name, 0))
            row.end_full_bytes += record.memory.get("full_bytes", 0)
            row.end_allocated_bytes += record.memory.get("allocated_bytes", 0)
    for key, lengths in processes.items():
        longest = lengths[max(lengths)]
        rows[key].process = {name: fmean(r.scores[name] for r in longest) for name in longest[0].scores}
        rows[key].process["length"] = max(lengths)
    return list(rows.values())


def kept_shares(records: Iterable[Record], model: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Method -> [L][H] share of the tokens seen whose entries attention can read, as a ratio of sums over records.

    Args:
        records: of one kind of weights; those without "kept" are left out.
        model: `ResultFile.model`, which tells bytes from tokens.
    """
    records = [record for record in records if "kept" in record.memory]
    if not records:
        return {}  # encoders have no such model
    itemsize = getattr(torch, model["dtype"]).itemsize
    token_bytes = 2 * model["head_dim"] * itemsize * model["layers"] * model["kv_heads"]
    kept: dict[str, torch.Tensor] = {}
    seen: dict[str, float] = defaultdict(float)
    for record in records:
        entries = torch.tensor(record.memory["kept"], dtype=torch.float64)
        kept[record.method] = kept[record.method] + entries if record.method in kept else entries
        seen[record.method] += record.memory["full_bytes"] / token_bytes
    return {method: (entries / seen[method]).tolist() for method, entries in kept.items()}


def kl_along(records: Iterable[Record]) -> dict[str, list[tuple[int, Interval]]]:
    """Method -> (tokens generated, KL to the full cache in nats a token) of each stretch of CHUNK generated tokens."""
    sums: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        chunk = 0
        while record.task == "generation" and f"kl_{chunk}" in record.scores:
            tokens = min(CHUNK, record.scores["tokens"] - chunk * CHUNK)
            if tokens > 0:
                sums[record.method][chunk].append((record.scores[f"kl_{chunk}"], tokens))
            chunk += 1
    return {
        method: [
            (round(chunk * CHUNK + max(tokens for _, tokens in items)), bootstrap_mean(*zip(*items, strict=True)))
            for chunk, items in chunks.items()
        ]
        for method, chunks in sums.items()
    }


def example_traces(records: Sequence[Record]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The item with a trace by most methods (the longest of these) and method -> [(tokens, allocated bytes), ...]."""
    items: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for record in records:
        if trace := record.memory.get("trace"):
            items[record.item][record.method] = [(tokens, count) for tokens, count in trace]
    if not items:
        return "", {}
    best = max(items, key=lambda item: (len(items[item]), max(trace[-1][0] for trace in items[item].values())))
    return best, items[best]


@dataclass(frozen=True)
class Speed:
    """One method at one batch and context, in seconds; times are None where the speed was refused.

    Args:
        prefill, ttft, step: (median, least, greatest) over repeats, of steps over those of all repeats.
        tpot: mean time per token after the first, moments of compression included.
        itl: {"p50", "p90", "p99"} of the times between tokens.
        tokens_per_s: of all rows together.
        floor: the least a step can take: bytes that must be read over the measured bandwidth.
        floor_share: floor / tpot.
        speedup: (median, least, greatest) over repeats of the reference's tpot over this one's, taken in turns.
        refused: why no speed is given, or None.
    """

    method: str
    batch: int
    context: int
    prefill: tuple[float, float, float] | None
    ttft: tuple[float, float, float] | None
    step: tuple[float, float, float] | None
    tpot: float | None
    itl: dict[str, float]
    tokens_per_s: float | None
    floor: float | None
    floor_share: float | None
    speedup: tuple[float, float, float] | None
    peak_bytes: float | None
    allocated_bytes: float | None
    trace: list[tuple[float, float]]
    refused: str | None


def speeds(records: Iterable[dict[str, Any]]) -> list[Speed]:
    """The records of a result file of kind "bench". Raises OptionError where one has no method, batch or context."""
    return [_speed(record) for record in records]


def _speed(record: dict[str, Any]) -> Speed:
    try:
        method, batch, context = record["method"], record["batch"], record["context"]
    except KeyError as error:
        raise OptionError(
            f"A record of the benchmark has no {error}, so it cannot be placed in a table. Run `kvpleat bench` again."
        ) from None
    refused = record.get("refused")

    def timed(key: str) -> Any:
        return None if refused else record.get(key)

    return Speed(
        method=method,
        batch=batch,
        context=context,
        prefill=_spread(timed("prefill_s")),
        ttft=_spread(timed("ttft_s")),
        step=_spread([step for steps in timed("step_s") or [] for step in steps]),
        tpot=timed("tpot_s"),
        itl=timed("itl_s") or {},
        tokens_per_s=timed("tokens_per_s"),
        floor=record.get("floor_step_s"),
        floor_share=timed("floor_share"),
        speedup=(gain["median"], gain["min"], gain["max"]) if (gain := timed("speedup")) else None,
        peak_bytes=record.get("peak_bytes"),
        allocated_bytes=(record.get("memory") or {}).get("allocated_bytes"),
        trace=[(tokens, count) for tokens, count in record.get("trace") or []],
        refused=refused,
    )


def _spread(times: Sequence[float] | None) -> tuple[float, float, float] | None:
    return (median(times), min(times), max(times)) if times else None
