"""Beginnings of texts that several requests share: where they part, and which of them lie computed in frozen rows.

A compressed cache cannot be cut back to fewer tokens: what has left is gone. So it is frozen where others may want to
begin: where texts are known to part, at the end of a request (the next turn of a conversation begins with it), and in
long prompts now and then. Whoever begins like that starts from the longest frozen text.

All texts that wait, run or are frozen lie in one tree of tokens, compared token by token: an inner node is where some
part. The longest unused frozen row goes first when rows or pages are wanted. Whole numbers on the host.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpleat.engine.rows import Fork, Frozen, Plan, Row, Share

LEAST = 64  # tokens that have to be saved: as many take a step no longer than one does
BLOCK = 512  # where a chunk ends in the middle of a prompt, it ends at a multiple of it


@dataclass(eq=False)
class Node:
    """Where texts end or part.

    Args:
        tokens: since the parent. depth: since the beginning.

    Attributes:
        children: by first token. ends: rows whose prompts but for the last token end here. frozen: a row that did.
    """

    tokens: tuple[int, ...]
    parent: "Node | None"
    depth: int
    children: dict[int, "Node"] = field(default_factory=dict)
    ends: int = 0
    frozen: Frozen | None = None

    @property
    def parts(self) -> bool:
        """Whether several texts go on from here."""
        return len(self.children) + self.ends > 1

    def up(self) -> "Iterator[Node]":
        """This node and those above it, but for the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Prefixes:
    """Frozen rows, and the tree of all texts.

    Args:
        rows: of the pool that may be frozen; none: nothing is shared.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows = sorted(rows, reverse=True)
        self.on = bool(self._rows)
        self._root = Node((), None, 0)
        self._frozen: dict[Frozen, None] = {}  # the longest unused first

    @property
    def pages(self) -> int:
        """Pages that frozen rows hold, as far as is known."""
        shares: set[Share] = {share for frozen in self._frozen for share in frozen.shares}
        return sum(frozen.own for frozen in self._frozen) + sum(share.pages for share in shares)

    @property
    def full(self) -> bool:
        """Whether another row can be frozen only if one is dropped."""
        return not self._rows

    # ---- texts

    def add(self, row: Row) -> None:
        """A row waits with all tokens that it has, of which the last one has to be fed in any case."""
        if self.on:
            self.remove(row)
            row.node = self._at(row.tokens[:-1])
            row.node.ends += 1

    def remove(self, row: Row) -> None:
        """A row's text is of no interest any more."""
        if row.node is not None:
            row.node.ends -= 1
            self._prune(row.node)
            row.node = None

    def _at(self, tokens: Sequence[int]) -> Node:
        """The node of a text, made where there was none."""
        node = self._root
        while node.depth < len(tokens):
            first, parent = tokens[node.depth], node
            found = parent.children.get(first)
            if found is None:
                node = parent.children[first] = Node(tuple(tokens[parent.depth :]), parent, len(tokens))
                break
            same = _common(found.tokens, tuple(tokens[parent.depth : found.depth]))
            node = found
            if same < len(found.tokens):
                node = parent.children[first] = Node(found.tokens[:same], parent, parent.depth + same)
                node.children[found.tokens[same]], found.parent = found, node
                found.tokens = found.tokens[same:]
        return node

    def _prune(self, node: Node) -> None:
        """Take out nodes where nothing ends or parts any more."""
        while node.parent is not None and not node.ends and node.frozen is None and len(node.children) < 2:
            parent, first = node.parent, node.tokens[0]
            if node.children:
                (child,) = node.children.values()
                child.tokens, child.parent = node.tokens + child.tokens, parent
                parent.children[first] = child
                return
            del parent.children[first]
            node = parent

    # ---- where to begin, and where to freeze

    def find(self, row: Row) -> Frozen | None:
        """The longest frozen text that a row begins with."""
        node: Node
        for node in row.node.up() if self.on else ():
            if node.frozen is not None and node.frozen.ready:
                self._touch(node)
                return node.frozen
        return None

    def promised(self, row: Row, running: Iterable[Row]) -> bool:
        """Whether more of what a row begins with will be frozen soon."""
        if not self.on:
            return False
        passing = {node: other for other in running if other.fed < other.goal for node in other.node.up()}
        for node in row.node.up():
            if node.frozen is not None:
                return not node.frozen.ready
            if node.parts and node in passing and passing[node].fed < node.depth and self._saved(node) >= LEAST:
                return True
        return False

    def point(self, row: Row, start: int, stop: int) -> int | None:
        """Where in the tokens after `start`, up to `stop`, a row should be frozen; None: nowhere."""
        if not self.on:
            return None
        above: list[Node] = [node for node in row.node.up() if node.depth <= stop]
        for node in reversed(above):
            if node.depth > start and node.parts and self._saved(node) >= LEAST:
                return node.depth
        block = stop // BLOCK * BLOCK
        last = max((node.depth for node in above if node.frozen is not None), default=0)
        return block if stop < row.goal and block > start and block - last >= LEAST else None

    def _saved(self, node: Node) -> int:
        """Tokens that need not be computed again if a text is frozen there."""
        return node.depth - next((above.depth for above in node.up() if above.frozen is not None), 0)

    # ---- frozen rows

    def freeze(self, row: Row, seat: int, length: int) -> Fork | None:
        """Let a row be frozen as it is after so many tokens; None: there is one already, or no room."""
        if self.full:
            return None
        node = self._at(row.tokens[:length])
        if node.frozen is not None:
            return None
        frozen = node.frozen = Frozen(self._rows.pop(), node, row)
        self._frozen[frozen] = None
        self._touch(node)
        return Fork(row, seat, frozen)

    def _touch(self, node: Node) -> None:
        """What a frozen row began with outlives it."""
        for each in node.up():
            if each.frozen is not None:
                self._frozen[each.frozen] = self._frozen.pop(each.frozen)

    def oldest(self, but: Iterable[Frozen]) -> Frozen | None:
        """The longest unused one, if there is one that can be dropped."""
        return next((frozen for frozen in self._frozen if frozen.ready and frozen not in but), None)

    def made_by(self, row: Row) -> list[Frozen]:
        """Those that a row was."""
        return [frozen for frozen in self._frozen if frozen.maker is row]

    def drop(self, frozen: Frozen) -> int:
        """A frozen row is no more. Returns pages that are free then."""
        del self._frozen[frozen]
        self._rows.append(frozen.row)
        frozen.node.frozen = None
        self._prune(frozen.node)
        return frozen.leave()

    def settle(self, plan: Plan, forked: Iterable[tuple[int, int]], void: list[Fork]) -> int:
        """What became of the forks of a step.

        Args:
            forked: of each, pages that are shared (-1: it did not happen) and pages of the copy. void: forks of another
                step, that did not happen.

        Returns:
            pages that are free therefore.
        """
        freed = sum(self.drop(fork.frozen) for fork in void)
        for fork, (shared, held) in zip(plan.forks, forked, strict=True):
            row, seat, frozen = fork
            begins, there = fork in plan.begun, row.seat == seat and frozen in self._frozen
            if not begins and shared < 0:
                freed += self.drop(frozen)
            elif not begins:
                frozen.ready, frozen.held, frozen.movable = True, held, held - shared
            if shared >= 0 and there and begins:
                row.join(frozen, shared)
            elif shared >= 0 and there:
                frozen.join(row, shared)
        return freed


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two texts have in common at the beginning."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
