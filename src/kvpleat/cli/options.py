"""From command-line options to a policy, a model and a prompt. Whatever does not fit together is an OptionError."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel, load
from kvpleat.policies import Policy

DEFAULT_RATIO = 4.0


@dataclass(frozen=True)
class Decoding:
    """How tokens are fed and chosen.

    Args:
        max_new_tokens: tokens to generate at most.
        temperature, top_p: of sampling; greedy where both are None.
        seed: of sampling.
        prefill_chunk: tokens of the prompt a piece, or None for one piece; the result does not depend on it.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature <= 100:
            raise OptionError(
                f"--temperature {self.temperature}: sampling divides by it, so it must be above 0 and at most 100. "
                "Leave it out for greedy decoding."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"--top-p {self.top_p}: it is a share of probability, above 0 and at most 1.")

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        return self.temperature is not None or self.top_p is not None

    def generate_options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' generate()."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "prefill_chunk_size": self.prefill_chunk,
            "do_sample": self.sampled,
        }
        if self.sampled:
            return {**options, "temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0, "top_k": 0}
        return {**options, "temperature": None, "top_p": None, "top_k": None}


def whole_numbers(text: str, option: str) -> list[int]:
    """Numbers above 0 from "2048,4096", each once; `option` is what the user typed them for."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise OptionError(f"{option} {text!r}: pass whole numbers above 0 with commas between them, such as 1,4.")
    return numbers


def make_policy(
    name: str, ratio: float | None, coverage: float | None, bits: int | None = None, gates: str | None = None
) -> Policy:
    """The policy called `name`. A ratio of 4 is taken where the policy knows ratios and no option was given."""
    registry = policies.registry()
    if name not in registry:
        raise OptionError(f"--policy {name}: there is no such policy. Known: {', '.join(registry)}.")
    known = {field.name for field in fields(registry[name])}
    options = {"ratio": ratio, "coverage": coverage, "gates": gates}
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(f"--{option}" for option in options if option in known) or "none of them"
            raise OptionError(f"--{key} {value}: policy {name} has no such option. It takes {takes}.")
    if not given and "ratio" in known:
        given = {"ratio": DEFAULT_RATIO}
    return policies.from_dict({"name": name, "bits": bits, **given})


def policy_label(policy: Policy) -> str:
    """A policy in a few words, such as "attention, ratio 4"."""
    options = policy.to_dict()
    given = [f"{key} {options[key]:g}" for key in ("ratio", "coverage", "bits") if options.get(key) is not None]
    if options.get("gates") is not None:
        given.insert(0, f"gates {Path(options['gates']).name}")
    return ", ".join([policy.name, *given])


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text: of the file, then of --prompt; of stdin where neither is given."""
    parts = []
    if file is not None:
        try:
            parts.append(file.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--prompt-file {file} cannot be read as UTF-8 text: {error}.") from error
    if prompt is not None:
        parts.append(prompt)
    if not parts:
        if sys.stdin.isatty():
            raise OptionError(
                "There is no prompt to continue. Pass --prompt TEXT or --prompt-file FILE, or pipe text in."
            )
        parts.append(sys.stdin.read().strip())
    text = "\n\n".join(parts)
    if not text.strip():
        raise OptionError("The prompt is empty, so there is nothing to continue. Pass some text.")
    return text


def encode(loaded: LoadedModel, text: str, system: str | None, raw: bool, max_new_tokens: int) -> Tensor:
    """The prompt as tokens [1, T], in the model's chat template unless `raw` or the model has none.

    Raises:
        OptionError: a system message without a template, or more tokens than the model has positions.
        UnsupportedError: kvpleat does not serve the model (better known before a long prefill than after).
    """
    templated = not raw and loaded.tokenizer.chat_template is not None
    if templated:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        text = str(loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    elif system is not None:
        why = "--raw feeds the text as it is" if raw else f"{loaded.name} has no chat template"
        raise OptionError(f"--system needs a chat template, and {why}. Write it into the prompt, or leave it out.")
    ids: Tensor = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=not templated, verbose=False)[
        "input_ids"
    ]
    limit = describe(loaded.model).max_positions
    if ids.shape[1] + max_new_tokens > limit:
        raise OptionError(
            f"The prompt has {ids.shape[1]:,} tokens, and with {max_new_tokens} new ones it passes the {limit:,} "
            f"positions that {loaded.name} knows; beyond them the output is noise. Shorten one of the two."
        )
    return ids


def load_model(name: str, dtype: str | None, device: str | None, trust_remote_code: bool) -> LoadedModel:
    """`load`, with transformers' own messages kept to errors: the command line says what matters itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


Model = Annotated[str, typer.Option(help="smollm2-135m, a folder, or a name on the hub.")]
PolicyName = Annotated[
    str, typer.Option("--policy", help="full, window, attention, dms, fold or dmc; see `kvpleat policies`.")
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Compression ratio: full over compressed bytes, at least 1 (default: 4, unless --coverage or --gates)."
    ),
]
Coverage = Annotated[float | None, typer.Option(help="Share of attention to keep, such as 0.98, instead of a ratio.")]
Gates = Annotated[
    str | None,
    typer.Option(
        help="Gates of dms, fold or dmc instead of a ratio: a name (`kvpleat policies`), a folder, or `model`: its own "
        "channels, as in NVIDIA's DMS and DMC checkpoints."
    ),
]
Bits = Annotated[
    int | None, typer.Option(help="Bits of a stored number: 8, 6 (keys 8, values 4) or 4 (default: the model's dtype).")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature (default: greedy).")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
System = Annotated[str | None, typer.Option(help="System message, for models with a chat template.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the GPU if there is one).")]
PrefillChunk = Annotated[
    int | None, typer.Option(min=1, help="Feed the prompt in pieces of so many tokens; the result is the same.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
