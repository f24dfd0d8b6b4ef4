"""What Prometheus hears beside vLLM's own metrics, and its log now and then."""

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

GAUGES = {
    "full_bytes": "Bytes of keys and values of all tokens of requests that have blocks, without compression.",
    "live_bytes": "Bytes of entries that attention reads.",
    "allocated_bytes": "Bytes of pages that hold them.",
    "charged_bytes": "Bytes of blocks that the scheduler charges requests.",
    "compression_ratio": "Full bytes over allocated ones.",
    "head_skew": "Entries of the KV head that has most of all, over the mean.",
}
COUNTERS = {
    "freed_blocks": "Blocks that came back from requests that go on.",
    "forced_evictions": "Entries that left before their time: always 0, since requests are charged the worst case.",
}


@dataclass(frozen=True)
class Usage:
    """Of one worker or several, after a step: bytes as in GAUGES. most: entries of the fullest head. entries: of all,
    and how many heads these are: sums, so that any number of workers can be put together in any order."""

    full_bytes: int
    live_bytes: int
    allocated_bytes: int
    most: int
    entries: int
    heads: int

    def __or__(self, other: "Usage") -> "Usage":
        """Of both."""
        return Usage(
            self.full_bytes + other.full_bytes,
            self.live_bytes + other.live_bytes,
            self.allocated_bytes + other.allocated_bytes,
            max(self.most, other.most),
            self.entries + other.entries,
            self.heads + other.heads,
        )

    def numbers(self) -> dict[str, float]:
        """By name of GAUGES."""
        return {
            "full_bytes": self.full_bytes,
            "live_bytes": self.live_bytes,
            "allocated_bytes": self.allocated_bytes,
            "compression_ratio": self.full_bytes / self.allocated_bytes if self.allocated_bytes else 1.0,
            "head_skew": self.most * self.heads / self.entries if self.entries else 1.0,
        }


@dataclass
class Stats(KVConnectorStats):
    """Numbers by name: gauges as last seen, counters since then."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "Stats":
        """This, and then the other."""
        counted = {name: self.data.get(name, 0) + other.data.get(name, 0) for name in COUNTERS}
        return Stats(self.data | other.data | counted)

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        shown = {name: value for name, value in self.data.items() if name in ("compression_ratio", "head_skew")}
        return {name: round(float(value), 2) for name, value in shown.items()}

    def is_empty(self) -> bool:
        return not self.data


class Metrics(KVConnectorPromMetrics):
    """kvpleat_compression_ratio and so on, one of each engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        for old in list(REGISTRY._collector_to_names):  # of an engine before this one: vLLM replaces its own as well
            if getattr(old, "_name", "").startswith("kvpleat_"):
                REGISTRY.unregister(old)
        kinds = [(GAUGES, metric_types[Gauge]), (COUNTERS, metric_types[Counter])]
        self._metrics = {
            name: self._of_engines(kind(name=f"kvpleat_{name}", documentation=said, labelnames=labelnames))
            for names, kind in kinds
            for name, said in names.items()
        }

    def _of_engines(self, metric: Any) -> dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in the data of `Stats`."""
        for name, value in transfer_stats_data.items():
            metric = self._metrics[name][engine_idx]
            if name in GAUGES:
                metric.set(value)
            else:
                metric.inc(value)
