"""What the scheduler tells the workers before a step, and they it after: vLLM's connector interface, used as a wire.

No entry travels. Scheduler to workers: seats that end and begin, and how far each request is computed. Workers to
scheduler: the blocks that requests hold, read from the device without waiting for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvpleat.errors import CacheError
from kvpleat.vllm.backend import rehearse
from kvpleat.vllm.cache import PleatedSpec, check_pool
from kvpleat.vllm.ledger import Changes, Ledger, Report, ledgers
from kvpleat.vllm.metrics import Metrics, Stats, Usage

if TYPE_CHECKING:
    from kvpleat.vllm.memory import Memory


@dataclass
class StepMeta(KVConnectorMetadata):
    """changes: of seats. fed: (request, seat, birth, tokens after the step) of all that a step computes. has_prompts:
    some have more than one new token."""

    changes: Changes
    fed: list[tuple[str, int, int, int]]
    has_prompts: bool


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """What workers say about requests, and about their memory."""

    said: dict[str, Report]
    usage: Usage

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Reports":
        """Of several workers."""
        assert isinstance(other, Reports)
        said = dict(self.said)
        for request, report in other.said.items():
            said[request] = said[request] | report if request in said else report
        return Reports(said, self.usage | other.usage)


class KvpleatConnector(KVConnectorBase_V1, SupportsHMA):
    """See above; one object in the scheduler, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._ledger: Ledger | None = None
        self._memory: Memory | None = None
        self._usage: Usage | None = None
        self._workers: int = vllm_config.parallel_config.world_size
        self._spec: PleatedSpec | None = None
        if role == KVConnectorRole.SCHEDULER:
            specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
            (self._spec,) = [spec for spec in specs if isinstance(spec, PleatedSpec)]
            check_pool(self._spec, kv_cache_config.num_blocks, vllm_config.model_config.max_model_len)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a request that ends hands nothing on."""
        return False

    # ---- in the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool's ledger, which the cache manager made."""
        self._ledger = ledgers[gpu_block_pool]
        self._ledger.workers = self._workers

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """None are loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The manager did it."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers need to know of a step."""
        assert self._ledger is not None, "vLLM has not bound its block pool"
        cached, sizes = scheduler_output.scheduled_cached_reqs, scheduler_output.num_scheduled_tokens
        computed = {x.req_id: x.num_computed_tokens for x in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        fed = []
        for request, size in sizes.items():
            account = self._ledger[request]
            fed.append((request, account.seat, account.birth, computed[request] + size))
        return StepMeta(self._ledger.take_changes(), fed, any(size > 1 for size in sizes.values()))

    def update_connector_output(self, connector_output: Any) -> None:
        """What workers reported."""
        said = connector_output.kv_connector_worker_meta
        if isinstance(said, Reports) and self._ledger is not None:
            self._ledger.report(said.said.items())
            self._usage = said.usage

    def get_kv_connector_stats(self) -> Stats | None:
        """For Prometheus; in the scheduler, which alone knows what is charged."""
        if self._ledger is None or self._spec is None or self._usage is None:
            return None
        usage, self._usage = self._usage, None
        blocks, freed = self._ledger.charged()
        counted = {"charged_bytes": blocks * self._spec.page_size_bytes * self._workers, "freed_blocks": freed}
        return Stats(usage.numbers() | counted | {"forced_evictions": 0})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """Stats of numbers that travelled."""
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> Metrics:
        """What Prometheus asks."""
        return Metrics(*args, **kwargs)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Blocks can be freed at once."""
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Blocks can be freed at once."""
        return False, None

    # ---- in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The memory that vLLM allocated.

        Raises:
            CacheError: it is a second one, and the model of the first would go on to be asked.
        """
        if self._memory is not None:
            raise CacheError(
                "vLLM gave a second KV cache to one connector, which knows the first model alone, so answers would be "
                "wrong: an engine that failed to start has left it in this process. Start vLLM in a new process."
            )
        context = self._vllm_config.compilation_config.static_forward_context
        for name, tensor in kv_caches.items():
            memory = getattr(context[name].impl, "memory", None)
            if memory is not None and self._memory is None:
                self._memory = memory
                memory.bind(tensor)
                if memory.device.type == "cuda":
                    rehearse(memory)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before a step: empty rows that ended, and seat those that begin."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        if self._memory is not None:
            self._memory.begin_step(connector_metadata.changes, bool(connector_metadata.fed))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """After a step's forward was launched: ask the device what rows hold now."""
        meta = self._connector_metadata
        if self._memory is not None and isinstance(meta, StepMeta):
            self._memory.end_step(meta.fed, meta.has_prompts)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What became known of earlier steps, and perhaps of this one."""
        if self._memory is None:
            return None
        said: dict[str, Report] = {}
        latest = None
        for seated, blocks, usage in self._memory.known():
            said |= _reports(seated, blocks)
            latest = usage
        return None if latest is None else Reports(said, latest)


def _reports(seated: Iterable[tuple[str, int, int, int]], blocks: list[int]) -> dict[str, Report]:
    """Of one step. blocks: by seat."""
    return {request: Report(birth, tokens, blocks[seat]) for request, seat, birth, tokens in seated}
