"""What a task is: a list of items, and what to do with one item on one method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpleat.bench import corpus
from kvpleat.bench.methods import Memory, Method, Session
from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel

FORMS = ("known", "after")  # the question is part of the compressed prompt, or comes after it


@dataclass(frozen=True)
class Source:
    """Where items come from, and how many.

    Args:
        loaded: the model whose tokens items are made of.
        data: JSONL of texts; qa, multiturn: JSON sets. The shipped ones by default.
        lengths: tokens of an item, everything included.
        count: items of each kind and length.
        depths: places at which retrieval tasks hide what they ask for.
        forms: of FORMS.
        sources: kinds of text to take; None: all.
        seed: of everything that is drawn.
    """

    loaded: LoadedModel
    data: Path = field(default_factory=corpus.shipped)
    qa: Path = field(default_factory=lambda: corpus.shipped("qa.json"))
    multiturn: Path = field(default_factory=lambda: corpus.shipped("multiturn.json"))
    lengths: tuple[int, ...] = (2048,)
    count: int = 4
    depths: int = 4
    forms: tuple[str, ...] = FORMS
    sources: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        limit = describe(self.loaded.model).max_positions
        for length in self.lengths:
            if not 512 <= length <= limit:
                raise OptionError(
                    f"length {length}: items need at least 512 tokens, and {self.loaded.name} knows {limit} positions. "
                    "Choose lengths in between."
                )
        for form in self.forms:
            if form not in FORMS:
                raise OptionError(f"form {form!r}: a question is {' or '.join(FORMS)}. Pass one of these, or both.")
        if self.count < 1 or self.depths < 1:
            raise OptionError(f"count {self.count}, depths {self.depths}: at least 1 of each is needed.")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return corpus.encode(self.loaded, text)

    @property
    def start(self) -> list[int]:
        """What the model expects at the start of every text (its BOS token, or nothing)."""
        ids: list[int] = self.loaded.tokenizer("", verbose=False)["input_ids"]
        return ids

    def windows(self, length: int, count: int, salt: int = 0) -> list[tuple[str, list[int]]]:
        """`count` windows of text of `length` tokens; `salt` keeps tasks from sharing them."""
        sources = None if self.sources is None else list(self.sources)
        drawn = corpus.token_windows(self.loaded, self.data, length, count, self.seed + length + salt, sources)
        return [(source, tokens.tolist()) for source, tokens in drawn]


@dataclass(frozen=True)
class Item:
    """One thing to judge by.

    Args:
        id: unique, the same for every method and every run with the same settings.
        group: what it is one of.
        content: what the task's `measure` needs.
    """

    id: str
    group: dict[str, Any]
    content: Any


@dataclass
class Observation:
    """What one item gave: `suffix` where an item gives several (a question, a turn), the rest as in records.Record."""

    scores: dict[str, float]
    memory: dict[str, Any]
    suffix: str = ""
    group: dict[str, Any] = field(default_factory=dict)


class Trial:
    """One method on one item, beside the reference: opens sessions, and runs the reference at most once an item.

    Args:
        loaded: the model. method: under test. reference: the uncompressed one.
        shared: what the reference gave for this item, kept while all methods are on it.
    """

    def __init__(self, loaded: LoadedModel, method: Method, reference: Method, shared: dict[str, Any]) -> None:
        self.loaded, self.method, self._reference, self._shared = loaded, method, reference, shared

    @property
    def device(self) -> torch.device:
        """Of the model."""
        device: torch.device = self.loaded.model.device
        return device

    def run(self, act: Callable[[Session], Any]) -> Any:
        """`act` on a fresh session of the method."""
        if self.method is self._reference:
            return self.reference(act)
        with self.method.open(self.loaded) as session:
            return act(session)

    def reference(self, act: Callable[[Session], Any], name: str = "act") -> Any:
        """`act` on a fresh session of the reference; done once for all methods of an item where `name` is the same."""
        if name not in self._shared:
            with self._reference.open(self.loaded) as session:
                self._shared[name] = act(session)
        return self._shared[name]

    def tensor(self, tokens: list[int]) -> Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([tokens], device=self.device)


class Task(ABC):
    """A kind of item, how to make some, and how to measure one."""

    name: ClassVar[str]
    summary: ClassVar[str]
    any_weights: ClassVar[bool] = True  # False: runs on the model as it was loaded only

    @abstractmethod
    def items(self, source: Source) -> list[Item]:
        """The items that a source gives. Deterministic: the same source, the same items."""

    @abstractmethod
    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        """What a method makes of an item."""


def memory(end: Memory, prompt: Memory | None = None) -> dict[str, Any]:
    """Record.memory: bytes at the end of an item and, under "prompt", right after its prompt."""
    figures = end.to_dict()
    if prompt is not None:
        figures["prompt"] = {k: v for k, v in prompt.to_dict().items() if k != "kept"}
    return figures


def greedy(trial: Trial, session: Session, logits: Tensor, most: int, stop: str | None = None) -> tuple[str, list[int]]:
    """Decode greedily from logits [1, V] until `stop`, an end token, or `most` tokens.

    Returns:
        the text before `stop`, and all tokens; the last one has not been fed to the session.
    """
    ends = trial.loaded.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens: list[int] = []
    while True:
        tokens.append(int(logits.argmax(-1)))
        text = corpus.decode(trial.loaded, tokens)
        if len(tokens) == most or tokens[-1] in ends or (stop is not None and stop in text.lstrip(stop)):
            break
        logits = session.decode(trial.tensor(tokens[-1:]))[:, -1]
    return text.lstrip(stop).partition(stop)[0] if stop is not None else text, tokens
