"""What a policy is: a frozen dataclass that answers questions about tokens and returns Decisions. It never touches
memory.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kvpleat.errors import NumericsError
from kvpleat.policies.gates import Borrowed, Gates
from kvpleat.policies.lora import LoraWeights
from kvpleat.types import Decision, Delay, KVShape, Marks, Phase, PolicyInput, check_bits


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies.

    A moment is a token index m of a row: once m tokens of the row went through a layer, the layer's streams are decided
    on. Moments follow from token indices and from where prompts end, never from how a caller cuts its chunks.

    Args:
        bits: bits of a stored number, a mean over keys and values: 8, 6 (keys 8, values 4) or 4; None: the model's
            dtype. The cache stores entries so, and budgets count the bytes that remain.
    """

    bits: int | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str]
    guarantees: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    observation_window = 0  # last queries of each row and layer that `decide` wants to see (W)
    uses_prompt_end: ClassVar[bool] = False  # whether the end of a prompt is a moment too
    # Whether `decide` and `squeeze` take several layers as if they were one, with the heads of all.
    decides_at_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def for_model(self, base: dict[str, Any]) -> Self:
        """This policy as it acts on the model that `base` (see kvpleat.hf.families.base_of) describes.

        Learned policies find and load their gates here.
        """
        return self

    @property
    def adapter(self) -> LoraWeights | None:
        """What is merged into the model's weights while the policy is attached."""
        return None

    @property
    def reads_model(self) -> bool:
        """Whether the policy is to be given gates that are channels of the model, by `with_gates`."""
        return False

    def with_gates(self, gates: Gates) -> Self:
        """The same policy with these gates."""
        raise NotImplementedError(f"{self.name} has no gates")

    @property
    def borrowed(self) -> Borrowed | None:
        """Channels of queries and keys that the policy reads and attention must not."""
        return None

    @property
    def num_sinks(self) -> int:
        """First positions of a row that stay visible whatever `visible_from` says."""
        return 0

    @property
    def delayed(self) -> Delay | None:
        """What becomes of entries that `marks` marks; None: there are none, and the policy decides at moments."""
        return None

    @property
    def delay(self) -> int | None:
        """Tokens that a marked entry stays visible for after its own; None: the policy decides at moments."""
        return None if self.delayed is None else self.delayed.tokens

    def to_device(self, device: torch.device) -> Self:
        """This policy, with what it learned moved to the model's device."""
        return self

    def marks(self, layer: int, hidden: Tensor) -> Marks:
        """What is decided about each token of a layer, where `delayed` is given: marks [R, H, T] each.

        Args:
            layer: index of the layer among the L compressed ones.
            hidden: [R, T, hidden] what enters its attention module.
        """
        raise NotImplementedError(f"{self.name} decides at moments")

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """What gates put out, which `marks` reads: [outputs, R, H, T] float32; arguments as there."""
        raise NotImplementedError(f"{self.name} decides at moments")

    def expected_entries(self, tokens: int, shape: KVShape) -> float:
        """Entries that a stream of a row of `tokens` tokens is expected to hold, mean over streams: whoever shares out
        memory asks for it. What a row really holds may be more."""
        return tokens

    def peak_entries(self, tokens: int, shape: KVShape) -> float:
        """Entries that a stream is expected to need while a prompt of `tokens` tokens is fed, mean over streams."""
        return self.expected_entries(tokens, shape)

    def visible_from(self, query_positions: Tensor, shape: KVShape) -> Tensor | None:
        """Lowest position, sinks aside, that each query may see: [T] -> [T]; None where every entry is visible.

        Only prefill asks: by the time of a decode step the moments have evicted what is not visible.
        """
        return None

    @abstractmethod
    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        """Moments m with start < m <= stop, besides the ends of prompts.

        Args:
            start, stop: tokens of the row before and after the call.
            phase: of the tokens in between.
            last: the row's last moment, ends of prompts included; 0 if there was none.
            shape: of the model.
        """

    @abstractmethod
    def decide(self, inputs: PolicyInput) -> Decision | None:
        """What becomes of the entries of one layer of one row at a moment; None: leave all as it is.

        Neither this nor `squeeze` reads a tensor that is on another device: the engine does not wait for it.
        """

    def over_budget(self, lengths: Tensor, position: int, shape: KVShape) -> Tensor | bool:
        """Whether layers that hold so many entries together have to compete at `position` tokens.

        Args:
            lengths: [l, H] entries of each stream; in the middle of a prefill only of the l layers that are done.

        Returns:
            a bool where it follows from no tensor, else [] bool on the device of `lengths`.
        """
        return False

    def squeeze(self, layers: "list[LayerScores]", position: int, shape: KVShape, final: bool) -> list[Decision]:
        """Cut layers that are over budget down to it, at a prompt's end or a decode moment.

        Args:
            layers: what each layer holds; during a prefill only the layers that are done.
            position: tokens seen by the row.
            shape: of the model.
            final: all layers are here, and what is decided now stays; else only room is made for the next ones.

        Returns:
            one decision per layer.
        """
        raise NotImplementedError(f"{self.name} has a budget and does not say how layers compete for it")

    def to_dict(self) -> dict[str, Any]:
        """Name and options, JSON-ready; `from_dict` in the registry is the inverse."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class LayerScores:
    """What `squeeze` sees of a layer: [H, N] scores, positions, live and log-weights, entries in order of position."""

    scores: Tensor
    positions: Tensor
    live: Tensor
    log_weights: Tensor | None


def check_scores(decision: Decision, layer: int, position: int) -> None:
    """Raise NumericsError where scores of a layer at a moment are not numbers. Waits for the device."""
    if decision.scores is not None and not bool(torch.isfinite(decision.scores).all()):
        raise NumericsError(
            f"Scores of layer {layer} are NaN or infinite at token {position}, so no entry can be ranked. Check the "
            "model's weights and dtype (float16 overflows where bfloat16 does not)."
        )
