"""The ledger against workers that are played in whole numbers, and whose streams grow in the worst way allowed.

Several workers lag behind the scheduler and behind each other; what they say comes late, out of order, or from some of
them only.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpleat.vllm.ledger import Changes, Ledger, Report

PAGE, STREAMS, SEATS, BLOCKS = 4, 3, 4, 24


@dataclass
class Request:
    """tokens: computed, or on their way. held: blocks. birth: as the ledger says."""

    tokens: int
    held: int
    birth: int
    first: int


@dataclass
class Step:
    """What the scheduler sends. fed: (name, seat, birth, tokens, new tokens). held: blocks of all requests by birth."""

    changes: Changes
    fed: list[tuple[str, int, int, int, int]]
    held: dict[int, int]


@dataclass
class Row:
    """A request as a worker has it."""

    name: str
    birth: int
    tokens: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * STREAMS)
    pages: list[int] = field(default_factory=lambda: [0] * STREAMS)

    @property
    def blocks(self) -> int:
        return -(-sum(self.pages) // STREAMS)


class Worker:
    """Steps that wait, rows by seat, and what was not said yet."""

    def __init__(self) -> None:
        self.steps: deque[Step] = deque()
        self.rows: dict[int, Row] = {}
        self.unsaid: deque[dict[str, Report]] = deque()

    def run(self, stays: list[float], gives_back: bool) -> None:
        """The oldest step: all new tokens go in, then any entries leave. Pages come back only if `gives_back`. All rows
        are reported, those too that the step does not feed."""
        step = self.steps.popleft()
        assert len(set(step.changes.released)) == len(step.changes.released), "a row is released twice"
        for seat in step.changes.released:
            self.rows.pop(seat, None)
        fed = {seat: (name, birth) for name, seat, birth, _, _ in step.fed}
        for seat, _ in step.changes.seated:
            assert seat not in self.rows, "two requests sit in one row"
            self.rows[seat] = Row(*fed[seat])
        for number, (_, seat, birth, tokens, new) in enumerate(step.fed):
            row = self.rows[seat]
            assert (row.birth, row.tokens + new) == (birth, tokens), "a step is not what follows"
            row.tokens = tokens
            row.lengths = [n + new for n in row.lengths]
            row.pages = [max(p, -(-n // PAGE)) for p, n in zip(row.pages, row.lengths, strict=True)]
            self.check(step)
            keep = [stays[(number * STREAMS + i) % len(stays)] for i in range(STREAMS)]
            row.lengths = [max(1, round(n * share)) for n, share in zip(row.lengths, keep, strict=True)]
            if gives_back:
                row.pages = [-(-n // PAGE) for n in row.lengths]
        self.unsaid.append({row.name: Report(row.birth, row.tokens, row.blocks) for row in self.rows.values()})

    def check(self, step: Step) -> None:
        """No request has more pages than it was charged for when the step was planned."""
        for row in self.rows.values():
            assert sum(row.pages) <= step.held[row.birth] * STREAMS, "a request has pages that it was not charged"


class Scheduling(RuleBasedStateMachine):
    """vLLM's scheduler in short: it feeds requests whose blocks are there, and ends others."""

    @initialize(workers=st.integers(1, 3))
    def start(self, workers: int) -> None:
        self.ledger = Ledger(SEATS, PAGE)
        self.ledger.workers = workers
        self.workers = [Worker() for _ in range(workers)]
        self.requests: dict[str, Request] = {}
        self.waiting: list[dict[str, Report]] = []
        self.names = 0

    @property
    def free(self) -> int:
        return BLOCKS - sum(x.held for x in self.requests.values())

    @rule(new=st.lists(st.integers(1, 13), max_size=2), grown=st.lists(st.integers(0, 9), max_size=SEATS))
    def step(self, new: list[int], grown: list[int]) -> None:
        """Some requests grow, or give way where there are no blocks; others begin."""
        fed = []
        for name, size in zip(list(self.requests), grown, strict=False):
            request = self.requests[name]
            if size == 0:
                continue
            needed = self.ledger.charge(name, request.tokens + size)
            assert self.ledger.charge(name, request.tokens + size + 1) >= needed, "more tokens cost less"
            assert 1 <= needed <= -(-(request.tokens + size) // PAGE), "more than without compression"
            if needed - request.held > self.free:
                self.leave(name)
                continue
            request.held, request.tokens = needed, request.tokens + size
            account = self.ledger[name]
            fed.append((name, account.seat, account.birth, request.tokens, size))
        for size in new:
            needed = self.ledger.charge("new", size)
            if needed > self.free or len(self.requests) == SEATS:
                continue
            self.names += 1
            name = f"r{self.names}"
            self.ledger.begin(name, first_block=self.names)
            account = self.ledger[name]
            self.requests[name] = Request(size, needed, account.birth, self.names)
            fed.append((name, account.seat, account.birth, size, size))
        changes = self.ledger.take_changes()
        seated = dict(changes.seated)
        assert all(seated.get(self.ledger[n].seat) == self.requests[n].first for n, *_, t, s in fed if t == s)
        held = {x.birth: x.held for x in self.requests.values()}
        for worker in self.workers:
            worker.steps.append(Step(changes, fed, held))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def ends(self, data: Any) -> None:
        """A request is finished, aborted or preempted; if it goes on, then as one that begins."""
        self.leave(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(
        runs=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        says=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        stays=st.lists(st.sampled_from([1.0, 0.7, 0.5, 0.25, 0.0]), min_size=1, max_size=7),
        back=st.booleans(),
        late=st.booleans(),
    )
    def work(self, runs: list[int], says: list[int], stays: list[float], back: bool, late: bool) -> None:
        """Each worker runs some of the steps that were sent, and tells what it knows of some: one message of all."""
        message: dict[str, Report] = {}
        for worker, run, say in zip(self.workers, runs, says, strict=False):
            for _ in range(min(run, len(worker.steps))):
                worker.run(stays, back)
            mine: dict[str, Report] = {}
            for _ in range(min(say, len(worker.unsaid))):
                mine |= worker.unsaid.popleft()
            message |= {name: message[name] | said if name in message else said for name, said in mine.items()}
        if late:
            self.waiting.append(message)
        else:
            self.ledger.report(message.items())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def hear(self, data: Any) -> None:
        """A message arrives, in any order."""
        message = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.ledger.report(message.items())

    def leave(self, name: str) -> None:
        self.ledger.end(name)
        self.ledger.end(name)  # twice is no error
        del self.requests[name]
        assert name not in self.ledger

    @invariant()
    def seats_are_unique(self) -> None:
        if hasattr(self, "requests"):
            seats = [self.ledger[name].seat for name in self.requests]
            assert len(set(seats)) == len(seats)
            assert set(seats) <= set(range(SEATS))
            assert self.free >= 0

    def teardown(self) -> None:
        """All steps run and all requests end: every row is empty, every seat free."""
        if not hasattr(self, "requests"):
            return
        for name in list(self.requests):
            self.leave(name)
        self.step([], [])
        for worker in self.workers:
            while worker.steps:
                worker.run([1.0], False)
            assert not worker.rows
        for i in range(SEATS):
            self.ledger.begin(f"last{i}", i)
        assert sorted(self.ledger[f"last{i}"].seat for i in range(SEATS)) == list(range(SEATS))


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_reports_lower_the_charge_and_tokens_raise_it() -> None:
    """40 tokens of which 3 blocks are left: 3, and one more for every block of tokens since."""
    ledger = Ledger(2, 16)
    assert ledger.charge("a", 40) == 3
    ledger.begin("a", 7)
    ledger.report([("a", Report(ledger["a"].birth, 160, 3))])
    assert [ledger.charge("a", n) for n in (160, 161, 176, 177, 192)] == [3, 4, 4, 5, 5]
    assert ledger.charge("a", 17) == 2, "never more than without compression"


def test_of_several_workers_all_must_have_said_something() -> None:
    """The earlier step, and the most blocks, bound all of them."""
    ledger = Ledger(1, 16)
    ledger.workers = 2
    ledger.begin("a", 7)
    first, second = Report(ledger["a"].birth, 160, 3), Report(ledger["a"].birth, 176, 2)
    ledger.report([("a", second)])
    assert ledger.charge("a", 192) == 12, "one of two workers is not enough"
    ledger.report([("a", first | second)])
    assert ledger.charge("a", 192) == 3 + 2
    assert first | second == second | first == Report(first.birth, 160, 3, by=2)


def test_what_was_said_of_an_earlier_life_of_a_request_means_nothing() -> None:
    """A request that was preempted begins again, in a seat of which another worker still speaks."""
    ledger = Ledger(1, 16)
    ledger.begin("a", 7)
    late = Report(ledger["a"].birth, 160, 1)
    ledger.end("a")
    ledger.begin("a", 8)
    ledger.report([("a", late)])
    assert ledger.charge("a", 160) == 10
    newer = Report(ledger["a"].birth, 16, 1)
    assert late | newer == newer | late == newer, "nor together with what is said of this one"


def test_a_seat_that_comes_and_goes_between_two_steps_is_released_once() -> None:
    """Workers free the pages of each row that is named, and must not be told to twice."""
    ledger = Ledger(1, 16)
    ledger.begin("a", 1)
    ledger.take_changes()
    ledger.end("a")
    ledger.begin("b", 2)
    ledger.end("b")
    ledger.begin("c", 3)
    changes = ledger.take_changes()
    assert changes.released == [0]
    assert changes.seated == [(0, 3)]


def test_there_are_no_more_seats_than_were_asked_for() -> None:
    """vLLM never runs more requests than max_num_seqs; if it did, none would sit in another's row."""
    ledger = Ledger(1, 16)
    ledger.begin("a", 1)
    with pytest.raises(IndexError):
        ledger.begin("b", 2)
