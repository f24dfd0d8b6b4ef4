"""One generation, timed and measured: with a compressed cache, or with transformers' own."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from kvpleat import compress
from kvpleat.accounting import MemoryReport, tensor_bytes
from kvpleat.cli.options import Decoding
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import cache_argument, describe
from kvpleat.hf.models import LoadedModel
from kvpleat.policies import Policy

Prefilling = Callable[[Callable[[], int] | None, int], AbstractContextManager[Callable[[], None]]]
"""Shows a prefill: (what tells the tokens done so far, or None for a prefill in one piece; tokens in all) -> a context
whose value is called at the first token."""


@dataclass(frozen=True)
class Answer:
    """What one generation gave and took.

    Args:
        text: without special tokens.
        tokens: the generated ids, an end-of-sequence token included.
        prompt_tokens: length of the prompt.
        memory: of the cache at the end.
        prefill_s: from the start to the first generated token.
        decode_s: from the first generated token to the last.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    memory: MemoryReport
    prefill_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first one; None where there was only one."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None

    def kv(self) -> dict[str, Any]:
        """Memory, JSON-ready."""
        report = self.memory.to_dict()
        names = ("full_bytes", "live_bytes", "allocated_bytes", "peak_allocated_bytes", "compression_ratio")
        return {name: report[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the kept entries, JSON-ready."""
        rate = self.decode_tokens_per_s
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "kv": self.kv(),
            "time": {
                "prefill_s": round(self.prefill_s, 3),
                "decode_s": round(self.decode_s, 3),
                "decode_tokens_per_s": None if rate is None else round(rate, 2),
            },
        }


class CallbackStreamer(TextStreamer):
    """Hands text on as soon as whole words are formed, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], on_first: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stamps: list[float] = []
        self._on_text = on_text
        self._on_first = on_first

    def put(self, value: Tensor) -> None:
        """Take a token, or the prompt, which generate() passes first."""
        if not self.next_tokens_are_prompt:
            if not self.stamps:
                self._on_first()
            self.stamps.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand the next words on."""
        if text:
            self._on_text(text)


def answer_compressed(
    loaded: LoadedModel,
    policy: Policy,
    ids: Tensor,
    decoding: Decoding,
    on_text: Callable[[str], None],
    prefilling: Prefilling,
) -> Answer:
    """Generate with a fresh compressed cache; ids [1, T]."""
    with compress(loaded.model, policy) as pleated:
        return continue_cache(loaded, pleated.new_cache(), ids, decoding, on_text, prefilling)


def answer_full(
    loaded: LoadedModel, ids: Tensor, decoding: Decoding, on_text: Callable[[str], None], prefilling: Prefilling
) -> Answer:
    """Generate with transformers' own cache and attention, as without kvpleat; ids [1, T]."""
    cache = DynamicCache(config=loaded.model.config)
    return continue_cache(loaded, cache, ids, decoding, on_text, prefilling)


def continue_cache(
    loaded: LoadedModel,
    cache: PleatedCache | DynamicCache,
    ids: Tensor,
    decoding: Decoding,
    on_text: Callable[[str], None],
    prefilling: Prefilling,
) -> Answer:
    """Feed ids [1, T] after what the cache has seen, and generate. The last new token is not fed to the cache."""
    seen, total = cache.get_seq_length(), ids.shape[1]
    ids = ids.to(loaded.model.device)
    mask = torch.ones(1, seen + total, dtype=torch.long, device=ids.device)
    pad = loaded.tokenizer.pad_token_id
    torch.manual_seed(decoding.seed)
    pieces = decoding.prefill_chunk is not None and decoding.prefill_chunk < total
    start = time.perf_counter()
    with prefilling((lambda: cache.get_seq_length() - seen) if pieces else None, total) as done:
        if seen and decoding.prefill_chunk is not None:
            ids = _feed_but_last(loaded, cache, ids, decoding.prefill_chunk)
            decoding = replace(decoding, prefill_chunk=None)
        streamer = CallbackStreamer(loaded.tokenizer, on_text, done)
        out = loaded.model.generate(
            ids,
            attention_mask=mask,
            streamer=streamer,
            **{cache_argument(loaded.model): cache},
            pad_token_id=loaded.tokenizer.eos_token_id if pad is None else pad,
            **decoding.generate_options(),
        )
    tokens = out[0, ids.shape[1] :].tolist()
    return Answer(
        text=str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)),
        tokens=tokens,
        prompt_tokens=total,
        memory=cache.report() if isinstance(cache, PleatedCache) else full_memory(loaded, cache),
        prefill_s=streamer.stamps[0] - start,
        decode_s=streamer.stamps[-1] - streamer.stamps[0],
    )


@torch.no_grad()
def _feed_but_last(loaded: LoadedModel, cache: PleatedCache | DynamicCache, ids: Tensor, size: int) -> Tensor:
    """Feed ids [1, T] in pieces of `size`, all but the last piece, which is returned for generate().

    generate(prefill_chunk_size=...) does the same, but takes every cache for an empty one in transformers 5.17.
    """
    pieces: tuple[Tensor, ...] = ids.split(size, dim=1)
    if isinstance(cache, PleatedCache):
        cache.expect_prompt(cache.columns + ids.shape[1])
    for piece in pieces[:-1]:
        loaded.model(piece, logits_to_keep=1, **{cache_argument(loaded.model): cache})
    return pieces[-1]


def full_memory(loaded: LoadedModel, cache: DynamicCache) -> MemoryReport:
    """The meter for transformers' own cache: the bytes of its tensors, nothing saved."""
    facts = describe(loaded.model)
    held = tensor_bytes(*(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))
    tokens = cache.get_seq_length()
    kept = torch.full((facts.shape.num_layers, facts.shape.num_kv_heads), float(tokens))
    return MemoryReport(held, held, held, held, 0, kept, tokens)


def agreement(full: list[int], compressed: list[int]) -> float:
    """Share of equal tokens: places where both have the same token, over the length of the longer one."""
    longest = max(len(full), len(compressed))
    same = sum(a == b for a, b in zip(full, compressed, strict=False))
    return same / longest if longest else 1.0
