"""Drawing tokens: which ones stay in the race, and the race itself. What is computed, in torch, and where it runs.

For a row of logits x with largest one m, and temperature T, a token's score is s = (x - m) * (1 / T).

- `least_score` says from which score on tokens stay: s >= log min_p; of these, those that fewer than top_k exceed; of
  these, those whose betters hold less than top_p of the probability that is left. By value, so equals stay or leave
  together. Probabilities are added up in integers, which no order of additions rounds differently.
- `race` takes, of those, the largest s + g, lowest id first, where g is Gumbel noise: a draw from the softmax of s.

g is a hash of (seed, counter, token id) and of nothing else. On a GPU kernels compute it (sampling_triton.py), which
write next to nothing, and no row is sorted.
"""

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: steps by it visit all states (SplitMix64)
MIXED_BY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MOST_NOISE = 1 - 2.0**-24  # of a uniform number: the largest float below 1
MASS_BITS = 44  # probabilities are multiples of 2**-44 of the largest
MAX_VOCAB = 1 << (63 - MASS_BITS)  # so many of them add up to less than 2**63


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [n, V], and the first token that has it: [n] of their dtype, [n] int64.

    Of a row that holds NaN: something that is not finite, and any token.
    """
    if logits.device.type == "cuda":
        from kvpleat.kernels import sampling_triton

        return sampling_triton.highest(logits)
    values, tokens = logits.max(dim=-1)
    return values, tokens


def race(
    logits: Tensor, largest: Tensor, temperature: Tensor, least: Tensor, noise: Tensor, seeds: Tensor, counters: Tensor
) -> Tensor:
    """The winner of each row: [n] int64 in 0 .. V - 1 where the row is sound, anything where it is not.

    Args:
        logits: [n, V] of any float dtype.
        largest: [n] of the same dtype, as `highest` says.
        temperature: [n] float32, above 0.
        least: [n] float32 score from which on tokens stay.
        noise: [n] float32 what noise is multiplied by: 1 to draw, 0 for the likeliest token.
        seeds, counters: [n] int64.
    """
    if logits.device.type == "cuda":
        from kvpleat.kernels import sampling_triton

        return sampling_triton.race(logits, largest, temperature, least, noise, state_of(seeds, counters))
    scores = _scores(logits, largest, temperature)
    scores.masked_fill_(scores < least[:, None], -math.inf)
    drawn = gumbel(state_of(seeds, counters), logits.shape[1])
    return scores.add_(drawn.mul_(noise[:, None])).argmax(dim=-1)


def least_score(
    logits: Tensor, largest: Tensor, temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """The least score that stays in each row: [n] float32.

    Args:
        logits, largest, temperature: as for `race`.
        log_min_p: [n] float32.
        top_k: [n] int64 in 1 .. V, where V is all.
        top_p: [n] float64 in (0, 1].
    """
    if logits.device.type == "cuda":
        from kvpleat.kernels import sampling_triton

        return sampling_triton.least_score(logits, largest, temperature, log_min_p, top_k, top_p)
    ordered = _scores(logits, largest, temperature).sort(dim=-1, descending=True).values
    least = torch.maximum(log_min_p, ordered.gather(1, top_k[:, None] - 1)[:, 0])
    mass = ordered.exp().mul_(2.0**MASS_BITS).masked_fill_(ordered < least[:, None], 0.0).long()
    upto = mass.cumsum(-1)
    # Of equals the first one has before it exactly what is larger, so the last one that stays here is of a score that
    # stays, and of the least.
    kept = (upto - mass < top_p[:, None] * upto[:, -1:]).sum(-1, keepdim=True)
    nucleus = ordered.gather(1, (kept - 1).clamp_(min=0))[:, 0]
    return torch.where(top_p < 1, torch.maximum(least, nucleus), least)


def gumbel(states: Tensor, size: int) -> Tensor:
    """[n, size] standard Gumbel noise: of each of the states [n] int64 a run of SplitMix64."""
    steps = torch.arange(1, size + 1, device=states.device).mul_(signed(GOLDEN))
    # Small numbers decide the race, and floats are finest there: -log(1 - u) is exact for small u.
    u = _shifted(mix(states[:, None] + steps), 11).float().add_(0.5).mul_(2.0**-53).clamp_(max=MOST_NOISE)
    return u.neg_().log1p_().neg_().log_().neg_()


def state_of(seeds: Tensor, counters: Tensor) -> Tensor:
    """[n] int64, from which the noise of a row follows."""
    return mix(mix(seeds + signed(GOLDEN)) + counters * signed(GOLDEN))


def mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, constants of Stafford's mix 13), in wrapping int64."""
    state = (state ^ _shifted(state, 30)).mul_(signed(MIXED_BY[0]))
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(signed(MIXED_BY[1]))
    return state.bitwise_xor_(_shifted(state, 31))


def signed(value: int) -> int:
    """Any integer, modulo 2**64, as the int64 of the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _scores(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """[n, V] float32."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (logits.to(wide) - largest[:, None].to(wide)).float().mul_(temperature.reciprocal()[:, None])


def _shifted(state: Tensor, bits: int) -> Tensor:
    """An unsigned shift to the right: torch's own repeats the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
