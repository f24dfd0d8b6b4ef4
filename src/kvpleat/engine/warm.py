"""The first step of each kind, before anybody waits for it: on a GPU kernels are compiled when they are first launched,
which takes seconds, and graphs are captured.

All goes through `Runner.launch`, as in serving, with rows of a few tokens; then all is as empty as before. Where the
pool has too few pages for a step nothing comes of it, but its kernels were launched.
"""

from collections.abc import Iterator

import torch

from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.rows import Decoding, Feed, Fork, Frozen, Limits, Plan, Row, whole
from kvpleat.engine.runner import Runner
from kvpleat.engine.sampling import Mode
from kvpleat.engine.sizes import ladder

WARMED = ("cuda",)  # kinds of devices on which this takes time
PROMPT = 6  # tokens, in two chunks of PART
PART = 3
CAPTURED = (Mode(), Mode(draws=True))  # graphs of each width
COMPILED = (Mode(draws=True, filters=True), Mode(holds=True))


@torch.inference_mode()
def warm_up(runner: Runner, limits: Limits, graph_prompts: bool = True) -> None:
    """Launch everything once.

    Args:
        runner: of an engine that has not begun. limits: what its scheduler shares out.
        graph_prompts: whether steps with prompts get graphs, each of which makes the start longer.

    Raises:
        What a device says that has no memory left.
    """
    for plan in plans(limits) if limits.length > PROMPT else ():
        runner.launch(plan)
    for n in reversed(ladder(limits.seats)):  # the largest first: the others fit into its memory
        for mode in CAPTURED:
            runner.draw(n, mode)
    for mode in COMPILED:
        runner.draw(limits.seats, mode)
    runner.start_over()
    if graph_prompts:
        runner.graph_mixed(limits.step_tokens)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def plans(limits: Limits) -> Iterator[Plan]:
    """A prompt in two chunks, a token alone, one beside a prompt, a row that is frozen, one that begins with it, one
    that stays frozen as it leaves; then a prompt in every seat."""
    first, second = _row("first", PROMPT), _row("second", PROMPT)
    frozen = [Frozen(limits.seats + i, None, first) for i in range(min(2, limits.frozen))]
    taken = [Fork(first, 0, each) for each in frozen]
    yield _plan(chunks=[Feed(first, 0, 0, PART, False, 0)], taken=taken[:1])
    yield _plan(chunks=[Feed(first, 0, PART, PROMPT - PART, True, 0)])
    yield _plan(tokens=_token(first, 0))
    if limits.seats > 1:
        yield _plan(tokens=_token(first, 1), chunks=[Feed(second, 1, 0, PROMPT, True, 0)])
        begun = [Fork(second, 1, each) for each in frozen[:1]]
        start = PART if begun else 0
        chunk = Feed(second, 1, start, PROMPT - start, True, 0)
        yield _plan(released=[(0, first), (1, second)], kept=taken[1:], begun=begun, chunks=[chunk])
    everywhere = [(seat, first) for seat in range(limits.seats)]
    rows = [_row(str(seat), 1) for seat in range(limits.seats)]
    yield _plan(released=everywhere, chunks=[Feed(row, seat, 0, 1, True, 0) for seat, row in enumerate(rows)])


def _row(name: str, prompt: int) -> Row:
    return Row(Request(f"warm-up: {name}", (0,) * prompt, SamplingParams()), 0, prompt + 2)


def _token(row: Row, number: int) -> Decoding:
    return Decoding([row], [0], whole([PROMPT + number]), whole([1 + number]))


def _plan(
    released: list[tuple[int, Row]] | None = None,
    tokens: Decoding | None = None,
    chunks: list[Feed] | None = None,
    kept: list[Fork] | None = None,
    begun: list[Fork] | None = None,
    taken: list[Fork] | None = None,
) -> Plan:
    plan = Plan(released or [], True, False, [], tokens or Decoding(), chunks or [])
    plan.kept, plan.begun, plan.taken = kept or [], begun or [], taken or []
    plan.size = sum(feed.size for feed in plan.feeds)
    return plan
