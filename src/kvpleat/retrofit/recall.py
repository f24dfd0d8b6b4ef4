"""Recall tasks: rows of real text with statements scattered in, and questions that need them thousands of tokens later."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpleat.errors import OptionError
from kvpleat.retrofit import data_kinds
from kvpleat.retrofit.data_kinds import Ask, Task
from kvpleat.retrofit.data_store import TokenStore, start_tokens
from kvpleat.retrofit.data_words import Draw

Row = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]

SHORTEST = 256  # tokens of a row
KINDS = {
    "assignments": data_kinds.assignments,
    "dwellings": data_kinds.dwellings,
    "holders": data_kinds.holders,
    "identifiers": data_kinds.identifiers,
    "labels": data_kinds.labels,
    "sayings": data_kinds.sayings,
}
LOADS = (0.1, 0.2, 0.3, 0.5)  # shares of a row that statements and questions may take
FULLEST = 0.9
CHARACTERS_PER_TOKEN = 2.5  # of the tasks' texts, a low guess: what does not fit is dropped
SNAP = 200  # tokens to look ahead for the end of a sentence or line
FRAMES = (
    "{q}\n{a}\n",
    "Q: {q}\nA: {a}\n",
    "Question: {q}\nAnswer: {a}\n",
    "{q} Answer: {a}\n",
    '{q}\n"{a}"\n',
    "{l} {a}{e}\n",
    "{l} {a}{e}\n",
    "{q} {l} {a}{e}\n",
    "{q}\n- {a}\n",
    "> {q}\n{a}\n",
    "{q} [{a}]\n",
    "**{q}** {a}\n",
    "Quiz: {q} Solution: {a}\n",
    '{q} {l} "{a}"{e}\n',
    "{q} -> {a}\n",
)
SEAMS = (("\n\n", "\n\n"), ("\n\n", "\n\n"), ("\n", "\n"), (" ", " "))
OPENINGS = (
    "Keep the details of what follows in mind: some of them are asked for at the end.\n\n",
    "You will be tested on small facts that stand between these paragraphs.\n\n",
    "A long read. Names, numbers and remarks in it matter later on.\n\n",
    "Instructions: read everything, then reply to the queries.\n\n",
)


@dataclass(frozen=True)
class Answer:
    """Where an answer stands.

    Args:
        kind: of its task.
        ask: question and answer.
        place: (first token, end) of the answer.
        statements: (first token, end) of each statement of the task.
    """

    kind: str
    ask: Ask
    place: tuple[int, int]
    statements: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RecallRow:
    """A row and what it asks: tokens [T] int64, weight [T] float32."""

    tokens: NDArray[np.int64]
    weight: NDArray[np.float32]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class _Piece:
    """Text to be put into a row: an answer stands between `before` and `after`; a statement has none."""

    depth: float
    task: int
    before: str
    answer: str = ""
    after: str = ""
    ask: Ask | None = None

    @property
    def text(self) -> str:
        return self.before + self.answer + self.after


class RecallRows:
    """Rows of recall tasks, each a function of (seed, index).

    Args:
        tokenizer: a fast one of transformers, the one the store was made with.
        store: texts to hide statements in.
        length: tokens of a row (T).
        seed: of everything that is drawn.
        answer_weight: what a token of an answer counts in `loss_weight`.
    """

    def __init__(
        self, tokenizer: Any, store: TokenStore, length: int, seed: int = 0, *, answer_weight: float = 5.0
    ) -> None:
        if length < SHORTEST:
            raise OptionError(
                f"length={length}: a row of recall tasks needs at least {SHORTEST} tokens. Choose a greater length, or "
                "recall_share=0."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise OptionError(
                f"{type(tokenizer).__name__} is no fast tokenizer, so where answers stand cannot be told. Load the fast "
                "one, or pass recall_share=0."
            )
        self.tokenizer, self.store, self.length, self.seed = tokenizer, store, length, seed
        self.answer_weight = answer_weight
        self._start = start_tokens(tokenizer)
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._is_end = np.array([t.endswith("\n") or t.rstrip().endswith((".", "!", "?")) for t in texts])

    def row(self, index: int) -> Row:
        """(tokens [T], doc_start [T], weight [T]) of row `index`; the row is one document."""
        made = self.compose(index)
        return made.tokens, np.zeros(self.length, np.int32), made.weight

    def compose(self, index: int) -> RecallRow:
        """Row `index` with what it asks."""
        draw = Draw(random.Random(f"recall/{self.seed}/{index}"), max(4, self.length // 100))
        kinds, pieces = self._draw(draw)
        encoded = self.tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = encoded["input_ids"]
        kept = self._fit(pieces, [len(one) for one in ids])
        head = [*self._start]
        room = self.length - len(head) - sum(len(ids[i]) for i in kept)
        filler = self._filler(draw, room)
        order = sorted(kept, key=lambda i: pieces[i].depth)
        parts: list[NDArray[Any]] = [np.asarray(head, np.int64)]
        weight = np.ones(self.length, np.float32)
        weight[0] = 0
        at, used = len(head), 0
        ends = np.flatnonzero(self._is_end[filler]) + 1
        stated: dict[int, list[tuple[int, int]]] = {}
        answers = []
        for i in order:
            place = self._snap(ends, pieces[i].depth, room)
            parts.append(filler[used:place])
            at += place - used
            used = place
            parts.append(np.asarray(ids[i], np.int64))
            stop = at + len(ids[i])
            piece = pieces[i]
            if piece.ask is None:
                stated.setdefault(piece.task, []).append((at, stop))
            else:
                begin, end = _span(encoded["offset_mapping"][i], len(piece.before), len(piece.before + piece.answer))
                weight[at + begin : at + end] = self.answer_weight
                answers.append(Answer(kinds[piece.task], piece.ask, (at + begin, at + end), tuple(stated[piece.task])))
            at = stop
        parts.append(filler[used:])
        return RecallRow(np.concatenate(parts), weight, tuple(answers))

    def _draw(self, draw: Draw) -> tuple[list[str], list[_Piece]]:
        budget = self.length * draw.pick(LOADS) * CHARACTERS_PER_TOKEN
        kinds: list[str] = []
        pieces: list[_Piece] = []
        characters = 0
        while not kinds or characters < budget:
            kind = draw.pick(sorted(KINDS))
            new = list(_pieces(draw, len(kinds), KINDS[kind](draw)))
            kinds.append(kind)
            pieces += new
            characters += sum(len(piece.text) for piece in new)
        return kinds, pieces

    def _fit(self, pieces: list[_Piece], sizes: list[int]) -> list[int]:
        """The pieces of as many tasks as the row holds, by their order."""
        room = int(self.length * FULLEST)
        by_task: dict[int, list[int]] = {}
        for i, piece in enumerate(pieces):
            by_task.setdefault(piece.task, []).append(i)
        kept: list[int] = []
        for members in by_task.values():
            room -= sum(sizes[i] for i in members)
            if room < 0:
                break
            kept += members
        return kept

    def _filler(self, draw: Draw, size: int) -> NDArray[np.int64]:
        """`size` tokens of the store from a random place on."""
        start = draw.random.randrange(self.store.num_tokens)
        return self.store.tokens.take(np.arange(start, start + size), mode="wrap").astype(np.int64)

    def _snap(self, ends: NDArray[np.int64], depth: float, room: int) -> int:
        place = int(depth * room)
        if depth >= 1:
            return room
        next_end = int(np.searchsorted(ends, place))
        return int(ends[next_end]) if next_end < len(ends) and ends[next_end] - place < SNAP else place


def _pieces(draw: Draw, number: int, task: Task) -> list[_Piece]:
    depths = sorted(draw.random.random() * 0.95 for _ in task.statements)
    found = []
    for depth, statement in zip(depths, task.statements, strict=True):
        before, after = draw.pick(SEAMS)
        found.append(_Piece(depth, number, before + statement + after))
    for ask in task.asks:
        if draw.chance(0.3):
            found.append(_asked(draw, number, ask, draw.random.uniform(depths[-1], 0.99)))
        found.append(_asked(draw, number, ask, 1.0))
    return found


def _asked(draw: Draw, number: int, ask: Ask, depth: float) -> _Piece:
    before, _, after = draw.pick(FRAMES).partition("{a}")
    before, after = (part.format(q=ask.question, l=ask.lead, e=ask.end) for part in (before, after))
    return _Piece(depth, number, "\n\n" + before, ask.answer, after, ask)


def _span(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """(first token, end) of the tokens that hold characters begin to end."""
    inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > begin]
    return inside[0], inside[-1] + 1
