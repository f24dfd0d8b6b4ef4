"""How much there is of everything: pages for the memory that was given, the longest sequence, and whether it fits."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from kvpleat import accounting
from kvpleat.cache.memory import physical_memory
from kvpleat.engine import sliding
from kvpleat.engine.moments import Calendar, decides
from kvpleat.engine.observed import sample_bytes
from kvpleat.engine.rows import Limits
from kvpleat.errors import OptionError, OutOfMemoryError
from kvpleat.hf.families import ModelFacts
from kvpleat.kernels import decode
from kvpleat.kernels.device_pool import pool_bytes
from kvpleat.policies.base import Policy
from kvpleat.types import KVShape

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
OUT_OF_MEMORY = "out of memory|allocate memory|alloc_failed"  # what CUDA, its libraries, Triton and the CPU say
GPU_SHARE, CPU_SHARE = 0.8, 0.25  # of the memory that is free, or that the machine has
COARSE = 32  # widths up to it are powers of two, and four to an octave from there on, where rows nobody has cost time
FROZEN, FROZEN_SHARE = 256, 0.02  # frozen rows at most, and of the memory what says where their pages are


def parse_bytes(text: int | str) -> int:
    """Bytes from a number or from text such as "20GiB" (powers of two) or "20 GB" (of ten).

    Raises:
        OptionError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS or isinstance(text, bool):
        raise OptionError(f'kv_memory={text!r} is no amount of memory. Pass bytes, or text such as "20GiB".')
    return int(float(found[1]) * UNITS[found[2].upper()])


def memory_for(kv_memory: int | str | None, device: torch.device) -> int:
    """Bytes for the cache: what was asked for, or four fifths of a GPU's free memory, or a quarter of the machine's. No
    more is taken of it than all seats can ever use."""
    if kv_memory is not None:
        return parse_bytes(kv_memory)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    return int(physical_memory() * CPU_SHARE)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that a device has no memory left."""
    while error is not None:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if known or (isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)):
            return True
        error = error.__cause__ or error.__context__
    return False


def does_not_fit(kv_memory: int | str | None, device: torch.device) -> OutOfMemoryError:
    """An engine could not be made for want of memory."""
    there = f"the machine has {accounting.human_bytes(physical_memory())}"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the attempt had taken
        free, whole = map(accounting.human_bytes, torch.cuda.mem_get_info(device))
        there = f"{free} of {whole} are free now"
    return OutOfMemoryError(
        f"kv_memory={kv_memory!r}: {device} ran out of memory while the cache and the graphs of steps were made. The "
        f"model is as it was; {there}. Pass a smaller kv_memory (a step needs room beside it) or max_num_seqs, or "
        "enforce_eager=True, which makes no graphs."
    )


def check_counts(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Refuse steps that could not hold a token of every request, or none."""
    if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
        raise OptionError(
            f"max_num_seqs={max_num_seqs}, max_num_batched_tokens={max_num_batched_tokens}: a step holds a token of "
            "every request that runs. Pass at least 1, and no fewer tokens than requests."
        )


def length_for(max_model_len: int | None, facts: ModelFacts) -> int:
    """Longest sequence in tokens."""
    if max_model_len is None:
        return facts.max_positions
    if not 2 <= max_model_len <= facts.max_positions:
        raise OptionError(
            f"max_model_len={max_model_len}: this {facts.family} model knows {facts.max_positions} positions, and a "
            "sequence has a prompt and an answer. Pass 2 or more, or None for all that it knows."
        )
    return max_model_len


def ladder(most: int) -> list[int]:
    """Widths of steps, the last one `most`."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(width(sizes[-1] + 1, most))
    return sizes


def width(seats: int, most: int) -> int:
    """The narrowest step of the ladder that covers so many seats, one at least."""
    octave = 1 << max(0, seats - 1).bit_length()
    step = max(1, octave // 8) if octave > COARSE else octave
    return min(most, -(-seats // step) * step)


def fixed_bytes(
    policy: Policy, facts: ModelFacts, seats: int, step_tokens: int, length: int, frozen: int = 0
) -> dict[str, int]:
    """Bytes of what the cache needs on the device beside its pages, by what it is."""
    found = pool_bytes(sliding.whole(facts), policy.delayed, seats + frozen, 0, length)[1]
    work = sum(decode.room_bytes(n, sliding.whole(facts), facts.device) for n in ladder(seats))
    queries = seats * accounting.query_bytes(facts.shape, policy.observation_window)
    samples = 0
    if policy.observation_window and decides(policy, facts.shape):
        samples = sample_bytes(facts.shape, seats, step_tokens, length)
    return {
        **found,
        "work lists of attention": work,
        "remembered queries": queries,
        "queries sampled of prompts": samples,
        "sliding windows": sliding.fixed_bytes(facts, seats + frozen, length),
    }


def limits(
    policy: Policy, facts: ModelFacts, kv_memory: int | str | None, seats: int, step_tokens: int, length: int,
    sharing: bool = False,
) -> Limits:  # fmt: skip
    """What the scheduler shares out: pages for what `fixed_bytes` leaves of the memory.

    Args:
        sharing: whether rows are frozen, where the state follows from tokens alone: as many as fit beside what has to.

    Raises:
        OptionError: not even one sequence of `length` tokens is expected to fit.
    """
    shape, memory = sliding.whole(facts), memory_for(kv_memory, facts.device)
    longest = shape.num_streams * -(-length // shape.page_size)
    most = seats * longest  # all that rows that run could ever use
    fixed, page = fixed_bytes(policy, facts, seats, step_tokens, length), pool_bytes(shape, policy.delayed, 0, 1, 0)[0]
    at_moments = decides(policy, facts.shape)
    found = Limits(
        seats=seats,
        step_tokens=step_tokens,
        length=length,
        pages=min(max(0, memory - sum(fixed.values())) // page, most),
        page_size=shape.page_size,
        streams=shape.num_streams,
        expected=_over_all_layers(policy.expected_entries, facts),
        peak=_over_all_layers(policy.peak_entries, facts) if at_moments else None,
        calendar=Calendar(policy, facts.shape) if at_moments else None,
        uneven=policy.delayed is not None,
    )
    needed = min(max(found.pages_for(length), found.peak_pages(length)) + shape.num_streams, most)
    if found.pages < needed:
        taken = ", ".join(f"{accounting.human_bytes(size)} of {name}" for name, size in fixed.items() if size)
        raise OptionError(
            f"kv_memory={memory if kv_memory is None else kv_memory!r} holds {taken} for {seats} sequences of {length} "
            f"tokens, and then {found.pages} pages of {accounting.human_bytes(page)}. One sequence of {length} tokens "
            f"is expected to need {needed} under {policy.name}, so it could not end. Pass at least "
            f'kv_memory="{-(-(needed * page + sum(fixed.values())) // 2**20)}MiB", a smaller max_num_seqs or '
            "max_model_len, or a policy that keeps less."
        )
    if sharing and found.calendar is None:
        fixed_with = [sum(fixed_bytes(policy, facts, seats, step_tokens, length, frozen).values()) for frozen in (0, 1)]
        row, left = fixed_with[1] - fixed_with[0], memory - fixed_with[0] - needed * page
        frozen = max(0, min(FROZEN, int(memory * FROZEN_SHARE) // row, left // row))
        pages = (memory - fixed_with[0] - frozen * row) // page
        return replace(found, frozen=frozen, pages=min(pages, most + min(frozen, seats) * longest))
    return found


def _over_all_layers(entries: Callable[[int, KVShape], float], facts: ModelFacts) -> Callable[[int], float]:
    """Entries of a stream by tokens, mean over all layers, of what a policy says about those that it sees."""
    return functools.cache(lambda tokens: sliding.mean_entries(facts, entries(tokens, facts.shape), tokens))
