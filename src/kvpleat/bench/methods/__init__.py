"""Methods by name: kvpleat's policies, transformers' caches, and kvpress's presses, all behind one interface."""

import re
from typing import Any

from kvpleat import policies
from kvpleat.bench.methods.base import STORAGES, Memory, Method, Session
from kvpleat.bench.methods.caches import Dynamic, Quantized
from kvpleat.bench.methods.peers import PRESSES, Peer
from kvpleat.bench.methods.pleated import PleatedMethod, RandomEviction
from kvpleat.errors import OptionError

__all__ = [
    "REFERENCE",
    "STORAGES",
    "Memory",
    "Method",
    "Session",
    "known",
    "parse",
    "parse_list",
    "parse_options",
    "split_list",
]

REFERENCE = Dynamic.spec


def known() -> dict[str, str]:
    """Every name that `parse` takes, with what it is."""
    ours = {name: policy.summary for name, policy in policies.registry().items()}
    theirs = {name: press.summary for name, press in PRESSES.items()}
    caches = {"dynamic": "transformers' DynamicCache", "quantized": "transformers' QuantizedCache (bits=4 or 2)"}
    return {**ours, "random": RandomEviction.summary + ", broken on purpose", **caches, **theirs}


def parse_list(text: str) -> list[Method]:
    """Methods from "P,P,...": each "name" or "name:option=value,option=value"; "ratio=2|4" stands for one each.

    Raises:
        OptionError: a name or option is unknown, or the list is empty.
    """
    specs = split_list(text)
    if not specs:
        raise OptionError(f"--policy {text!r} names no policy. Pass for example full,window:ratio=4,attention:ratio=4.")
    return [parse(spec) for spec in specs]


def split_list(text: str) -> list[str]:
    """The specs that "P,P,..." stands for, each once, in order."""
    specs: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in part and ":" not in part and specs:
            specs[-1] += "," + part  # an option of the method before it
        else:
            specs.append(part)
    return list(dict.fromkeys(one for spec in specs for one in _expand(spec)))


def _expand(spec: str) -> list[str]:
    """One spec for each alternative of an option such as ratio=2|4."""
    found = re.search(r"=([^,|]+(?:\|[^,|]+)+)", spec)
    if not found:
        return [spec]
    before, after = spec[: found.start(1)], spec[found.end(1) :]
    return [one for value in found[1].split("|") for one in _expand(before + value + after)]


def parse_options(spec: str) -> dict[str, Any]:
    """The options of "name:option=value,option=value"."""
    options: dict[str, Any] = {}
    for option in filter(None, spec.partition(":")[2].split(",")):
        key, equals, value = option.partition("=")
        if not equals or not value:
            raise OptionError(f"{spec!r}: {option!r} is no option. Write name:option=value,option=value.")
        options[key] = _value(key, value)
    return options


def parse(spec: str) -> Method:
    """A method from "name" or "name:option=value,option=value", such as "attention:ratio=4"."""
    name = spec.partition(":")[0]
    options = parse_options(spec)
    try:
        if name == "dynamic":
            return Dynamic(**options)
        if name == "quantized":
            return Quantized(spec, **options)
        if name in PRESSES:
            return Peer(name, spec, **options)
        if name == RandomEviction.name:
            return PleatedMethod(RandomEviction(**options), spec)
        if name in policies.registry():
            return PleatedMethod(policies.from_dict({"name": name, **options}), spec)
    except TypeError as error:
        raise OptionError(f"{spec!r}: {name} does not take these options: {error}.") from None
    raise OptionError(f"{spec!r}: there is no such policy or cache. Known: {', '.join(known())}.")


def _value(key: str, text: str) -> bool | int | float | str:
    """An option's value: true or false, a whole number where it is one, except for ratios; `gates` are a name."""
    if key == "gates":
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and key not in ("ratio", "coverage", "slack", "half_life") else number
