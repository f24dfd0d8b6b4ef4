"""The batched sampler: one token for each row from its logits, on the device, without the host ever waiting for it.

What is drawn is a function of the row alone. For a row with logits x, temperature T and s = (x - max x) / T:

1. A token stays if s >= log min_p; of these, if fewer than top_k have a larger s; of these, if those with a larger s
   hold less than top_p of the probability that is left. (The order and the definitions are vLLM's. By value, so tokens
   of equal logits stay or leave together; the likeliest ones always stay.)
2. Of those that stay, the one with the largest s + g is taken, lowest id first, where g is Gumbel noise: that is a draw
   from the softmax of s over them. At temperature 0 there is no noise.

g is a hash of (seed, index of the token in its request, token id), so neither the batch, the seat nor a preemption
changes it. The probability that top_p looks at is added up in integers, which no order of additions rounds differently.
So for equal logits the tokens are equal on one kind of device; on another, log and exp may differ in the last digit.

A row whose logits hold NaN, or nothing finite to choose from, gets NO_TOKEN; no other row sees anything of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat.engine.params import SamplingParams
from kvpleat.errors import OptionError

NO_TOKEN = -1  # in place of a token where the logits allow none
MAX_END_IDS = 32  # tokens that min_tokens can hold back, for each seat
_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd: steps by it visit all states (SplitMix64)
_MASS_BITS = 44  # probabilities are multiples of 2**-44 of the largest
MAX_VOCAB = 1 << (63 - _MASS_BITS)  # so many of them add up to less than 2**63


class Mode(NamedTuple):
    """What a batch asks for together. Rows that ask for less get the same tokens in any mode that serves them.

    Args:
        draws: whether any row is not greedy.
        filters: whether any row has a top_k or a top_p; it costs a sort.
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
        self._steps = torch.arange(1, vocab_size + 1, device=device).mul_(_GOLDEN)

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
        self._top_k[index].fill_(min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size)
        self._top_p[index].fill_(params.top_p)
        self._log_min_p[index].fill_(math.log(params.min_p) if params.min_p > 0 else -math.inf)
        self._seed[index].fill_(_signed(request_seed))
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

    @property
    def mode(self) -> Mode:
        """The least mode that serves all seats in use. Known on the host."""
        if self._mode is None:
            self._mode = Mode()
            for needs in self._needs.values():
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
        wide = logits.dtype in (torch.float32, torch.float64) or mode == Mode()  # the likeliest is the same in 16 bits
        raw = logits if wide else logits.float()
        allowed = self._without_ends(raw, seats, counters) if mode.holds else raw
        largest, tokens = allowed.max(dim=-1)  # of equal ones the first; NaN where the row has one
        if mode.draws:
            tokens = self._draw(allowed, largest, seats, counters, mode.filters)
        tokens = torch.where(torch.isfinite(largest), tokens, NO_TOKEN)
        return Sampled(tokens) if mode.logprobs is None else _with_logprobs(raw, tokens, mode.logprobs)

    def _draw(self, allowed: Tensor, largest: Tensor, seats: Tensor, counters: Tensor, filters: bool) -> Tensor:
        """[n] the winners of the race."""
        scores = (allowed - largest[:, None]).float().div_(self._temperature[seats][:, None])
        least = self._log_min_p[seats]
        if filters:
            least = threshold(scores, least, self._top_k[seats], self._top_p[seats])
        scores.masked_fill_(scores < least[:, None], -math.inf)
        noise = gumbel(self._seed[seats], counters, self._steps)
        return scores.add_(noise.mul_(self._noise[seats][:, None])).argmax(dim=-1)

    def _without_ends(self, logits: Tensor, seats: Tensor, counters: Tensor) -> Tensor:
        """Logits with -inf for the end tokens of rows that have not reached their min_tokens. NaN stays, to be seen."""
        ids = self._end_ids[seats]
        ends = logits.gather(1, ids)
        waits = (counters < self._min_tokens[seats])[:, None] & ~torch.isnan(ends)
        return logits.scatter(1, ids, ends.masked_fill(waits, -math.inf))


def threshold(scores: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least score that stays in each row.

    Args:
        scores: [n, V] float32, the largest of each row 0.
        log_min_p: [n] float32.
        top_k: [n] int64 in 1 .. V.
        top_p: [n] float64 in (0, 1].

    Returns:
        [n] float32.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    least = torch.maximum(log_min_p, ordered.gather(1, top_k[:, None] - 1)[:, 0])
    mass = ordered.exp().mul_(2.0**_MASS_BITS).masked_fill_(ordered < least[:, None], 0.0).long()
    total = mass.cumsum(-1)
    before = total - mass
    # Of equal scores the first one has before it exactly what is larger, so the last one that stays here is of a score
    # that stays, and of the least.
    kept = (before < top_p[:, None] * total[:, -1:]).sum(-1, keepdim=True)
    nucleus = ordered.gather(1, (kept - 1).clamp_(min=0))[:, 0]
    return torch.where(top_p < 1, torch.maximum(least, nucleus), least)


def gumbel(seeds: Tensor, counters: Tensor, steps: Tensor) -> Tensor:
    """[n, V] standard Gumbel noise, a function of (seed, counter, column).

    Each (seed, counter) gives a state, from which the columns are a run of SplitMix64.

    Args:
        seeds, counters: [n] int64.
        steps: [V] int64 multiples 1, 2, ... of the generator's increment.
    """
    state = _mix(_mix(seeds + _GOLDEN) + counters * _GOLDEN)
    bits = _mix(state[:, None] + steps)
    # Small numbers decide the race, and floats are finest there: -log(1 - u) is exact for small u.
    u = _shifted(bits, 11).float().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def request_seed(engine_seed: int, params: SamplingParams, number: int) -> int:
    """The seed of a request: its own, or one that follows from the engine's and the request's number in the engine."""
    if params.seed is not None:
        return _signed(params.seed)
    return int(_mix(_mix(torch.tensor([_signed(~engine_seed)])) + number * 2 + 1))


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


def _with_logprobs(raw: Tensor, tokens: Tensor, count: int) -> Sampled:
    """The tokens with their log probabilities, and the `count` likeliest ones beside."""
    own = raw.gather(1, tokens.clamp(min=0)[:, None])
    top = raw.topk(min(count, raw.shape[1]), dim=-1)
    logprobs = torch.cat([own, top.values], dim=1) - raw.logsumexp(-1, keepdim=True)
    ranks = 1 + (raw > own).sum(-1)
    return Sampled(tokens, torch.cat([tokens[:, None], top.indices], dim=1), logprobs.float(), ranks)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, constants of Stafford's mix 13), in wrapping int64."""
    state = (state ^ _shifted(state, 30)).mul_(-0x40A7B892E31B1A47)
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(-0x6B2FB644ECCEEE15)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: Tensor, bits: int) -> Tensor:
    """An unsigned shift to the right: torch's own repeats the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Any integer, modulo 2**64, as the int64 of the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
