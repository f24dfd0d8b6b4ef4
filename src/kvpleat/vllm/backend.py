"""vLLM's attention interface over kvpleat's cache: a batch of vLLM's, through the kernels of kvpleat's own engine.

A batch has requests with one new token first, then those with more. In a CUDA graph only the first kind occurs; what
its kernels need of positions and seats is computed by the graph itself, in the first layer, from tensors that vLLM
keeps in place. So the host does nothing in a step that is replayed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvpleat.kernels import decode, extend, prefill, reference, update
from kvpleat.kernels.decode import Work
from kvpleat.kernels.extend import Chunks
from kvpleat.kernels.reference import Turn
from kvpleat.types import PAGE_SIZES
from kvpleat.vllm.ledger import Changes
from kvpleat.vllm.memory import Memory


@dataclass
class Singles:
    """One new token of each of the first requests: seats, positions [n] int32, active [n] bool, and what follows."""

    seats: Tensor
    positions: Tensor
    active: Tensor
    work: Work
    turn: Turn | None


@dataclass
class PleatedMetadata(AttentionMetadata):
    """A step, as all layers see it.

    Args:
        num_tokens: that are none of vLLM's padding. count: requests with one new token.
        first_blocks: [n] of all requests. lengths: [n] int32, with the new tokens.
        starts, sizes: of the other requests' new tokens, on the host.

    Attributes:
        singles, chunks: made in the first layer.
    """

    num_tokens: int
    count: int
    first_blocks: Tensor
    lengths: Tensor
    starts: list[int]
    sizes: list[int]
    singles: Singles | None = None
    chunks: Chunks | None = None


class PleatedBuilder(AttentionMetadataBuilder[PleatedMetadata]):
    """Makes metadata of vLLM's."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PleatedMetadata:
        """See `PleatedMetadata`."""
        common = common_attn_metadata
        count, others, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        starts, sizes = [], []
        if others:
            ends = common.query_start_loc_cpu[count : common.num_reqs + 1]
            sizes = (ends[1:] - ends[:-1]).tolist()
            lengths = common.seq_lens_cpu_upper_bound  # exact where there is no speculative decoding
            if lengths is None:
                lengths = common.seq_lens.cpu()
            starts = [n - size for n, size in zip(lengths[count : common.num_reqs].tolist(), sizes, strict=True)]
        return PleatedMetadata(
            common.num_actual_tokens, count, common.block_table_tensor[:, 0], common.seq_lens, starts, sizes
        )


class PleatedImpl(AttentionImpl[PleatedMetadata]):
    """Attention of one layer. `join` says which one of which cache."""

    memory: Memory | None = None
    place = -1
    is_last = False

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
                 alibi_slopes: Any = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
                 logits_soft_cap: float | None = None, *args: Any, **kwargs: Any) -> None:  # fmt: skip
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.softcap = kv_cache_dtype, logits_soft_cap or None

    def join(self, memory: Memory, place: int, is_last: bool) -> None:
        """Become layer number `place` of a worker's cache."""
        self.memory, self.place, self.is_last = memory, place, is_last

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PleatedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output: [T, Q, D]; key, value: [T, H, D], rotated; T with padding. In vLLM's rehearsals there is no
        metadata, or nobody sits anywhere."""
        memory, meta = self.memory, attn_metadata
        if meta is None or memory is None:
            return output.zero_()
        if self.place == 0:
            _prepare(memory, meta)
        n, end = meta.count, meta.num_tokens
        if n:
            output[:n] = self._single(memory, meta, query[:n], key[:n], value[:n])
        if meta.chunks is not None:
            output[n:end] = self._chunked(memory, meta.chunks, query[n:end], key[n:end], value[n:end], n)
            if self.is_last:
                update.give_back(memory.pool)
        elif end > n:
            output[n:end].zero_()
        return output

    def _single(self, memory: Memory, meta: PleatedMetadata, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        it, pool, place = meta.singles, memory.pool, self.place
        assert it is not None, "the first layer did not run"
        said = memory.said[:, : q.shape[0]]
        update.step(pool, place, it.positions, it.active, k, v, said, it.turn, seats=it.seats)
        return decode.attend(
            q, pool.key, pool.value, pool.page_table[:, place], pool.lengths[:, place], it.work.layer(place),
            self.scale, pool.log_weight, self.softcap, active=it.active, seats=it.seats,
        )  # fmt: skip

    def _chunked(self, memory: Memory, chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        said = memory.said[:, start : start + q.shape[1]].transpose(1, 2)
        seen = extend.extend(memory.pool, self.place, chunks, k, v, said)
        out = prefill.attend(q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, self.scale, self.softcap)
        return out.transpose(0, 1)


def _prepare(memory: Memory, meta: PleatedMetadata) -> None:
    """What all layers of a step share; pages are taken here."""
    n, delay = meta.count, memory.delay
    meta.singles = meta.chunks = None
    seats = memory.seats(meta.first_blocks)
    if n:
        positions, mine = meta.lengths[:n] - 1, seats[:n]
        active = (positions >= 0) & (mine >= 0)
        work = memory.work(n)
        decode.plan(work, memory.pool.lengths, active, seats=mine)
        update.reserve_token(memory.pool, positions, active, seats=mine)
        turn = None
        if delay.merges and memory.rotary is not None:
            turn = reference.turn(positions - delay.tokens, memory.rotary, torch.float32)
        meta.singles = Singles(mine, positions, active, work, turn)
    if meta.sizes and memory.live:
        chunks = extend.plan(memory.pool, seats[n : n + len(meta.sizes)], meta.starts, meta.sizes, memory.rotary)
        extend.reserve(memory.pool, chunks)
        meta.chunks = chunks


@torch.inference_mode()
def rehearse(memory: Memory) -> None:
    """Compile what chunks of prompts need, which vLLM's own rehearsals do not reach. Leaves the cache empty."""
    shape, start = memory.shape, 0
    for most in (48, 17):
        size = min(most, memory.said.shape[1])
        q = torch.zeros(shape.num_q_heads, size, shape.head_dim, dtype=shape.dtype, device=memory.device)
        k = torch.zeros(shape.num_kv_heads, size, shape.head_dim, dtype=shape.dtype, device=memory.device)
        said = memory.said[:, :size].transpose(1, 2)
        chunks = extend.plan(memory.pool, [0], [start], [size], memory.rotary)
        extend.reserve(memory.pool, chunks)
        seen = extend.extend(memory.pool, 0, chunks, k, k, said)
        prefill.attend(q, seen.keys, seen.values, chunks.rows, seen.past, seen.rule, 1.0, None)
        update.give_back(memory.pool)
        start += size
    memory.begin_step(Changes([0]), live=False)


class PleatedBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages of these sizes."""
        return list(PAGE_SIZES)

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows: it looks it up."""
        return "CUSTOM" if current_platform.is_cuda_alike() else "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[PleatedImpl]:
        return PleatedImpl

    @staticmethod
    def get_builder_cls() -> type[PleatedBuilder]:
        return PleatedBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Bytes; see `cache.PleatedSpec`. vLLM up to 0.27 asks."""
        return num_blocks, num_kv_heads, block_size, head_size
