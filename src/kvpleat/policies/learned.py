"""Learned policies. A gate's decision about token t governs the entry before it: whether that entry leaves.

One recurrence covers all three. Token t begins with its own key and value; once it is `delay` tokens old it takes over
the group of the entry before it where that entry was marked:

    X_t = m_t c_t X_{t-1} + b_t x_t        z_t = m_t c_t z_{t-1} + b_t        entry_t = X_t / z_t

with m_t in {0, 1} the decision made at t, the keys x_t before rotation. A marked entry is gone afterwards. DMS
(arXiv 2506.05345): c = 0, b = 1, so that a marked entry vanishes. DMC (arXiv 2403.09636): c = 1, b learned, delay 0.
Fold (ours): c learned, b = 1, and log z_t is added to the entry's attention logit.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.policies.base import Policy
from kvpleat.policies.budget import check_ratio
from kvpleat.policies.gates import OWN, Borrowed, GateConfig, Gates, find_shipped
from kvpleat.policies.lora import LoraWeights
from kvpleat.types import Decision, Delay, KVShape, Marks, Phase, PolicyInput


class SoftMarks(NamedTuple):
    """The same while training: [..., T] float32 each, differentiable.

    marked: the decision, hard forward and soft backward, for the ratio. keep_bias: log(1 - p_t), for the logits of the
    entry before. log_carry, weight: as in Marks, log_carry with log p_t in it.
    """

    marked: Tensor
    keep_bias: Tensor
    log_carry: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class Learned(Policy):
    """Base of the policies whose decisions were learned.

    Args:
        ratio: which of the gates that come with kvpleat: those trained for this ratio on the model. What is reached
            depends on the text; the memory report tells.
        gates: gates, or the name or folder of some, instead of `ratio`.
    """

    ratio: float | None = None
    gates: str | Gates | None = None

    biases: ClassVar[tuple[float, ...]]  # what each output of an untrained gate says
    merges: ClassVar[bool] = False  # whether a marked entry leaves something behind
    weighs: ClassVar[bool] = False  # whether members of a group count differently (b)
    log_size: ClassVar[bool] = False  # whether log z counts in attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.gates is None):
            raise OptionError(
                f"{type(self).__name__}(ratio={self.ratio}, gates={self.gates!r}): exactly one of the two says which "
                "gates decide. Pass ratio=4.0 for gates that come with kvpleat, or gates=NAME_OR_FOLDER."
            )
        check_ratio(self.ratio)

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> Self:
        """The policy with gates that come with kvpleat, by name, or those in a folder."""
        return cls(gates=Gates.from_pretrained(name_or_folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy's gates, and their LoRA if there is one, into `folder`: see `Gates.save_pretrained`.

        Raises:
            OptionError: only a ratio is given, so which gates these are depends on a model.
        """
        if self.gates is None:
            raise OptionError(
                f"{type(self).__name__}(ratio={self.ratio}) has no gates before it meets a model, so there is nothing "
                "to save. Make the policy with from_pretrained(NAME_OR_FOLDER)."
            )
        gates = self.gates if isinstance(self.gates, Gates) else Gates.from_pretrained(self.gates)
        gates.save_pretrained(folder)

    def for_model(self, base: dict[str, Any]) -> Self:
        """The same policy with its gates loaded.

        Raises:
            OptionError: the gates are for another policy or model, or none come with kvpleat for it and the ratio.
            ModelError: gates cannot be loaded.
        """
        gates = self.gates
        if gates is None:
            assert self.ratio is not None
            gates = find_shipped(self.name, self.ratio, base)
        if isinstance(gates, str):
            gates = Gates.from_pretrained(gates)
        if gates.config.method != self.name:
            raise OptionError(
                f"{gates!r} were trained for {gates.config.method}, and what they say means something else to "
                f"{self.name}. Pass them to {gates.config.method}."
            )
        misfit = gates.config.misfit(base)
        if misfit:
            raise OptionError(
                f"{gates!r} are for another model: {misfit}. Load the model they were trained on, or train gates for "
                "this one with `kvpleat retrofit`."
            )
        return self if gates is self.gates else self.with_gates(gates)

    @property
    def adapter(self) -> LoraWeights | None:
        return self.gates.adapter if isinstance(self.gates, Gates) else None

    @property
    def borrowed(self) -> Borrowed | None:
        return self.gates.borrowed if isinstance(self.gates, Gates) else None

    @property
    def reads_model(self) -> bool:
        return self.gates == OWN

    def with_gates(self, gates: Gates) -> Self:
        return replace(self, ratio=None, gates=gates)

    def to_dict(self) -> dict[str, Any]:
        """As in Policy, with the label of gates in place of gates that are loaded."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.gates, Gates):
            options["gates"] = self.gates.label
        return {"name": self.name, **options}

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        return []  # every token is one

    def decide(self, inputs: PolicyInput) -> Decision | None:
        return None

    @property
    def delayed(self) -> Delay:
        config = self._loaded.config
        return Delay(config.delay, self.merges, self.weighs, self.log_size, config.look_back, config.sinks)

    def to_device(self, device: torch.device) -> Self:
        self._loaded.to(device)
        return self

    def marks(self, layer: int, hidden: Tensor) -> Marks:
        return self.judge(self.logits(layer, hidden))

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        logits: Tensor = self._loaded(layer, hidden)
        return logits

    def expected_entries(self, tokens: int, shape: KVShape) -> float:
        """What the ratio that the gates were trained for leaves of all but the last tokens, which all wait."""
        config = self._loaded.config
        waiting = min(tokens, config.delay + 1)
        return waiting + (tokens - waiting) / config.ratio

    @property
    def _loaded(self) -> Gates:
        assert isinstance(self.gates, Gates), "for_model loads the gates"
        return self.gates

    def judge(self, logits: Tensor) -> Marks:
        """Decisions from a gate's logits [outputs, ..., T]. The first tokens of a row cannot mark anything: the cache
        knows which ones these are."""
        raise NotImplementedError

    @classmethod
    def relax(cls, logits: Tensor, noise: Tensor, temperature: float) -> SoftMarks:
        """The relaxation of `judge` for training: logits [outputs, ..., T], noise [..., T] logistic."""
        raise NotImplementedError


def _soft(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(noisy logit over the temperature, decision that is hard forward and soft backward)."""
    noisy = (logits + noise) / temperature
    soft = torch.sigmoid(noisy)
    return noisy, (noisy > 0).to(soft.dtype) + soft - soft.detach()


@dataclass(frozen=True)
class DMS(Learned):
    """Dynamic Memory Sparsification (arXiv 2506.05345): a marked entry leaves once it is `delay` tokens old."""

    name: ClassVar[str] = "dms"
    summary: ClassVar[str] = "learned eviction: gates mark entries, which leave after a delay"
    needs: ClassVar[str] = "gates for the model (`kvpleat retrofit` trains them)"
    guarantees: ClassVar[str] = "the tokens decide alone; the ratio follows the text"
    biases: ClassVar[tuple[float, ...]] = (-5.0,)

    def judge(self, logits: Tensor) -> Marks:
        return Marks(logits[0] > 0)

    @classmethod
    def relax(cls, logits: Tensor, noise: Tensor, temperature: float) -> SoftMarks:
        noisy, marked = _soft(logits[0], noise, temperature)
        return SoftMarks(marked, F.logsigmoid(-noisy))


@dataclass(frozen=True)
class Fold(Learned):
    """Delayed merging: once a marked entry is `delay` tokens old, a learned share of it goes into the entry after it,
    which then counts for more in attention."""

    name: ClassVar[str] = "fold"
    summary: ClassVar[str] = "learned merging: gates mark entries, which merge into their successors after a delay"
    needs: ClassVar[str] = DMS.needs
    guarantees: ClassVar[str] = DMS.guarantees
    fields: ClassVar[tuple[str, ...]] = ("log_weight",)
    biases: ClassVar[tuple[float, ...]] = (-5.0, -3.0)
    merges: ClassVar[bool] = True
    log_size: ClassVar[bool] = True

    def judge(self, logits: Tensor) -> Marks:
        return Marks(logits[0] > 0, F.logsigmoid(logits[1]))

    @classmethod
    def relax(cls, logits: Tensor, noise: Tensor, temperature: float) -> SoftMarks:
        noisy, marked = _soft(logits[0], noise, temperature)
        return SoftMarks(marked, F.logsigmoid(-noisy), F.logsigmoid(noisy) + F.logsigmoid(logits[1]))


@dataclass(frozen=True)
class DMC(Learned):
    """Dynamic Memory Compression (arXiv 2403.09636): a token opens an entry of its own or merges into the newest one,
    as a mean with learned weights."""

    name: ClassVar[str] = "dmc"
    summary: ClassVar[str] = "learned merging: each token opens an entry or merges into the newest"
    needs: ClassVar[str] = DMS.needs
    guarantees: ClassVar[str] = DMS.guarantees
    biases: ClassVar[tuple[float, ...]] = (-5.0, 0.0)  # the weight starts where it is learned fastest
    merges: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    def judge(self, logits: Tensor) -> Marks:
        return Marks(logits[0] > 0, torch.zeros_like(logits[0]), torch.sigmoid(logits[1]))

    @classmethod
    def relax(cls, logits: Tensor, noise: Tensor, temperature: float) -> SoftMarks:
        noisy, marked = _soft(logits[0], noise, temperature)
        return SoftMarks(marked, F.logsigmoid(-noisy), F.logsigmoid(noisy), torch.sigmoid(logits[1]))


def new_gates(policy: type[Learned], *, delay: int, **config: Any) -> Gates:
    """Untrained gates, which mark next to nothing."""
    return Gates(GateConfig(method=policy.name, delay=delay, **config), policy.biases)
