"""Are answers the same alone, in a batch, and after rows gave their pages up? `kvpleat.bench.soak --only identical`

Greedy answers to random prompts, policy by policy. Logits are seen as log probabilities of the likeliest tokens, of
each token up to the first that differs: what follows that has other tokens before it.
"""

import itertools
import random
from typing import Any, NamedTuple

import torch

from kvpleat.bench.soak_load import LONGEST, NAMES, Served, careless, core_for, failing, served
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams, TokenLogprobs

COUNT, ANSWER, KNOWN = 12, 48, 8  # requests, tokens of an answer, log probabilities that are compared
TIGHT = 1.2  # pages of the pool that is too small, over those that one sequence needs
BREAKS = (8, 16)  # forwards that find no memory, so that all rows begin again, beside those that lack pages
# Share of equal tokens, and difference. An H100 in bfloat16 gave 80% and 0.27 at worst (2026-11-26), in float32 100%.
ALLOWED = {torch.float32: (1.0, 1e-4), torch.float16: (0.5, 0.5), torch.bfloat16: (0.65, 0.6)}

Answers = dict[str, list[tuple[int, TokenLogprobs]]]


class Compared(NamedTuple):
    """Tokens that are the same and all of them, until each answer's first difference; the largest difference of a log
    probability; and how often a row gave its pages up."""

    same: int
    tokens: int
    largest: float
    preemptions: int


def prompts(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Of many lengths."""
    chance = random.Random(0)
    lengths = [1, 5, 16, 17, *(chance.randrange(20, LONGEST - ANSWER) for _ in range(COUNT - 4))]
    return {str(i): tuple(chance.randrange(3, vocabulary) for _ in range(n)) for i, n in enumerate(lengths)}


def answers(core: EngineCore, asked: dict[str, tuple[int, ...]]) -> Answers:
    """Of requests that all run at once."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=KNOWN, ignore_eos=True, detokenize=False)
    for name, prompt in asked.items():
        core.add(Request(name, prompt, params))
    found: Answers = {name: [] for name in asked}
    while core.unfinished:
        for news in core.step():
            found[news.request_id] += zip(news.token_ids, news.logprobs or [], strict=True)
    core.step()
    return found


def difference(mine: Answers, wanted: Answers, preemptions: int) -> Compared:
    """What differs."""
    same, tokens, largest = 0, 0, 0.0
    for name, whole in wanted.items():
        tokens += len(whole)
        for (token, found), (other, known) in zip(mine[name], whole, strict=False):
            theirs = dict(zip(known.ids, known.logprobs, strict=True))
            pairs = zip(found.ids, found.logprobs, strict=True)
            largest = max([largest, *(abs(x - theirs[i]) for i, x in pairs if i in theirs)])
            if token != other:
                break
            same += 1
    return Compared(same, tokens, largest, preemptions)


def compare(it: Served, name: str) -> dict[str, Compared]:
    """One policy: against each request alone."""
    asked, options = prompts(int(it.model.config.vocab_size)), {"max_logprobs": KNOWN}
    core = core_for(it, name, None, seats=1, **options)
    alone: Answers = {}
    for key, prompt in asked.items():
        alone |= answers(core, {key: prompt})
    core.close()
    found = {}
    for what, room, seats in (("alone again", None, 1), ("in a batch", None, COUNT), ("preempted", TIGHT, COUNT)):
        core = core_for(it, name, room, seats=seats, **options)
        breaks = BREAKS if what == "preempted" else ()
        with careless(), failing(it, map(breaks.__contains__, itertools.count()).__next__):
            together = answers(core, asked)
        found[what] = difference(together, alone, core.scheduler.preemptions)
        core.close()
    return found


def main(args: Any) -> int:
    """Prints a table; returns 1 if more differs than rounding explains."""
    dtype = getattr(torch, args.dtype)
    it = served(args.model, torch.device(args.device), dtype)
    share, most = ALLOWED[dtype]
    print(f"{args.device}, {args.dtype}, {args.model or 'random weights'}: {COUNT} answers of {ANSWER} tokens")
    print(f"{'policy':10} {'':12} {'same tokens':>11} {'largest difference of a log probability':>40} {'preempted':>9}")
    wrong = False
    for name in args.policy or NAMES:
        for what, found in compare(it, name).items():
            off = found.same < share * found.tokens or found.largest > most
            off |= what == "alone again" and (found.same < found.tokens or found.largest > 0)
            off |= (what == "preempted") != (found.preemptions > 0)
            wrong |= off
            line = (
                f"{name:10} {what:12} {found.same / found.tokens:>11.1%} {found.largest:>40.1e} {found.preemptions:>9}"
            )
            print(line + "  FAILED" * off, flush=True)
    return int(wrong)
