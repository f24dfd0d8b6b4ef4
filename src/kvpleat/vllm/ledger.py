"""What requests are charged, in blocks, in the scheduler's process. Nothing here imports vLLM.

A block of vLLM is room for `block_size` tokens of a request that is not compressed: one page of every stream. Which
pages a request really has, the workers' pool decides; to the scheduler blocks are money. A request is charged

    blocks it was reported to hold after t tokens + ceil((n - t) / block_size)

for n tokens: the second part is what the tokens since then can take if none of their entries leaves, in the worst
stream of all. So the pages of all requests can never be more than the pool has, whatever gates decide, and no entry
has to leave before its time. The price is small: a decoding request is charged a block more than it holds, and the
tokens of a prompt that is being computed are charged in full until the workers reported what is left of them.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary


@dataclass
class Account:
    """One request while it has blocks. seat: its row of the workers' pool. birth: which of the requests that ever sat
    there. tokens, blocks: as last reported. held: blocks that it has."""

    seat: int
    birth: int
    tokens: int = 0
    blocks: int = 0
    held: int = 0


@dataclass
class Changes:
    """What workers do before a step. released: seats whose rows end. seated: (seat, first block) of rows that begin."""

    released: list[int] = field(default_factory=list)
    seated: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Blocks that a request held after so many of its tokens: the most of any worker that said so. by: how many did."""

    birth: int
    tokens: int
    blocks: int
    by: int = 1

    def __or__(self, other: "Report") -> "Report":
        """Both, of different workers. They may have looked at different steps: the earlier one bounds both."""
        if self.birth != other.birth:
            return max(self, other, key=lambda x: x.birth)
        return Report(self.birth, min(self.tokens, other.tokens), max(self.blocks, other.blocks), self.by + other.by)


class Ledger:
    """Accounts of all requests that have blocks.

    Args:
        seats: rows of the workers' pool. block_size: tokens.
    """

    def __init__(self, seats: int, block_size: int) -> None:
        self.block_size, self.workers = block_size, 1
        self._free = list(range(seats))
        self._accounts: dict[str, Account] = {}
        self._births = 0
        self._changes = Changes()
        self._freed = 0

    def __contains__(self, request: str) -> bool:
        return request in self._accounts

    def __getitem__(self, request: str) -> Account:
        return self._accounts[request]

    def dense(self, tokens: int) -> int:
        """Blocks of so many tokens without compression."""
        return -(-tokens // self.block_size)

    def charge(self, request: str, tokens: int) -> int:
        """Blocks that a request must have before it is computed up to `tokens` tokens."""
        account = self._accounts.get(request)
        if account is None:
            return self.dense(tokens)
        return max(1, min(self.dense(tokens), account.blocks + self.dense(max(0, tokens - account.tokens))))

    def begin(self, request: str, first_block: int) -> None:
        """A request got its first block, and takes a seat."""
        self._births += 1
        account = Account(heapq.heappop(self._free), self._births)
        self._accounts[request] = account
        self._changes.seated.append((account.seat, first_block))

    def end(self, request: str) -> None:
        """A request gives its blocks back: it is finished, or was preempted."""
        account = self._accounts.pop(request, None)
        if account is None:
            return
        heapq.heappush(self._free, account.seat)
        self._changes.seated = [x for x in self._changes.seated if x[0] != account.seat]
        if account.seat not in self._changes.released:  # workers can empty a row once
            self._changes.released.append(account.seat)

    def take_changes(self) -> Changes:
        """What became of seats since this was last asked."""
        changes, self._changes = self._changes, Changes()
        return changes

    def held(self, request: str, blocks: int, freed: int = 0) -> None:
        """Note that a request has so many blocks now, after some came back."""
        self._freed += freed
        if request in self._accounts:
            self._accounts[request].held = blocks

    def charged(self) -> tuple[int, int]:
        """Blocks of all requests, and how many came back from them since this was last asked."""
        freed, self._freed = self._freed, 0
        return sum(account.held for account in self._accounts.values()), freed

    def report(self, reports: Iterable[tuple[str, Report]]) -> None:
        """Take in what workers said. Of requests that ended meanwhile, or of too few workers, it means nothing."""
        for request, said in reports:
            account = self._accounts.get(request)
            if account is not None and account.birth == said.birth and said.by >= self.workers:
                account.tokens, account.blocks = said.tokens, said.blocks


ledgers: WeakKeyDictionary[object, Ledger] = WeakKeyDictionary()
"""By vLLM's block pool: the manager of the cache and the connector find each other there."""
