"""What is asked of the engine and what it answers, under vLLM's names: sampling parameters, requests, outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from kvpleat.errors import OptionError

GREEDY_BELOW = 1e-5  # a temperature below is 0, as in vLLM: dividing by it would overflow


class RequestOutputKind(Enum):
    """What each output of a stream holds: all so far, only what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Names and defaults are those of vLLM.

    A token stays in the race if it passes min_p, then top_k among those left, then top_p among those left; tokens of
    equal probability stay or leave together. See kvpleat.engine.sampling for the definition.

    Args:
        n: samples of the prompt. Sample i draws with seed + i.
        temperature: logits are divided by it; 0 (anything below 1e-5): the most likely token, of several the lowest id.
        top_p: the likeliest tokens that hold this share of the probability are kept, in (0, 1].
        top_k: so many of the likeliest tokens are kept; 0 or -1: all.
        min_p: tokens below this share of the likeliest one's probability are dropped, in [0, 1].
        seed: any integer. The same seed draws the same tokens, alone, in a batch, after preemption. None: the engine's
            seed and the number of the request in the engine take its place.
        stop: strings that end the request where they appear in the text.
        stop_token_ids: tokens that end it, besides the model's own end tokens.
        ignore_eos: the model's end tokens are tokens like others.
        max_tokens: most tokens to generate; None: what fits into the model's length.
        min_tokens: end tokens, stop_token_ids and stop strings wait until so many tokens are there.
        logprobs: how many of the likeliest tokens to report for each token, with log probabilities under the model
            itself (before temperature and filters); the chosen token is reported besides. 0: only that one. -1: all.
            None: nothing.
        detokenize: whether tokens become text.
        skip_special_tokens: whether special tokens are left out of the text.
        include_stop_str_in_output: whether what ended the request is part of the text.
        output_kind: what each output of a stream holds.

    Raises:
        OptionError: a value that makes no sense, or not together with another.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._check_stops()
        if self.greedy and self.n > 1:
            raise OptionError(
                f"n={self.n} with temperature={self.temperature}: all samples would be the same greedy one. Pass a "
                "temperature above 0, or n=1."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_counts(self) -> None:
        _integer("n", self.n, 1, "Pass how many samples you want")
        _integer("top_k", self.top_k, -1, "Pass how many tokens stay in the race, or 0 for all")
        _integer("min_tokens", self.min_tokens, 0, "Pass 0 for no lower limit")
        if self.seed is not None:
            _integer("seed", self.seed, None, "Leave it out for a seed of the engine's")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, "Pass None for as many as fit into the model's length")
            if self.min_tokens > self.max_tokens:
                raise OptionError(
                    f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}, so no output could meet "
                    "both. Raise max_tokens or lower min_tokens."
                )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, -1, "Pass 0 for the chosen token alone, None for nothing, -1 for all")

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf, "Pass 0 for greedy, 1 for the model's own distribution")
        _number("top_p", self.top_p, 0.0, 1.0, "Pass a share in (0, 1]; 1 keeps all tokens", open_below=True)
        _number("min_p", self.min_p, 0.0, 1.0, "Pass a share in [0, 1]; 0 keeps all tokens")

    def _check_stops(self) -> None:
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise OptionError(
                    f"stop={self.stop!r}: {text!r} is found nowhere or everywhere. Pass non-empty strings."
                )
        if self.stop_strings and not self.detokenize:
            raise OptionError(
                f"stop={self.stop!r} with detokenize=False: strings are looked for in the text, and there would be "
                "none. Pass stop_token_ids, or detokenize=True."
            )
        for token in self.stop_token_ids or ():
            _integer("a token of stop_token_ids", token, 0, "Pass ids of the model's vocabulary")
        object.__setattr__(self, "stop", self.stop_strings)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))


def _integer(name: str, value: Any, least: int | None, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        kind = "an integer" if least is None else f"an integer from {least} on"
        raise OptionError(f"{name}={value!r} is not {kind}. {remedy}.")


def _number(name: str, value: Any, least: float, most: float, remedy: str, open_below: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or not math.isfinite(value) or (open_below and value == least):
        raise OptionError(f"{name}={value!r} is no finite number in the range it can have. {remedy}.")


@dataclass(frozen=True)
class Request:
    """One sequence to generate, as the engine's core sees it.

    Args:
        id: unique among the requests that are not finished.
        prompt: its tokens.
        params: with n = 1: several samples are several requests.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one generated token.

    Args:
        ids: the token itself, then the K likeliest tokens, likeliest first.
        logprobs: of `ids`, in nats, under the model itself.
        rank: of the token itself: 1 plus the number of tokens that were more likely.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


class Emitted(NamedTuple):
    """What one request gained in a step of the core.

    Args:
        request_id: of the request.
        token_ids: new tokens, the one that ended the request included.
        logprobs: one for each of them, or None where nobody asked.
        finish_reason: "stop" (an end token, a token of stop_token_ids), "length" (max_tokens, or the model's length),
            "error" (the logits were NaN or all infinite, and no token was made of them), "memory" (even alone it
            needs more pages, or a step of its more memory, than there are), None: goes on.
        num_cached_tokens: of its prompt, that another request had computed.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class Logprob:
    """One token's log probability.

    Args:
        logprob: in nats, under the model itself: before temperature and filters.
        rank: 1 plus the number of tokens that were more likely.
        decoded_token: the token as text, or None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of a request.

    Args:
        index: which of the n samples.
        text: generated text: all so far, or what is new (RequestOutputKind.DELTA).
        token_ids: its tokens, likewise. Text may lag behind them: half a character waits, and so does what may become a
            stop string.
        cumulative_logprob: sum of the chosen tokens' log probabilities since the start, if logprobs were asked for.
        logprobs: for each of token_ids: the chosen token, then the likeliest ones, by id.
        finish_reason: "stop", "length", "abort" (cancelled), "error" (the model's logits were NaN), "memory" (alone it
            needs more than kv_memory, or than the device has left), or None: goes on. What there is by then stands.
        stop_reason: the stop string, or the token of stop_token_ids, that ended it; else None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        """Whether this sample has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What there is of a request.

    Args:
        request_id: of the request.
        prompt: its text, or None where tokens were given.
        prompt_token_ids: its tokens.
        outputs: its samples, in order; in a stream of deltas only those that have news.
        finished: whether all samples have ended.
        num_cached_tokens: of the prompt, that another request had computed (of several samples: for the first one).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
