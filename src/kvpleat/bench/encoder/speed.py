"""Time of encoders of known shapes with random weights, merged and not: `python -m kvpleat.bench.encoder --speed`.

Rows are all of full length, so there is no padding, and transformers runs SDPA without a mask. One case is ragged:
there transformers gets the rows of one length at a time, which is a batch with its padding removed.

The floor of a forward is its FLOPs, as torch counts them in what really ran (matrix products and attention; SDPA
computes a layer with a window in full), over the rate of a large product of bfloat16 matrices, measured here.
Random weights merge as many tokens as others do, as long as the policy goes by `ratio`. On a GPU a method is timed only
after its kernels gave what torch gives (check.py).
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from kvpleat.accounting import human_bytes
from kvpleat.bench.encoder.check import check
from kvpleat.bench.encoder.methods import REFERENCE, Method, parse, share_weights
from kvpleat.bench.floor import now
from kvpleat.errors import KvpleatError

RATIOS = (1.0, 2.0, 2.3, 2.6, 3.8, 5.0)
WARM, REPEATS = 2, 7
LENGTHS = 7  # of the ragged case: from a quarter of the longest on, in equal steps


@dataclass(frozen=True)
class Case:
    """A model's shape, and how many rows of how many tokens it is given."""

    name: str
    config: Any
    rows: int
    tokens: int

    def model(self, device: torch.device) -> Any:
        """The model with random weights: bfloat16 on a GPU, float32 on a CPU."""
        torch.manual_seed(0)
        kind = BertModel if isinstance(self.config, BertConfig) else ModernBertModel
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return kind(self.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


def _bert(layers: int, hidden: int, heads: int) -> BertConfig:
    return BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden
    )


def _modern(layers: int, hidden: int, heads: int, inter: int) -> ModernBertConfig:
    return ModernBertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=inter
    )


def cases(tiny: bool) -> list[Case]:
    """BERT-base and -large at 512 tokens, ModernBERT-base and -large at 4,096; tiny: the same kinds, in no time."""
    if tiny:
        return [Case("bert-tiny", _bert(3, 32, 2), 4, 64), Case("modernbert-tiny", _modern(4, 32, 2, 48), 2, 192)]
    return [
        Case("bert-base", _bert(12, 768, 12), 256, 512),
        Case("bert-large", _bert(24, 1024, 16), 128, 512),
        Case("modernbert-base", _modern(22, 768, 12, 1152), 32, 4096),
        Case("modernbert-large", _modern(28, 1024, 16, 2624), 16, 4096),
    ]


@dataclass
class Way:
    """One way to encode the case's rows: a method's label, and what a forward of it is."""

    label: str
    run: Callable[[], object]


@torch.inference_mode()
def measure(case: Case, ways: Sequence[Way], device: torch.device, rate: float) -> list[dict[str, Any]]:
    """A record of each way, timed in turns, the first one being what the others are compared with.

    Args:
        rate: FLOP/s of a large matrix product.
    """
    records: list[dict[str, Any]] = []
    for way in ways:
        for _ in range(WARM):
            way.run()
        with FlopCounterMode(display=False) as counter:
            way.run()
        records.append(
            {"shape": case.name, "rows": case.rows, "tokens": case.tokens, "method": way.label,
             "flops": counter.get_total_flops(), "floor_ms": 1e3 * counter.get_total_flops() / rate,
             "peak_bytes": _peak(way, device)}
        )  # fmt: skip
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(REPEATS):
        for k in range(len(ways)):
            i = (turn + k) % len(ways)
            start = now(device)
            ways[i].run()
            times[i].append(now(device) - start)
    for record, seconds in zip(records, times, strict=True):
        ratios = [a / b for a, b in zip(times[0], seconds, strict=True)]
        record |= {"ms": 1e3 * statistics.median(seconds), "x_full": statistics.median(ratios)}
        record |= {"x_least": min(ratios), "x_most": max(ratios)}
    return records


def _peak(way: Way, device: torch.device) -> int | None:
    """Bytes that a forward takes at most beyond what was held before; a GPU's allocator only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def methods(config: Any) -> list[Method]:
    """The full model, and EncoderMerge at each ratio: with keys of all tokens in the first layer, and without."""
    whole = [f"merge:ratio={ratio:g}" for ratio in RATIOS]
    narrow = [f"{spec},whole_keys=0" for spec in whole[1:]] if isinstance(config, BertConfig) else []
    return [parse(spec) for spec in (REFERENCE, *whole, *narrow)]


def run(case: Case, device: torch.device, rate: float, ragged: bool = False) -> list[dict[str, Any]]:
    """Records of one case. A method that cannot run is one with the reason in "refused"."""
    model = case.model(device)
    ids = torch.randint(model.config.vocab_size, (case.rows, case.tokens), device=device)
    refused: list[dict[str, Any]] = []
    with ExitStack() as stack:
        ways: list[Way] = []
        for method in methods(case.config):
            try:
                if device.type == "cuda":
                    check(method, model, ids)
                twin = share_weights(model)
                stack.enter_context(method.on(twin))
                new = list(_ragged(case, method, twin, ids) if ragged else [_whole(method, twin, ids)])
                with torch.inference_mode():
                    for way in new:
                        way.run()
                ways += new
            except (KvpleatError, torch.OutOfMemoryError) as error:
                why = " ".join(str(error).split())
                refused.append({"shape": case.name, "method": method.label, "refused": why})
        return measure(case, ways, device, rate) + refused


def _whole(method: Method, model: Any, ids: Tensor) -> Way:
    return Way(method.label, lambda: model(input_ids=ids))


def _ragged(case: Case, method: Method, model: Any, ids: Tensor) -> Iterator[Way]:
    """The rows cut to lengths that differ: one length at a time (no padding), and all together with a mask."""
    lengths = [case.tokens * (i % LENGTHS + 2) // (LENGTHS + 1) for i in range(case.rows)]
    groups = [ids[[i for i, n in enumerate(lengths) if n == length], :length] for length in sorted(set(lengths))]
    mask = (torch.arange(case.tokens) < torch.tensor(lengths)[:, None]).long().to(ids.device)

    def by_length() -> None:
        for group in groups:
            model(input_ids=group)

    yield Way(f"{method.label}, by length", by_length)
    yield Way(f"{method.label}, padded", lambda: model(input_ids=ids, attention_mask=mask))


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    head = f"{record['shape']:<17}{record['method']:<36}"
    if "refused" in record:
        return f"{head}refused: {record['refused']}"
    peak = human_bytes(record["peak_bytes"]) if record["peak_bytes"] is not None else ""
    share = record["floor_ms"] / record["ms"]
    return (
        f"{head}{record['ms']:9.2f} ms  x full {record['x_full']:5.2f} ({record['x_least']:.2f} to "
        f"{record['x_most']:.2f})  floor {record['floor_ms']:8.2f} ms ({share:4.0%})  peak {peak:>10}"
    )
