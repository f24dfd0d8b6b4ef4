"""vLLM's view of the cache: what a block is, and what requests are charged. Registered with vLLM when imported."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvpleat.errors import OptionError
from kvpleat.vllm.ledger import Ledger, ledgers


@dataclass(frozen=True, kw_only=True)
class PleatedSpec(FullAttentionSpec):
    """The cache of all layers of a worker, as one layer's.

    A block is one page of each of the worker's streams: num_kv_heads is the number of streams, head_size the bytes of
    an entry, dtype uint8. So a request is charged what its streams need on average, not what the longest one does.

    Args:
        waiting, ratio: a request of n tokens is expected to need waiting + (n - waiting) / ratio entries a stream.
        seats: requests that run at a time. chunk: tokens that a step may compute.
    """

    waiting: int = field(default=0)
    ratio: float = field(default=1.0)
    seats: int = field(default=1)
    chunk: int = field(default=0)

    @property
    def state_content_size_bytes(self) -> int:
        """Bytes of an entry; vLLM from 0.28 on asks for it."""
        return int(self.head_size)

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of a block."""
        return int(self.num_kv_heads * self.block_size * self.head_size)

    @property
    def page_size_bytes(self) -> int:
        """Bytes of a block."""
        return int(self.real_page_size_bytes)

    @property
    def prefix_cacheable(self) -> bool:
        """False: a compressed request's pages do not lie at token positions."""
        return False

    def expected_blocks(self, tokens: int) -> int:
        """Blocks of a request of so many tokens, with half a page that streams leave empty on average, and one that is
        charged ahead."""
        waiting = min(tokens, self.waiting)
        entries = waiting + (tokens - waiting) / self.ratio
        block_size = int(self.block_size)
        return min(-(-tokens // block_size), int(entries / block_size + 0.5) + 2)

    def expected_peak(self, tokens: int) -> int:
        """Blocks of a request of so many tokens at most while it is computed: what its last chunk takes in full, and
        what is left of those before it."""
        last = min(tokens, self.chunk)
        whole, chunk = -(-tokens // int(self.block_size)), -(-last // int(self.block_size))
        return min(whole, chunk + (self.expected_blocks(tokens - last) if tokens > last else 0))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a request of the model's maximum length is expected to need."""
        return self.expected_blocks(int(vllm_config.model_config.max_model_len)) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec of a group."""
        assert all(spec == specs[0] for spec in specs), "specs of one cache differ"
        return specs[0]


class PleatedManager(FullAttentionManager):
    """Charges requests by a ledger. Blocks go back as soon as workers report that they are not needed, which vLLM's own
    managers never do: workers look at nothing but the first block's number, to find a request's seat."""

    def __init__(self, kv_cache_spec: PleatedSpec, block_pool: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        self._record_new_block_ids = False  # nobody may write to pages by the numbers of blocks
        self._spec = kv_cache_spec
        self.ledger = ledgers.setdefault(block_pool, Ledger(kv_cache_spec.seats, kv_cache_spec.block_size))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that are missing for so many tokens; those that are too many go back. Where vLLM asks whether a whole
        request would fit: what it is expected to need."""
        held = self.req_to_blocks.get(request_id, [])
        if kwargs.get("apply_admission_cap"):
            return max(0, self._spec.expected_peak(num_tokens) - len(held))
        needed = self.ledger.charge(request_id, num_tokens)
        if len(held) > needed + 1:
            self.block_pool.free_blocks(reversed(held[needed + 1 :]))
            self.ledger.held(request_id, needed + 1, freed=len(held) - needed - 1)
            del held[needed + 1 :]
        return max(0, needed - len(held))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Charge a request. Workers are told of its first blocks alone."""
        held = self.req_to_blocks[request_id]
        new = self.block_pool.get_new_blocks(max(0, self.ledger.charge(request_id, num_tokens) - len(held)))
        held.extend(new)
        begins = request_id not in self.ledger
        if begins:
            self.ledger.begin(request_id, held[0].block_id)
        self.ledger.held(request_id, len(held))
        return list(new) if begins else []

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request is finished or preempted; all ways to free its blocks lead here."""
        self.ledger.end(request_id)
        return list(super().pop_blocks_for_free(request_id))

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is shared between requests."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Never a hit."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None; vLLM up to 0.27 asks."""
        return 0


def check_pool(spec: PleatedSpec, num_blocks: int, max_tokens: int) -> None:
    """Refuse a pool in which one request could get stuck.

    Raises:
        OptionError: a request of the maximum length would not fit if its text did not compress at all.
    """
    needed = -(-max_tokens // spec.block_size) + 2
    if num_blocks < needed:
        raise OptionError(
            f"The KV cache has {num_blocks} blocks, and a request of max_model_len={max_tokens} tokens that does not "
            f"compress needs {needed}: it could never be finished. Lower --max-model-len to "
            f"{(num_blocks - 2) * spec.block_size} or give the cache more memory."
        )


KVCacheSpecRegistry._ensure_registered()  # vLLM's own are registered only while there are none
KVCacheSpecRegistry.register(PleatedSpec, manager_class=PleatedManager, uniform_type_base_spec=FullAttentionSpec)
