"""Who runs in a step, and with how many tokens: whole numbers on the host, which knows what the device counted one step
late.

A step holds one token of every row that decodes, and chunks of prompts with what is left of its budget of tokens. The
host does not wait: it plans a step while the one before it runs, as if that had gone well and nothing had ended in it.

Pages are counted twice. What a policy is expected to hold, corrected by what rows were seen to hold, says who is
admitted. What a step really takes is settled on the device: a step that lacks pages changes nothing and says so one
step late. Then it and the one planned since are taken back, the youngest rows give their pages up, wait at the head of
the queue with all tokens they have, and feed them again. A row that lacks pages even alone ends with "memory".

Where the device has no memory left to compute a step, some layers hold its tokens and others do not. So all rows give
their pages up and feed their tokens again, in steps half as large, which grow after a while. A row of
which one token alone finds none, twice, ends with "memory".
"""

from collections import deque

from kvpleat.engine.pages import Pages
from kvpleat.engine.reckoned import Reckoned
from kvpleat.engine.rows import Counters, Decoding, Feed, Fork, Frozen, Limits, Move, Plan, Row, whole
from kvpleat.engine.sizes import width

CAUTIOUS = 32  # steps in which every stream is reckoned to take a page, after a chunk found too few
PATIENCE = (16, 1024)  # steps that go well before larger ones are tried again: at first, and after many failures
KEPT = ("stop", "length", "abort")  # rows that ended like this may be what others begin with


class Scheduler:
    """Rows that wait and rows that run, both in order of arrival.

    Attributes:
        limits: what there is. waiting, running: rows. pages: what is free, and what rows may begin with. preemptions:
            how often a row gave its pages up.
        step_tokens: of a step, fewer than there may be after one that there was no memory for.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.pages = Pages(limits)
        self.preemptions = 0
        self.step_tokens = limits.step_tokens
        self._well, self._patience = 0, PATIENCE[0]  # steps since then, and how many have to be
        self._seats = list(range(limits.seats))  # free ones
        self._leaving: list[tuple[int, Row]] = []  # to be released
        self._plan = Plan([], False, False)  # the step that is planned
        self._clear = False
        self._caution = 0
        self._reckoned = Reckoned(limits)

    def add(self, row: Row) -> None:
        """Let a row wait."""
        self.pages.prefixes.add(row)
        self.waiting.append(row)

    def finish(self, row: Row, reason: str) -> None:
        """A row ends; its seat and pages are free with the next step."""
        row.reason = reason
        if row.seat is None:
            self.waiting.remove(row)
            self.pages.prefixes.remove(row)
        else:
            self._leave(row)

    def schedule(self, runs: bool) -> Plan:
        """The next step. runs: whether another one is under way."""
        plan = self._plan = Plan(self._leaving, self._clear, self._caution > 0)
        self._leaving, self._clear, self._caution = [], False, max(0, self._caution - 1)
        self.pages.begin(plan, runs)
        self._empty(plan.released)
        self._close_up()
        if not runs and not self.running:
            self.pages.free = self.limits.pages - self.pages.prefixes.pages
        self._decode(plan)
        self.pages.room(plan.pages + len(plan.tokens) * self.limits.streams)
        if self._go_on_with_prompts() and not (plan.clear and self.running):
            self._admit()
        if self.running and not plan.size and not runs:
            self._make_progress()
        self.pages.end(plan)
        return plan

    def _decode(self, plan: Plan) -> None:
        """A token of every row that has one which was drawn, and wants another."""
        rows = [row for row in self.running if row.goal <= row.fed < row.drawn < row.limit]
        starts, numbers = whole([row.fed for row in rows]), whole([row.drawn - row.prompt_size for row in rows])
        plan.tokens = Decoding(rows, [row.seat for row in rows], starts, numbers)  # type: ignore[misc]  # they have one
        plan.size, plan.pages = len(rows), self._reckoned.growth(starts, plan.cautious)
        for row in rows:
            row.fed += 1
            row.drawn += 1

    def _empty(self, released: list[tuple[int, Row]]) -> None:
        forks = [self.pages.leave(row, seat, row.reason in KEPT) for seat, row in released]
        self._plan.kept += [fork for fork in forks if fork is not None]
        self._seats += [seat for seat, _ in released]
        self._seats.sort(reverse=True)  # the lowest is taken first: steps are as wide as the highest in use

    def _close_up(self) -> None:
        """Rows on the highest seats go on in free ones, where that makes steps narrower: costs as much as a few small
        kernels. Those that are about to be frozen, or to begin with what is, stay: what becomes of it is told by
        seat."""
        narrow, seats = width(len(self.running), self.limits.seats), [row.seat or 0 for row in self.running]
        above = [row for row, seat in zip(self.running, seats, strict=True) if seat >= narrow]
        if not above or any(row.fed <= row.goal for row in above):
            return
        for row in above:
            assert row.seat is not None
            move = Move(row, row.seat, self._seats.pop())
            row.seat = move.target
            self._plan.moved.append(move)
        self._seats = sorted([*self._seats, *(move.source for move in self._plan.moved)], reverse=True)

    def _go_on_with_prompts(self) -> bool:
        """Chunks of rows that are in the middle of their prompts. Returns whether all of them could go on."""
        return all(self._chunk(row) for row in [row for row in self.running if row.fed < row.goal])

    def _admit(self) -> None:
        """Rows that wait get seats, in order, while there are seats, tokens, and pages for all to go on a while."""
        pages = self.pages
        owed = self._reckoned.owed(self.running) if self.waiting and self._seats else 0
        while self.waiting and self._seats and len(self.running) < self.step_tokens and not self._in_the_middle():
            row = self.waiting[0]
            if pages.prefixes.promised(row, self.running):
                return
            frozen = pages.prefixes.find(row)
            owed += int(self._reckoned.needs([row])[0]) - (frozen.held - frozen.movable if frozen else 0)
            if self.running and (owed > pages.most or owed > pages.room(owed, frozen)):
                return
            row.seat = self._seats[-1]
            if not self._chunk(row):
                row.seat = None
                return
            self._seats.pop()
            self.running.append(self.waiting.popleft())
            self._plan.seated.append(row)

    def _in_the_middle(self) -> bool:
        """Whether a row has a part of its prompt, where much is remembered of each such row."""
        return self.limits.calendar is not None and any(0 < row.fed < row.prompt_size for row in self.running)

    def _chunk(self, row: Row) -> bool:
        """As much of a row's prompt as there are tokens and pages for. Returns whether that is anything."""
        plan, limits, frozen = self._plan, self.limits, self._beginning(row)
        fed, pages = (frozen.node.depth, frozen.movable) if frozen else (row.fed, 0)
        pages += plan.pages
        count = min(row.goal - fed, self.step_tokens - plan.size)
        if count <= 0:
            return False
        fitting = self.pages.room(pages + limits.most_pages(count), frozen) - pages
        count = min(count, max(0, fitting) // limits.streams * limits.page_size)
        if count <= 0:
            return False
        if limits.calendar is not None:
            count = limits.calendar.next(row.prompt_size, fed, fed + count) - fed
        point = self.pages.prefixes.point(row, fed, fed + count)
        count = count if point is None else point - fed
        if frozen is not None:
            assert row.seat is not None
            plan.begun.append(Fork(row, row.seat, frozen))
            row.join(frozen)
        if row.drawn == row.prompt_size:
            row.cached = fed if row.fed == 0 else row.cached
        row.fed, plan.pages = fed, pages + limits.most_pages(count)
        feed = self._feed(row, count)
        plan.chunks.append(feed)
        if point is not None and (fork := self.pages.freeze(row, feed.seat, point)):
            plan.taken.append(fork)
        return True

    def _beginning(self, row: Row) -> Frozen | None:
        """What a row that has nothing yet begins with, if there are pages for that and a page more for each stream."""
        frozen = self.pages.prefixes.find(row) if row.fed == 0 else None
        needed = self._plan.pages + (frozen.movable if frozen else 0) + self.limits.streams
        return frozen if frozen is not None and self.pages.room(needed, frozen) >= needed else None

    def _make_progress(self) -> None:
        """Nobody decodes, nothing runs, and there are too few pages for whoever is in the middle of a prompt."""
        plan = self._plan
        while len(self.running) > 1 and self.pages.room(self.limits.streams) < self.limits.streams:
            self._preempt()
            plan.released.append(self._leaving[-1])
            self._empty([self._leaving.pop()])
        if not self._chunk(self.running[0]):
            plan.chunks.append(self._feed(self.running[0], 1))  # there may be room in the pages that it has

    def _feed(self, row: Row, count: int) -> Feed:
        assert row.seat is not None
        draws = row.fed + count == row.drawn
        feed = Feed(row, row.seat, row.fed, count, draws, row.drawn - row.prompt_size)
        row.fed += count
        row.drawn += draws
        self._plan.size += count
        return feed

    # ---- what became of a step

    def settle(self, plan: Plan, counters: Counters, later: Plan | None) -> bool:
        """Take in what the device counted at the end of a step.

        Args:
            later: the step that was planned since, if one was.

        Returns:
            whether the step went well. If not, nothing of it, nor of the later one, has happened, but that rows left.
        """
        self._look(plan, counters, later or Plan([], False, False))
        void = later.kept + later.taken if later and counters.missing else []
        for each in (later, plan) if counters.missing else ():
            for row in each.take_back() if each else ():
                self._wait_again(row)
        left = (later.freed if later else 0) + self.pages.prefixes.settle(plan, counters.forked, void)
        self.pages.free = counters.free + left
        if counters.missing:
            self._give_way(plan, counters, left)
            return False
        self._reckoned.correct(plan.tokens, counters.held)
        self._well += 1
        if self.step_tokens < self.limits.step_tokens and self._well >= self._patience:
            self.step_tokens, self._well = min(2 * self.step_tokens, self.limits.step_tokens), 0
        return True

    def _look(self, plan: Plan, counters: Counters, later: Plan) -> None:
        """What rows hold, those that have moved since in the seats that they had."""
        held, before = counters.held, {move.row: move.source for move in later.moved}
        new = {*later.seated, *before}
        for row, source in before.items():
            row.held = held[source] if source < len(held) else row.held
        for row in self.running:
            seat = row.seat
            if seat is not None and seat < len(held) and row not in new:
                row.held = held[seat]
        if self.limits.calendar is None or counters.missing:
            return  # nobody asks for the longest stream
        for feed in plan.feeds:
            if before.get(feed.row, feed.row.seat) == feed.seat and feed.row not in later.seated:
                longest = counters.longest[feed.seat] * self.limits.page_size
                feed.row.longest, feed.row.counted = longest, feed.start + feed.size

    def start_over(self, plan: Plan) -> None:
        """The device had no memory for a step, and none is under way: all seats were emptied."""
        self._well, self._patience = 0, min(2 * self._patience, PATIENCE[1])
        while self.running:
            self._preempt()
        for _, row in self._leaving:
            row.leave()
        self._seats, self._leaving, self._clear = list(range(self.limits.seats)), [], False
        self.pages.start_over(self.waiting)
        self.step_tokens = max(1, self.step_tokens // 2)
        if plan.size == 1 and plan.feeds[0].row.reason is None:
            row, start = plan.feeds[0].row, plan.feeds[0].start
            if row.stuck == start:
                self.finish(row, "memory")
                self.step_tokens = self.limits.step_tokens
            row.stuck = start

    def _give_way(self, plan: Plan, counters: Counters, left: int) -> None:
        """There were too few pages: frozen rows go, or a chunk waits and is reckoned with care, or the youngest rows
        go. left: pages of rows that have left since."""
        self._clear = True
        lacking = counters.missing - left - sum(row.own for _, row in self._leaving)
        missing = self.pages.give_way(lacking)
        if missing <= 0 < lacking:
            return
        if plan.chunks and not plan.cautious and len(self.running) > 1:
            self._caution = CAUTIOUS
            return
        while missing > 0 and len(self.running) > 1:
            missing -= self._preempt()
        alone = self.running and counters.free + self.running[0].held == self.limits.pages
        if missing > 0 and alone:
            self.finish(self.running[0], "memory")

    def _preempt(self) -> int:
        """The youngest row gives up its seat and pages. No step is under way that could draw a token of it. Returns
        pages that nobody else has."""
        row = self.running[-1]
        self.preemptions += 1
        row.needs = max(row.needs, row.held + self.limits.streams)
        self._wait_again(row)
        return row.own

    def _wait_again(self, row: Row) -> None:
        """A row leaves its seat, and waits at the head of the queue."""
        self._leave(row)
        row.fed, row.goal, row.drawn = 0, len(row.tokens), len(row.tokens)
        self.pages.prefixes.add(row)
        self.waiting.appendleft(row)

    def _leave(self, row: Row) -> None:
        assert row.seat is not None
        self._leaving.append((row.seat, row))
        row.seat, row.longest, row.counted = None, 0, 0
        self.running.remove(row)
