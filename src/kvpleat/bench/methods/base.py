"""What the judge needs of anything that holds a KV cache: feed a prompt, decode, fork, and say what memory it takes.

A method is a recipe ("attention:ratio=4"); a session is one cache made by it. Tasks and benchmarks speak to sessions
only, so that every method is asked the same questions in the same words, and none is asked which one it is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from kvpleat.hf.models import LoadedModel

STORAGES = {
    "contiguous": "tensors of one length for all heads",
    "pages": "pages per head, returned as they empty",
    "quantized": "contiguous tensors of fewer bits",
    "mask only": "the full cache; what is evicted is only masked, so no memory is saved",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one session now.

    Args:
        full_bytes: what an uncompressed cache holds for the same tokens.
        allocated_bytes: storage of the tensors that the cache really holds, side arrays and overhead included, found by
            walking them (and not by asking the method for its ratio).
        claimed_bytes: what the method says it keeps. Differs from allocated_bytes where a mask is called a saving.
        kept: [L][H] entries that attention can read in each layer and KV head, mean over rows; None if unknown.
    """

    full_bytes: int
    allocated_bytes: int
    claimed_bytes: int
    kept: list[list[float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The bytes, JSON-ready; `kept` only where it is known."""
        figures: dict[str, Any] = {
            "full_bytes": self.full_bytes,
            "allocated_bytes": self.allocated_bytes,
            "claimed_bytes": self.claimed_bytes,
        }
        if self.kept is not None:
            figures["kept"] = [[round(x, 1) for x in layer] for layer in self.kept]
        return figures


class Session(ABC):
    """One cache of one method, over one or more rows. Close it (or leave it as a context) to give the memory back.

    Attributes:
        chunk: tokens of a prompt that are fed at a time where the method can do that; None: all at once.
    """

    chunk: int | None = None

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Feed a prompt, or the next turn, and end it there: ids [R, T] -> logits [R, V] of the last tokens.

        Methods that compress at the end of a prompt do so before this returns.
        """

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Feed tokens as if they had been generated one by one: ids [R, T] -> logits [R, T, V]."""

    @abstractmethod
    def fork(self) -> "Session":
        """An independent copy, valid until this session is closed."""

    @abstractmethod
    def memory(self) -> Memory:
        """Bytes of this session now."""

    def trim(self) -> None:
        """Give memory that is held and not needed back to the system, where the method can be asked to."""
        return

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. The session cannot be used afterwards; closing twice is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Method(ABC):
    """A way to keep a KV cache.

    Attributes:
        spec: what the user typed, options sorted out ("attention:ratio=4"); the key of all records.
        label: for people ("AttentionScore 4x").
        family: "kvpleat", "transformers" or "kvpress".
        storage: one of STORAGES.
        ratio: the compression ratio asked for (full over kept bytes), or None.
        options: every option with its value, JSON-ready.
    """

    spec: str
    label: str
    family: str
    storage: str
    ratio: float | None
    options: dict[str, Any]

    @abstractmethod
    def open(self, loaded: LoadedModel) -> Session:
        """A new, empty session on a model. One session of a method and its forks at a time on one model object."""

    def to_dict(self) -> dict[str, Any]:
        """What files say about the method."""
        names = ("spec", "label", "family", "storage", "ratio", "options")
        return {name: getattr(self, name) for name in names}
