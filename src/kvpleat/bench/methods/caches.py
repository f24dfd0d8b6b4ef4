"""transformers' own caches as methods: what users have without kvpleat. The model stays as it is."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from kvpleat.accounting import full_bytes, storage_bytes
from kvpleat.bench.methods.base import Memory, Method, Session
from kvpleat.errors import OptionError
from kvpleat.hf.families import cache_argument, describe
from kvpleat.hf.models import LoadedModel

QUANTO_BITS = (2, 4)
HQQ_BITS = (1, 2, 3, 4, 8)
PIECE = 32  # known tokens fed at a time where the cache's content depends on how they were fed


class CacheSession(Session):
    """A transformers cache and the model it belongs to.

    Args:
        piece: tokens of `decode` fed at a time; None: all of them.
    """

    def __init__(self, model: Any, cache: Any, piece: int | None = None, chunk: int | None = None) -> None:
        self.model, self.cache, self.piece, self.chunk = model, cache, piece, chunk
        self.facts = describe(model)
        self.tokens = 0

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        for part in ids.split(self.chunk or ids.shape[1], dim=1):
            logits: Tensor = self.model(part, **self._cache(), logits_to_keep=1).logits[:, -1]
        self.tokens += ids.numel()
        return logits

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        parts = ids.split(self.piece or ids.shape[1], dim=1)
        logits = [self.model(part, **self._cache()).logits for part in parts]
        self.tokens += ids.numel()
        return torch.cat(logits, dim=1)

    def _cache(self) -> dict[str, Any]:
        return {cache_argument(self.model): self.cache}

    def fork(self) -> "CacheSession":
        cache = copy.copy(self.cache)  # transformers' layers replace their tensors and never write into them
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        twin = CacheSession(self.model, cache, self.piece, self.chunk)
        twin.tokens = self.tokens
        return twin

    def memory(self) -> Memory:
        held = storage_bytes(self.cache)
        return Memory(full_bytes(self.facts.shape, self.tokens), held, held)

    def close(self) -> None:
        self.cache = None


class Dynamic(Method):
    """DynamicCache: every entry, exact. What everything else is compared with."""

    spec = "dynamic"
    label = "DynamicCache"
    family = "transformers"
    storage = "contiguous"
    ratio = None

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def open(self, loaded: LoadedModel) -> CacheSession:
        return CacheSession(loaded.model, DynamicCache(config=loaded.model.config))


class Quantized(Method):
    """QuantizedCache: every entry, in fewer bits; the latest `residual` tokens exact.

    Args:
        bits: per number.
        backend: "quanto" (optimum-quanto) or "hqq".
        group: numbers that share a scale.
        residual: latest tokens that stay exact.
    """

    family = "transformers"
    storage = "quantized"
    ratio = None

    def __init__(self, spec: str, bits: int = 4, backend: str = "quanto", group: int = 64, residual: int = 128) -> None:
        known = {"quanto": QUANTO_BITS, "hqq": HQQ_BITS}
        if backend not in known or bits not in known[backend]:
            raise OptionError(
                f"quantized:bits={bits},backend={backend}: transformers knows quanto with {QUANTO_BITS} bits and hqq "
                f"with {HQQ_BITS}. Pass one of these."
            )
        self.spec, self.bits, self.backend = spec, bits, backend
        self.label = f"QuantizedCache {bits} bit" + ("" if backend == "quanto" else f" {backend}")
        self.options = {"bits": bits, "backend": backend, "group": group, "residual": residual}

    def open(self, loaded: LoadedModel) -> CacheSession:
        try:
            cache = QuantizedCache(
                backend=self.backend,
                config=loaded.model.config,
                nbits=self.bits,
                axis_key=0 if self.backend == "quanto" else 1,
                axis_value=0 if self.backend == "quanto" else 1,
                q_group_size=self.options["group"],
                residual_length=self.options["residual"],
            )
        except ImportError as error:
            package = "optimum-quanto" if self.backend == "quanto" else "hqq"
            raise OptionError(
                f"{self.spec} needs the package {package}, which is not installed. Run: pip install {package}"
            ) from error
        return CacheSession(loaded.model, cache, piece=PIECE)
