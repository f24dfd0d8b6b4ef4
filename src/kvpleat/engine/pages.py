"""Pages that are free, as the host reckons them, and frozen rows, which use what nobody needs: they are dropped before
anybody waits for pages or gives some up."""

from collections.abc import Iterable

from kvpleat.engine.prefixes import LEAST, Prefixes
from kvpleat.engine.rows import Fork, Frozen, Limits, Plan, Row


class Pages:
    """What there is, between two looks at the device.

    Attributes:
        prefixes: what rows may begin with. free: pages after the last step that ended, with those of all who left
            since. under_way: pages that the step which runs is reckoned to take.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.start_over(())

    def start_over(self, waiting: Iterable[Row]) -> None:
        """The device was emptied, and these rows wait."""
        seats, frozen = self._limits.seats, self._limits.frozen
        self.prefixes = Prefixes(range(seats, seats + frozen))
        self.free, self.under_way = self._limits.pages, 0
        self._dropped: list[int] = []  # frozen rows that leave with the next step
        self._freed = 0  # pages that are free then
        self._begun: list[Fork] = []  # rows that begin with frozen ones in the step that is planned
        for row in waiting:
            row.node = None
            self.prefixes.add(row)

    def begin(self, plan: Plan, runs: bool) -> None:
        """A step is planned. runs: whether another one is under way."""
        self.under_way = self.under_way if runs else 0
        self._begun = plan.begun

    def end(self, plan: Plan) -> None:
        """It was."""
        self.under_way = plan.pages
        plan.dropped, plan.freed = self._dropped, self._freed
        self._dropped, self._freed = [], 0

    @property
    def left(self) -> int:
        """Pages that nobody has a claim to."""
        return self.free - self.under_way

    @property
    def most(self) -> int:
        """What could be left, if all frozen rows were dropped."""
        return self.left + self.prefixes.pages

    def room(self, pages: int, but: Frozen | None = None) -> int:
        """Pages that are left, once frozen rows are dropped for there to be so many: all but one, and those that rows
        begin with."""
        while self.left < pages and (frozen := self._oldest(but)):
            self.drop(frozen)
        return self.left

    def forget(self) -> None:
        """Drop all frozen rows that nobody is about to begin with."""
        while frozen := self._oldest():
            self.drop(frozen)

    def drop(self, frozen: Frozen) -> int:
        """Drop a frozen row. Returns pages that are free then."""
        self._dropped.append(frozen.row)
        return self.count(self.prefixes.drop(frozen))

    def count(self, freed: int) -> int:
        """Pages that come free with the next step."""
        self.free += freed
        self._freed += freed
        return freed

    def give_way(self, missing: int) -> int:
        """Drop frozen rows for so many pages. Returns how many are still missing."""
        while missing > 0 and (frozen := self._oldest()):
            missing -= self.drop(frozen)
        return missing

    def leave(self, row: Row, seat: int, keep: bool) -> Fork | None:
        """A row leaves its seat. keep: it stays frozen, if there is room."""
        if row.reason == "error":
            for frozen in self.prefixes.made_by(row):
                self.drop(frozen)
        fork = self.freeze(row, seat, row.fed) if keep else None
        if fork is not None:
            fork.frozen.held, row.held = row.held, 0
        self.count(row.leave())
        if row.reason is not None:
            self.prefixes.remove(row)
        return fork

    def freeze(self, row: Row, seat: int, length: int) -> Fork | None:
        """Have a row frozen in the planned step, in place of the longest unused one where there is no room."""
        if not self.prefixes.on or length < LEAST:
            return None
        if self.prefixes.full and (frozen := self._oldest()):
            self.drop(frozen)
        fork = self.prefixes.freeze(row, seat, length)
        if fork is not None:
            fork.frozen.join(row)
        return fork

    def _oldest(self, but: Frozen | None = None) -> Frozen | None:
        used = {fork.frozen for fork in self._begun} | ({but} if but else set())
        return self.prefixes.oldest(used)
