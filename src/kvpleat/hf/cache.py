"""The Cache that transformers sees: logical lengths on the outside, a PagedKVCache and the progress of each row
inside."""

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvpleat.accounting import MemoryReport, tensor_bytes
from kvpleat.cache.paged import PagedKVCache
from kvpleat.errors import CacheError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from kvpleat.hf.attach import Pleated


class PleatedLayer(CacheLayerMixin):
    """One compressed layer, as transformers sees it: `update` hands the new keys and values on to the attention
    function."""

    is_sliding = False

    def __init__(self, cache: "PleatedCache") -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # a cycle would keep the pages until Python's collector runs

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns() + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns()

    def _columns(self) -> int:
        cache = self._cache()
        return 0 if cache is None else cache.columns

    def get_max_length(self) -> int:
        return -1


class PleatedCache(Cache):
    """A compressed cache, to be passed as `cache` (before transformers 5.24: `past_key_values`) call after call.

    Made by `Pleated.new_cache()`.

    Attributes:
        columns: tokens seen, padding included: the length that transformers counts.
        positions: tokens seen by each row, padding left out (empty before the first call).
        kv: the entries, or None before the first call.
    """

    def __init__(self, pleated: "Pleated") -> None:
        sliding = pleated.facts.sliding
        layers: list[CacheLayerMixin] = [
            DynamicSlidingWindowLayer(sliding_window=sliding[i]) if i in sliding else PleatedLayer(self)
            for i in range(len(pleated.facts.layers) + len(sliding))
        ]
        super().__init__(layers=layers)
        self.pleated = pleated
        self.kv: PagedKVCache | None = None
        self.columns = 0
        self.positions: list[int] = []
        self.last_moments: list[int] = []  # per row: the last moment of compression, prompt ends included
        self.shares: list[list[float]] = []  # per row: share of each layer after the last competition between layers
        self.prompt_end: int | None = None  # columns at which the declared prompt ends
        self.prompt_open = False  # prompt tokens were fed whose end nobody declared
        self.decoding = False  # known tokens are fed as if they had been generated
        self.interrupted = False  # a forward began and did not finish

    # ---- what users call

    def report(self) -> MemoryReport:
        """Memory of this cache now."""
        facts = self.pleated.facts
        untouched = tensor_bytes(
            *(
                t
                for i in facts.sliding
                if self.layers[i].is_initialized
                for t in (self.layers[i].keys, self.layers[i].values)
            )
        )
        if self.kv is None:
            shape = facts.shape
            return MemoryReport(0, 0, 0, 0, 0, torch.zeros(shape.num_layers, shape.num_kv_heads), 0)
        return self.kv.memory(sum(self.positions), untouched)

    def expect_prompt(self, columns: int) -> None:
        """Declare where the prompt that is being fed ends: at `columns` tokens of cache length, padding included.

        AttentionScore compresses there. Without a declaration the prompt ends where the first single token follows.
        """
        if columns <= self.columns:
            raise OptionError(
                f"The prompt is declared to end at {columns} tokens and the cache has already seen {self.columns}, so "
                "nothing would be fed. Pass the whole conversation so far plus at least one new token."
            )
        self.prompt_end = columns

    def fork(self) -> "PleatedCache":
        """An independent copy: the two go on separately. Costs as many bytes again."""
        self.check_usable()
        twin = PleatedCache(self.pleated)
        if self.kv is not None:
            twin.kv = self.kv.fork()
        twin.set_progress(self.progress())
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            if isinstance(mine, DynamicSlidingWindowLayer) and mine.is_initialized:
                theirs.lazy_initialization(mine.keys, mine.values)
                theirs.keys, theirs.values = mine.keys.clone(), mine.values.clone()
                theirs.cumulative_length = mine.cumulative_length
        self.pleated.remember(twin)
        return twin

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file; an existing file is replaced only once the new one is complete.

        Raises:
            CacheFileError: the file could not be written (a full disk, say); nothing is left behind.
        """
        from kvpleat.hf.snapshot import save

        self.check_usable()
        save(self, Path(path))

    def trim(self) -> int:
        """Give the memory of the pool's free pages back to the system. Returns the bytes given back."""
        return self.kv.pool.trim() if self.kv is not None else 0

    def release(self) -> None:
        """Return every page to the pool now, rather than when the cache is garbage collected."""
        if self.kv is not None:
            self.kv.release()

    # ---- progress, for fork, save and load

    def progress(self) -> dict[str, Any]:
        """Everything beside the tensors, JSON-ready."""
        names = ("columns", "positions", "last_moments", "shares", "prompt_end", "prompt_open")
        return {name: getattr(self, name) for name in names}

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Inverse of `progress`; lists are copied."""
        for name, value in progress.items():
            setattr(
                self, name, [list(x) if isinstance(x, list) else x for x in value] if isinstance(value, list) else value
            )

    def start(self, num_rows: int) -> PagedKVCache:
        """The entries, made on the first call for `num_rows` rows; later calls must bring as many."""
        if self.kv is None:
            facts = self.pleated.facts
            policy, pool = self.pleated.policy, self.pleated.pool
            self.kv = PagedKVCache(pool, num_rows, policy.observation_window, facts.rotary, policy.delayed)
            self.positions, self.last_moments = [0] * num_rows, [0] * num_rows
            self.shares = [[1 / facts.shape.num_layers] * facts.shape.num_layers for _ in range(num_rows)]
        if self.kv.num_rows != num_rows:
            raise CacheError(
                f"The cache holds {self.kv.num_rows} rows and {num_rows} were passed, so entries would go to the wrong "
                "sequence. Pass the same batch, or start a new cache: pleated.new_cache()."
            )
        return self.kv

    def check_usable(self) -> None:
        """Raise CacheError where the cache cannot go on."""
        if self.interrupted:
            raise CacheError(
                "A forward with this cache was interrupted, so its layers hold different tokens. Fork before a risky "
                "call, or start again with pleated.new_cache()."
            )
        if self.kv is not None and self.kv.closed:
            raise CacheError("This cache was released. Start a new one: pleated.new_cache().")

    # ---- what transformers calls

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedError(
            "Entries that were merged or evicted cannot be brought back, so the cache cannot be cropped. Assisted "
            "generation needs that: call generate without assistant_model or prompt_lookup_num_tokens; to go back in "
            "a chat, fork() first."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UnsupportedError(
            "Beam search reorders the rows of the cache at every step, which kvpleat does not do. Use num_beams=1, "
            "greedy or with do_sample=True."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError(
            "Repeating the rows of a compressed cache is not supported. Repeat the prompts, or fork()."
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UnsupportedError("Selecting rows of a compressed cache is not supported. Start a cache for those rows.")

    def reset(self) -> None:
        """Empty the cache, for use from the start."""
        self.release()
        fresh = PleatedCache(self.pleated)
        self.layers: list[CacheLayerMixin] = list(fresh.layers)
        self.kv, self.interrupted = None, False
        for layer in self.layers:
            if isinstance(layer, PleatedLayer):
                layer._cache = weakref.ref(self)
        self.set_progress(fresh.progress())
