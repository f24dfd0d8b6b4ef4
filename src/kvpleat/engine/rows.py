"""The nouns of the scheduler: what there is, requests as rows, and what a step feeds. Whole numbers on the host."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpleat.engine.moments import Calendar
from kvpleat.engine.params import Request


def whole(numbers: list[int]) -> NDArray[np.int64]:
    """Whole numbers as an array, also none."""
    return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True)
class Limits:
    """What there is.

    Args:
        seats: rows that run at a time. step_tokens: of a step, no fewer. length: of a row, in tokens.
        pages: of the pool. page_size: entries of one. streams: of a row.
        expected: entries of a stream that a row of so many tokens is expected to hold, mean over streams.
        peak: those that a prompt of so many tokens needs on its way; None: as `expected` says.
        calendar: moments that a chunk must not go past; None: there are none.
        uneven: whether streams of a row differ in length, so that the last page of each is half full in the mean.
        frozen: rows of the pool, behind the seats, that keep beginnings of texts; 0: these are not shared.
    """

    seats: int
    step_tokens: int
    length: int
    pages: int
    page_size: int
    streams: int
    expected: Callable[[int], float]
    peak: Callable[[int], float] | None = None
    calendar: Calendar | None = None
    uneven: bool = False
    frozen: int = 0

    def pages_for(self, tokens: int) -> int:
        """Pages that a row of so many tokens is expected to hold."""
        entries = self.expected(tokens)
        if self.uneven:
            return math.ceil(self.streams * (entries / self.page_size + 0.5))
        return self.streams * math.ceil(entries / self.page_size)

    def pages_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """`pages_for` of each of many rows."""
        known = self._pages
        for count in set(tokens[known[tokens] < 0].tolist()):
            known[count] = self.pages_for(count)
        return known[tokens]

    @functools.cached_property
    def _pages(self) -> NDArray[np.int64]:
        """What `pages_for` says, by tokens, as far as it was asked; else -1."""
        return np.full(self.length + 1, -1)

    def peak_pages(self, tokens: int) -> int:
        """Pages that a prompt of so many tokens is expected to need on its way."""
        return 0 if self.peak is None else self.streams * -int(-self.peak(tokens) // self.page_size)

    def most_pages(self, count: int) -> int:
        """Pages that a chunk of so many tokens takes, if nothing leaves."""
        return self.streams * -(-count // self.page_size)


class Counters(NamedTuple):
    """What the device counted at the end of a step: free pages; pages that were missing, 0 if it went well; pages that
    the row in each seat holds, and those of its longest stream, as far as the step was wide; of each fork pages that
    are shared (-1: it did not happen) and pages that the copy has."""

    free: int
    missing: int
    held: list[int]
    longest: Sequence[int] = ()
    forked: Sequence[tuple[int, int]] = ()


@dataclass(eq=False)
class Share:
    """Pages that several have. holders: how many."""

    pages: int
    holders: int


@dataclass(eq=False, slots=True)
class Holder:
    """Who has pages.

    Attributes:
        held: pages, as far as the host knows. shares: of these, those that others have too.
    """

    held: int = field(init=False, default=0)
    shares: list[Share] = field(init=False, default_factory=list)

    @property
    def own(self) -> int:
        """Pages that nobody else has."""
        return max(0, self.held - sum(share.pages for share in self.shares))

    def leave(self) -> int:
        """Have no pages any more. Returns how many are free now."""
        freed, self.held = self.own, 0
        for share in self.shares:
            share.holders -= 1
            freed += 0 if share.holders else share.pages
        self.shares = []
        return freed

    def join(self, other: "Holder", pages: int = 0) -> None:
        """Share what another one shares, `pages` at least: more of its own become shared."""
        for share in self.shares:
            share.holders -= 1
        more = pages - sum(share.pages for share in other.shares)
        if more > 0:
            other.shares.append(Share(more, 1))
        self.shares = list(other.shares)
        for share in self.shares:
            share.holders += 1


@dataclass(eq=False, slots=True)
class Frozen(Holder):
    """A row of the pool that nobody runs: a text up to some token, for others to begin with.

    Args:
        row: of the pool. node: where its text is in the tree. maker: the row that it was.

    Attributes:
        ready: the device said that it is there. movable: pages that a row which begins with it takes at once.
    """

    row: int
    node: Any
    maker: "Row"
    ready: bool = False
    movable: int = 0


@dataclass(eq=False, slots=True)
class Row(Holder):
    """A request, from its arrival to its end.

    Args:
        request: what was asked. seed: of its sampling. limit: tokens at which it ends. ends: tokens that end it.

    Attributes:
        tokens: prompt and output, as far as the host knows. drawn: how many there are on the device. prompt_size:
            tokens of the prompt.
        goal: those to feed as a prompt. fed: those in the cache; both counts include the step that runs.
        seat: None while it waits. needs: pages that it gave up.
        longest: entries that its longest stream had room for when `counted` tokens were fed.
        stuck: position of a token that the device had no memory for, alone. reason: why it ended.
        cached: tokens of its prompt that others had computed. node: where its text is in the tree of texts.
    """

    request: Request
    seed: int
    limit: int
    ends: frozenset[int] = frozenset()
    tokens: list[int] = field(init=False)
    drawn: int = field(init=False)
    goal: int = field(init=False)
    prompt_size: int = field(init=False)
    fed: int = 0
    seat: int | None = None
    needs: int = 0
    longest: int = 0
    counted: int = 0
    stuck: int | None = None
    reason: str | None = None
    cached: int = 0
    node: Any = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.drawn = self.goal = self.prompt_size = len(self.tokens)

    def most_entries(self, tokens: int) -> int:
        """Entries that a stream has at most once so many tokens were fed."""
        return min(tokens, self.longest + tokens - self.counted)


class Feed(NamedTuple):
    """Tokens of a row in a step: `size` of them from position `start` on. draws: whether a token is drawn after the
    last one, number `number` of the row's output."""

    row: Row
    seat: int
    start: int
    size: int
    draws: bool
    number: int


@dataclass(eq=False)
class Decoding:
    """A token of each of n rows, that draw the next one: an object a row and step is more than the host has time for.
    As feeds when iterated.

    Args:
        rows, seats: whose they are. starts: [n] their positions. numbers: [n] of the tokens that are drawn, in the
            rows' outputs.
    """

    rows: list[Row] = field(default_factory=list)
    seats: list[int] = field(default_factory=list)
    starts: NDArray[np.int64] = field(default_factory=lambda: whole([]))
    numbers: NDArray[np.int64] = field(default_factory=lambda: whole([]))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Feed]:
        numbers = self.starts.tolist(), self.numbers.tolist()
        for row, seat, start, number in zip(self.rows, self.seats, *numbers, strict=True):
            yield Feed(row, seat, start, 1, True, number)


class Fork(NamedTuple):
    """A row in a seat, and the frozen one that it becomes, or that it begins with."""

    row: Row
    seat: int
    frozen: Frozen


class Move(NamedTuple):
    """A row that goes on in another seat, which is free."""

    row: Row
    source: int
    target: int


@dataclass
class Plan:
    """One step.

    Args:
        released: rows that leave before it, and their seats. clear: the flag of a step that failed is cleared.
        cautious: `pages` is all that the step could take.

    Attributes:
        seated: rows that get a seat. tokens, chunks: what is fed. size: tokens of both. pages: it is reckoned to take.
        dropped: frozen rows of the pool that leave before it. kept: rows that leave, but stay frozen. begun: rows that
            begin with frozen ones. taken: rows that are frozen at its end, and go on. moved: rows that get other seats
            before it, whatever becomes of it. freed: pages of all who leave.
    """

    released: list[tuple[int, Row]]
    clear: bool
    cautious: bool
    seated: list[Row] = field(default_factory=list)
    tokens: Decoding = field(default_factory=Decoding)
    chunks: list[Feed] = field(default_factory=list)
    size: int = 0
    pages: int = 0
    dropped: list[int] = field(default_factory=list)
    kept: list[Fork] = field(default_factory=list)
    begun: list[Fork] = field(default_factory=list)
    taken: list[Fork] = field(default_factory=list)
    moved: list[Move] = field(default_factory=list)
    freed: int = 0

    @property
    def forks(self) -> list[Fork]:
        """All, in the order in which the device tells what became of them."""
        return self.kept + self.begun + self.taken

    @property
    def feeds(self) -> list[Feed]:
        """All that is fed."""
        return [*self.tokens, *self.chunks]

    @property
    def width(self) -> int:
        """Seats up to the highest one that has something to feed."""
        return 1 + max(max(self.tokens.seats, default=-1), max((feed.seat for feed in self.chunks), default=-1))

    def take_back(self) -> list[Row]:
        """Nothing of it has happened. Returns rows that were to begin with others, the youngest first."""
        for feed in self.feeds:
            feed.row.drawn -= feed.draws
            feed.row.fed = feed.start
        return [fork.row for fork in reversed(self.begun) if fork.row.seat is not None]
