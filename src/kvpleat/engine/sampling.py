"""The batched sampler: one token for each row from its logits, on the device, without the host ever waiting for it.

What is drawn is a function of the row alone: of its logits, its parameters, its seed and the number of the token in its
request; kvpleat.kernels.sampling says which. Neither the batch, the seat nor a preemption changes it: for equal logits
the tokens are equal on one kind of device. On another, log and exp may differ in the last digit.

A row whose logits hold NaN, or nothing finite to choose from, gets NO_TOKEN; no other row sees anything of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.engine.params import SamplingParams, TokenLogprobs
from kvpleat.errors import OptionError
from kvpleat.kernels.sampling import MAX_VOCAB, highest, least_score, mix, race, signed

NO_TOKEN = -1  # in place of a token where the logits allow none
MAX_END_IDS = 32  # tokens that min_tokens can hold back, for each seat


class Mode(NamedTuple):
    """What a batch asks for together. Rows that ask for less get the same tokens in any mode that serves them.

    Args:
        draws: whether any row is not greedy.
        filters: whether any row has a top_k or a top_p; a CPU sorts for it, a GPU reads the logits three times more.
        holds: whether any row has min_tokens.
        logprobs: most that any row asked for, or None.
    """

    draws: bool = False
    filters: bool = False
    holds: bool = False
    logprobs: int | None = None

    def joined(self, other: "Mode") -> "Mode":
        """The least mode that serves both."""
        counts = [mode.logprobs for mode in (self, other) if mode.logprobs is not None]
        return Mode(
            self.draws or other.draws,
            self.filters or other.filters,
            self.holds or other.holds,
            max(counts, default=None),
        )


class Sampled(NamedTuple):
    """What was drawn for n rows.

    Args:
        tokens: [n] int64; NO_TOKEN where the logits allow none, so clamp before it is fed anywhere.
        ids: [n, K + 1] int64: the token, then the K likeliest ones; None where nobody asked.
        logprobs: [n, K + 1] float32: their log probabilities in nats under the logits as given.
        ranks: [n] int64: 1 plus the number of tokens that are likelier than the one drawn.
    """

    tokens: Tensor
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    ranks: Tensor | None = None


class Sampler:
    """Parameters of all seats as tensors of fixed addresses, and the draw. Nothing here reads from the device.

    Args:
        num_seats: rows that can be in use at once.
        vocab_size: columns of the logits (V).
        device: of all tensors.
    """

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device | str) -> None:
        if vocab_size >= MAX_VOCAB:
            raise OptionError(
                f"A vocabulary of {vocab_size} tokens: their probabilities would not add up in 63 bits. Use a model "
                f"with fewer than {MAX_VOCAB}."
            )
        self.vocab_size = vocab_size
        self._needs: dict[int, Mode] = {}  # of the seats in use
        self._mode: Mode | None = None

        def filled(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((num_seats, *shape), value, dtype=dtype, device=device)

        self._temperature = filled(1.0, torch.float32)
        self._noise = filled(0.0, torch.float32)  # what the noise is multiplied by
        self._top_k = filled(vocab_size, torch.int64)
        self._top_p = filled(1.0, torch.float64)
        self._log_min_p = filled(-math.inf, torch.float32)
        self._seed = filled(0, torch.int64)
        self._min_tokens = filled(0, torch.int64)
        self._end_ids = filled(0, torch.int64, MAX_END_IDS)

    def seat(self, index: int, params: SamplingParams, request_seed: int, end_ids: Sequence[int] = ()) -> None:
        """A request takes a seat.

        Args:
            index: the seat.
            params: of the request; see `check`.
            request_seed: see `request_seed`.
            end_ids: the model's end tokens.
        """
        draws = not params.greedy
        held = end_tokens(params, end_ids) if params.min_tokens else ()
        self._temperature[index].fill_(params.temperature if draws else 1.0)
        self._noise[index].fill_(float(draws))
        limits = draws and params.top_k > 0  # the likeliest token passes every filter
        self._top_k[index].fill_(min(params.top_k, self.vocab_size) if limits else self.vocab_size)
        self._top_p[index].fill_(params.top_p if draws else 1.0)
        self._log_min_p[index].fill_(math.log(params.min_p) if params.min_p > 0 else -math.inf)
        self._seed[index].fill_(signed(request_seed))
        self._min_tokens[index].fill_(params.min_tokens if held else 0)
        if held:
            self._end_ids[index].fill_(held[0])  # the rest repeats one of them
            for place, token in enumerate(held[1:], start=1):
                self._end_ids[index, place].fill_(token)
        wanted = self.vocab_size if params.logprobs == -1 else params.logprobs
        filters = draws and (params.top_p < 1 or 0 < params.top_k < self.vocab_size)
        self._needs[index], self._mode = Mode(draws, filters, bool(held), wanted), None

    def unseat(self, index: int) -> None:
        """A seat becomes free, so that nothing is done on its behalf."""
        self._needs.pop(index, None)
        self._mode = None

    def move(self, pairs: Sequence[tuple[int, int]], sources: Tensor, targets: Tensor) -> None:
        """Requests take other seats, which are free.

        Args:
            pairs: of each, the seat that it leaves and the one that it takes. sources, targets: [n] int64 the same.
        """
        for source, target in pairs:
            self._needs[target] = self._needs.pop(source)
        for x in (
            self._temperature, self._noise, self._top_k, self._top_p, self._log_min_p, self._seed, self._min_tokens,
            self._end_ids,
        ):  # fmt: skip
            x.index_copy_(0, targets, x.index_select(0, sources))

    @property
    def mode(self) -> Mode:
        """The least mode that serves all seats in use. Known on the host."""
        if self._mode is None:
            self._mode = Mode()
            for needs in set(self._needs.values()):
                self._mode = self._mode.joined(needs)
        return self._mode

    @torch.no_grad()
    def sample(self, logits: Tensor, seats: Tensor, counters: Tensor, mode: Mode | None = None) -> Sampled:
        """Draw a token for each row.

        Args:
            logits: [n, V] of any float dtype. Not changed.
            seats: [n] int64 seat of each row.
            counters: [n] int64 index of the new token in its request; the first one is 0.
            mode: a mode that serves all rows, for a graph that was captured in it; None: `self.mode`.
        """
        mode = self.mode if mode is None else mode
        allowed = self._without_ends(logits, seats, counters) if mode.holds else logits
        largest, tokens = highest(allowed)
        if mode.draws:
            tokens = self._draw(allowed, largest, seats, counters, mode.filters)
        tokens = torch.where(torch.isfinite(largest), tokens, NO_TOKEN)
        return Sampled(tokens) if mode.logprobs is None else _with_logprobs(logits, tokens, mode.logprobs)

    def _draw(self, logits: Tensor, largest: Tensor, seats: Tensor, counters: Tensor, filters: bool) -> Tensor:
        """[n] the winners of the race."""
        temperature, least = self._temperature[seats], self._log_min_p[seats]
        if filters:
            least = least_score(logits, largest, temperature, least, self._top_k[seats], self._top_p[seats])
        return race(logits, largest, temperature, least, self._noise[seats], self._seed[seats], counters)

    def _without_ends(self, logits: Tensor, seats: Tensor, counters: Tensor) -> Tensor:
        """Logits with -inf for the end tokens of rows that have not reached their min_tokens. NaN stays, to be seen."""
        ids = self._end_ids[seats]
        ends = logits.gather(1, ids)
        waits = (counters < self._min_tokens[seats])[:, None] & ~torch.isnan(ends)
        return logits.scatter(1, ids, ends.masked_fill(waits, -math.inf))


def request_seed(engine_seed: int, params: SamplingParams, number: int) -> int:
    """The seed of a request: its own, or one that follows from the engine's and the request's number in the engine."""
    if params.seed is not None:
        return signed(params.seed)
    return int(mix(mix(torch.tensor([signed(~engine_seed)])) + number * 2 + 1))


def end_tokens(params: SamplingParams, end_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end a request of these parameters: stop_token_ids and, unless ignored, the model's end tokens."""
    return tuple(dict.fromkeys((*(params.stop_token_ids or ()), *(() if params.ignore_eos else end_ids))))


def check(params: SamplingParams, vocab_size: int, end_ids: Sequence[int] = (), max_logprobs: int = -1) -> None:
    """Refuse what the sampler cannot do for this model.

    Args:
        params: of a request.
        vocab_size: of the model.
        end_ids: its end tokens.
        max_logprobs: most that a request may ask for; -1: all.

    Raises:
        OptionError: see the messages.
    """
    if beyond := [token for token in params.stop_token_ids or () if token >= vocab_size]:
        raise OptionError(
            f"stop_token_ids holds {beyond[0]}, and the model's tokens end at {vocab_size - 1}, so it would never stop "
            "anything. Pass tokens of this model."
        )
    if params.min_tokens and len(end_tokens(params, end_ids)) > MAX_END_IDS:
        raise OptionError(
            f"min_tokens={params.min_tokens} with {len(end_tokens(params, end_ids))} end tokens: {MAX_END_IDS} can be "
            "held back. Pass fewer stop_token_ids, or min_tokens=0."
        )
    wanted = vocab_size if params.logprobs == -1 else params.logprobs or 0
    if wanted > (vocab_size if max_logprobs == -1 else max_logprobs):
        raise OptionError(
            f"logprobs={params.logprobs} is more than this engine gives (max_logprobs={max_logprobs}). Ask for fewer, "
            "or make the engine with a larger max_logprobs (-1: no limit)."
        )


def _with_logprobs(logits: Tensor, tokens: Tensor, count: int) -> Sampled:
    """The tokens with their log probabilities, and the `count` likeliest ones beside."""
    raw = logits if logits.dtype == torch.float64 else logits.float()
    own = raw.gather(1, tokens.clamp(min=0)[:, None])
    top = raw.topk(min(count, raw.shape[1]), dim=-1)
    logprobs = torch.cat([own, top.values], dim=1) - raw.logsumexp(-1, keepdim=True)
    ranks = 1 + (raw > own).sum(-1)
    return Sampled(tokens, torch.cat([tokens[:, None], top.indices], dim=1), logprobs.float(), ranks)


def record(sampled: Sampled | None, wanted: int | None, seat: int) -> TokenLogprobs | None:
    """What a row asked for of what all get, on the host."""
    if sampled is None or wanted is None:
        return None
    assert sampled.ids is not None
    assert sampled.logprobs is not None
    assert sampled.ranks is not None
    count = sampled.ids.shape[1] if wanted == -1 else wanted + 1
    ids, logprobs = (tuple(x[seat, :count].tolist()) for x in (sampled.ids, sampled.logprobs))
    return TokenLogprobs(ids, logprobs, int(sampled.ranks[seat]))
