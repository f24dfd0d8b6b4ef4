"""The nouns that all layers of kvpleat share, and the one legend for tensor shapes.

Shape legend, used in every signature of the package:

    L  compressed layers          R  rows (sequences of a batch)      H  KV heads of a layer
    G  query heads per KV head    Q  query heads, Q = G * H           T  new tokens of a call
    N  entries of a stream, padded to the longest                     D  head dimension
    P  pages of the pool          S  entries of a page                W  observed queries
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.errors import OptionError

PAGE_SIZES = (16, 32)
ENTRY_FIELDS = {"position": torch.int32, "log_weight": torch.float32, "score": torch.float32}
# The option `bits` -> bits of a number of a key and of a value. Keys need more of them: see docs/log.md.
ENTRY_BITS = {8: (8, 8), 6: (8, 4), 4: (4, 4)}
# Of scale and zero. It has float32's range, so nothing overflows; and its few digits only make steps a little wider,
# because codes are computed against the stored scale and zero.
SCALE_DTYPE = torch.bfloat16


def check_bits(bits: int | None) -> None:
    """Refuse what entries cannot be stored in: anything but None and the keys of ENTRY_BITS."""
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or bits not in ENTRY_BITS):
        raise OptionError(
            f"bits={bits}: entries are stored in the model's dtype (None) or in {', '.join(map(str, ENTRY_BITS))} bits "
            "a number, keys and values together. Pass one of them, bits=8 for almost no loss."
        )


class Phase(StrEnum):
    """What the tokens of a call are: prompt tokens, or tokens generated one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"


class Marks(NamedTuple):
    """What gates decided about T tokens: [..., T] each, any leading dimensions.

    marked: bool, whether the entry before this one leaves (m). log_carry: float32, log of c where it left something
    behind, -inf for "nothing"; None: always nothing. weight: float32 (b); None: 1.
    """

    marked: Tensor
    log_carry: Tensor | None = None
    weight: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Marks":
        """The same change to all that is there."""
        log_carry, weight = (None if x is None else change(x) for x in (self.log_carry, self.weight))
        return Marks(change(self.marked), log_carry, weight)


@dataclass(frozen=True)
class Delay:
    """What becomes of marked entries, and when; see kvpleat.policies.learned for the recurrence.

    Args:
        tokens: tokens that a marked entry stays visible for after its own.
        merges: whether it leaves something behind, in the entry after it.
        weighs: whether members of a group count differently.
        log_size: whether the log of a group's size counts in attention.
        look_back: members of a group that count, the newest ones; None: all.
        sinks: first entries of a row that always stay as they are. Queries with nothing to look for look there, so one
            of them that leaves changes all that follows.
    """

    tokens: int
    merges: bool = False
    weighs: bool = False
    log_size: bool = False
    look_back: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class KVShape:
    """Everything about a model's KV memory that its weights fix.

    Args:
        num_layers: layers whose entries live in pages (L); sliding-window layers are not among them.
        num_kv_heads: KV heads of a layer (H).
        num_q_heads: query heads of a layer (Q), a multiple of H.
        head_dim: channels of a key or value (D).
        dtype: of keys and values.
        page_size: entries of one page (S), 16 or 32.
        fields: per-entry side arrays that the policy needs, of ENTRY_FIELDS.
        bits: bits of a stored number, a mean over keys and values: one of ENTRY_BITS; None: keys and values in `dtype`.
    """

    num_layers: int
    num_kv_heads: int
    num_q_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int = 16
    fields: tuple[str, ...] = ()
    bits: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.bits is not None and self.head_dim % 2:
            raise OptionError(
                f"bits={self.bits} with {self.head_dim} channels: codes of 4 bits are stored in pairs and entries are "
                "mixed in pairs of channels, so there must be an even number of them. Pass bits=None for this model."
            )
        if self.page_size not in PAGE_SIZES:
            raise OptionError(
                f"page_size={self.page_size}: the kernels know pages of {PAGE_SIZES} entries. Pass 16 (less waste) or "
                "32."
            )
        if self.num_q_heads % self.num_kv_heads:
            raise OptionError(
                f"{self.num_q_heads} query heads do not divide into groups over {self.num_kv_heads} KV heads."
            )

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a page stores of each entry: the shape and dtype of "key", "value", and of the side arrays.

        With `bits`, key and value are codes, and each has its steps: see `kernels.reference.quantize`.
        """
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for i, name in enumerate(("key", "value")):
            if self.bits is None:
                stored[name] = (self.head_dim,), self.dtype
            else:
                stored[name] = (self.head_dim * ENTRY_BITS[self.bits][i] // 8,), torch.uint8
                stored[f"{name}_steps"] = (2,), SCALE_DTYPE
        return stored | {name: ((), ENTRY_FIELDS[name]) for name in self.fields}

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_streams(self) -> int:
        """Streams of one row: L * H."""
        return self.num_layers * self.num_kv_heads


@dataclass(frozen=True)
class Rotary:
    """How a model rotates its keys, so that a key can be moved to another position.

    Args:
        inv_freq: [r / 2] radians per position of each rotated channel pair, float32. Channels c and c + r / 2 form a
            pair (the half-split layout of Llama, Qwen, Mistral and Gemma); channels from r on are not rotated.
    """

    inv_freq: Tensor


@dataclass(frozen=True)
class PolicyInput:
    """What a policy sees of one layer of one row at a moment of compression. Entries are in order of position.

    Args:
        position: tokens seen by the row so far.
        layer: index of the layer among the L compressed ones.
        shape: the KV shape of the model.
        positions: [H, N] position of each entry, int32.
        live: [H, N] False where a stream is shorter than N.
        keys, values: [H, N, D].
        log_weights: [H, N] float32, or None where the policy keeps no weights.
        scores: [H, N] float32 carried from the last moment, NaN for entries not scored yet; or None.
        queries: [Q, W, D] the last queries of the row, rotated; or None.
        query_positions: [W] their positions; or None.
        samples: [Q, M, D] queries sampled since the last moment, rotated; or None.
        sample_positions: [M] their positions; or None.
        last_moment: position of the last moment, 0 if there was none.
        scale: factor on q.k before the softmax.
        softcap: the model's logit soft cap, or None.
        rotary: how keys rotate, or None where they do not.
        layer_share: share of the row's pages that this layer held after the last competition between layers.
        competes: the policy's `squeeze` follows when all layers have come to this moment.
    """

    position: int
    layer: int
    shape: KVShape
    positions: Tensor
    live: Tensor
    keys: Tensor
    values: Tensor
    log_weights: Tensor | None
    scores: Tensor | None
    queries: Tensor | None
    query_positions: Tensor | None
    samples: Tensor | None
    sample_positions: Tensor | None
    last_moment: int
    scale: float
    softcap: float | None
    rotary: Rotary | None
    layer_share: float
    competes: bool


@dataclass(frozen=True)
class Decision:
    """What is to become of the entries of one layer of one row. Pure data: the cache applies it.

    Args:
        keep: [H, N] entries that survive.
        merge_into: [H, N] int64 index of the surviving entry that an entry merges into, or its own index; entries
            that are neither kept nor merged into a survivor are evicted. None: no merging.
        share: [H, N] float32 share of each member in the weighted mean of its group; needed with merge_into.
        log_weights: [H, N] float32 new log-weights of the survivors; needed with merge_into.
        scores: [H, N] float32 scores to carry to the next moment, or None.
        reserve: further entries per stream to allocate pages for now, so that the stream stays in one piece.
    """

    keep: Tensor
    merge_into: Tensor | None = None
    share: Tensor | None = None
    log_weights: Tensor | None = None
    scores: Tensor | None = None
    reserve: int = 0
