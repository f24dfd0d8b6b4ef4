"""Ways to encode a text with less work, as recipes: full, merge:ratio=2.6, tome:share=0.08, truncate:tokens=128."""

import copy
import itertools
from abc import ABC
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvpleat import compress, policies
from kvpleat.bench.encoder.tome import ToMe
from kvpleat.bench.methods import parse_options, split_list
from kvpleat.errors import OptionError
from kvpleat.hf.embed import cut

REFERENCE = "full"


@dataclass(frozen=True)
class Method(ABC):
    """A recipe. `spec` is what the user typed and the key of all records."""

    spec: str
    options: dict[str, Any]
    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def label(self) -> str:
        """For people."""
        return " ".join([self.summary, *(f"{key}={_number(value)}" for key, value in self.options.items())])

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """The method on a model inside a `with` block."""
        return nullcontext()

    def cut(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the method feeds of texts' tokens."""
        return [list(row) for row in rows]

    def groups(self, attached: Any) -> list[list[int]]:
        """For each layer the group that each token of the last forward's first text is in when its MLP runs; empty
        where nothing merges.

        Args:
            attached: what the `with` block of `on` gave.
        """
        return []

    def to_dict(self) -> dict[str, Any]:
        """What files say about the method."""
        return {"spec": self.spec, "label": self.label, "name": self.name, "options": self.options}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else Path(value).name if isinstance(value, str) else str(value)


class FullModel(Method):
    """The model as it is: what all others are compared with."""

    name = REFERENCE
    summary = "full model"


class Merge(Method):
    """kvpleat's policy for encoders, with its options."""

    name = "merge"
    summary = "EncoderMerge"

    def on(self, model: Any) -> AbstractContextManager[Any]:
        return compress(model, policies.EncoderMerge(**self.options))

    def groups(self, attached: Any) -> list[list[int]]:
        nothing = attached.policy.changes_nothing or attached.policy.what != "tokens"
        return [] if nothing else [place[0].tolist() for place in attached.trace.places]


class TokenMerging(Method):
    """ToMe (arXiv 2210.09461): a share of the text's tokens merges in each layer."""

    name = "tome"
    summary = "ToMe"

    def on(self, model: Any) -> AbstractContextManager[Any]:
        return ToMe(model, **self.options)

    def groups(self, attached: Any) -> list[list[int]]:
        return [place[0].tolist() for place in attached.places]


class Truncate(Method):
    """The first tokens of a text, with its last one (SEP) behind them: the baseline that is easily forgotten."""

    name = "truncate"
    summary = "truncation"

    def cut(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        return cut(rows, self.options["tokens"])


METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (FullModel, Merge, TokenMerging, Truncate)}
TAKES = {"full": set(), "tome": {"share"}, "truncate": {"tokens"}}


def parse(spec: str) -> Method:
    """A method from "name" or "name:option=value,...". Raises OptionError where it is not known or cannot be."""
    name, options = spec.partition(":")[0], parse_options(spec)
    if name not in METHODS:
        raise OptionError(f"{spec!r}: there is no such way to encode. Known: {', '.join(METHODS)}.")
    if name in TAKES and set(options) != TAKES[name]:
        takes = ", ".join(TAKES[name]) or "no option"
        raise OptionError(f"{spec!r}: {name} takes {takes}. Write for example {_example(name)}.")
    if name == "tome" and not 0 < float(options["share"]) < 0.5:
        raise OptionError(f"{spec!r}: share is of the tokens that merge in each layer; it lies between 0 and 0.5.")
    if name == "truncate" and not (isinstance(options["tokens"], int) and options["tokens"] >= 2):
        raise OptionError(f"{spec!r}: tokens is a whole number, two at least: the first one and the last one.")
    if name == "merge":
        try:
            policies.EncoderMerge(**options)
        except TypeError as error:
            raise OptionError(f"{spec!r}: EncoderMerge does not take these options: {error}.") from None
    return METHODS[name](spec, options)


def _example(name: str) -> str:
    return {"tome": "tome:share=0.08", "truncate": "truncate:tokens=128"}.get(name, name)


def parse_list(text: str) -> list[Method]:
    """Methods from "P,P,...", the full model first; "merge:ratio=2|4" stands for one each."""
    return [parse(spec) for spec in dict.fromkeys([REFERENCE, *split_list(text)])]


def share_weights(model: Any) -> Any:
    """A second model object on the same weights, so that two methods can take turns."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
