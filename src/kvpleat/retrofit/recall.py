"""Recall tasks: rows of real text with statements scattered in, and questions that need them thousands of tokens on.

A row is a function of (seed, index). Tasks of random kinds are drawn until they fill a share of the row. Statements go
to random depths of real text, some questions follow in the middle, and all of them come at the end, those of the middle
again. Answers are drawn at random, so that only the row itself can tell them.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpleat.errors import OptionError
from kvpleat.retrofit import data_kinds, data_series
from kvpleat.retrofit.data_frames import Chat, Frame, Plain, chat_turns, transcript
from kvpleat.retrofit.data_kinds import Ask, Task
from kvpleat.retrofit.data_store import TokenStore, end_tokens, start_tokens
from kvpleat.retrofit.data_words import Draw

Row = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]

SHORTEST = 256  # tokens of a row
KINDS: dict[str, Callable[[Draw], Task | None]] = {
    kind.__name__: kind
    for kind in (
        data_kinds.appointments,
        data_kinds.assignments,
        data_kinds.dwellings,
        data_kinds.errands,
        data_kinds.holders,
        data_kinds.identifiers,
        data_kinds.labels,
        data_kinds.profile,
        data_kinds.sayings,
        data_series.copies,
        data_series.counts,
        data_series.entries,
        data_series.frequent,
        data_series.glossary,
        data_series.inventories,
        data_series.passages,
        data_series.records,
        data_series.sequences,
        data_series.several,
        data_series.updates,
    )
}
LOADS = (0.1, 0.2, 0.3, 0.5)  # shares of a row that tasks may take
FULLEST = 0.9  # share of a row that tasks never exceed
CHARACTERS_PER_TOKEN = 2.5  # of the tasks' texts, a low guess: what does not fit is dropped
TOKENS_PER_ENTRY = 60  # of a row, for one entry of a long list at most
CHATS, TRANSCRIPTS = 0.2, 0.1  # shares of the rows
AGAIN = 0.3  # share of the questions that are asked in the middle as well
LATEST = 0.95  # depth of the last statement
SNAP = 200  # tokens to look ahead for the end of a sentence or line
PASSAGE = 160  # tokens of a paragraph at most
TRIES = 50


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a row.

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
    """A row and what it asks, in order: tokens [T] int64, weight [T] float32."""

    tokens: NDArray[np.int64]
    weight: NDArray[np.float32]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class _Piece:
    """Text for one place of a row, with an answer in it or none.

    Args:
        depth: 0 at the start of the row's real text, 1 at its end; beyond 1 only the order matters.
        task: its number; None: belongs to no task.
        kind: of the task.
        before, answer, after: the text.
        ask: of the answer; None: a statement.
    """

    depth: float
    task: int | None
    kind: str
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
                f"{type(tokenizer).__name__} is no fast tokenizer, so where answers stand cannot be told. Load the "
                "fast one, or pass recall_share=0."
            )
        self.tokenizer, self.store, self.length, self.seed = tokenizer, store, length, seed
        self.answer_weight = answer_weight
        self._turns = chat_turns(tokenizer)
        self._start = start_tokens(tokenizer)
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._between = _paragraph_break(tokenizer)
        self._is_end = np.array([t.endswith("\n") or t.rstrip().endswith((".", "!", "?")) for t in texts])

    def row(self, index: int) -> Row:
        """(tokens [T], doc_start [T], weight [T]) of row `index`; the row is one document."""
        made = self.compose(index)
        return made.tokens, np.zeros(self.length, np.int32), made.weight

    def compose(self, index: int) -> RecallRow:
        """Row `index` with what it asks."""
        source = random.Random(f"recall/{self.seed}/{index}")
        for _ in range(TRIES):
            draw = Draw(source, max(4, self.length // TOKENS_PER_ENTRY), self._passage)
            pieces = self._draw(draw)
            encoded = self.tokenizer(
                [piece.text for piece in pieces],
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            tokens = [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]
            kept = self._fit(pieces, tokens)
            if any(pieces[i].ask for i in kept):
                return self._lay(draw, pieces, tokens, encoded["offset_mapping"], kept)
        raise OptionError(
            f"length={self.length}: no recall task fitted into {FULLEST:.0%} of a row in {TRIES} tries, because this "
            "tokenizer needs very many tokens for a text. Choose a greater length, or recall_share=0."
        )

    def _draw(self, draw: Draw) -> list[_Piece]:
        """The pieces of a row: more tasks than it may hold, by a guess of their tokens."""
        frame = self._frame(draw)
        pieces = [_Piece(-1.0, None, "", frame.opening), _Piece(1.0, None, "", frame.closing)]
        budget = self.length * draw.pick(LOADS) * CHARACTERS_PER_TOKEN
        number = 0
        while budget > 0 or not number:
            name = draw.pick(list(KINDS))
            task = KINDS[name](draw)
            if task is None:
                continue
            new = list(_pieces(draw, frame, number, name, task))
            pieces += new
            budget -= sum(len(piece.text) for piece in new)
            number += 1
        return pieces

    def _frame(self, draw: Draw) -> Frame:
        if self._turns is not None and draw.chance(CHATS):
            return Chat(draw, self._turns)
        return Chat(draw, transcript(draw)) if draw.chance(TRANSCRIPTS) else Plain(draw)

    def _fit(self, pieces: list[_Piece], tokens: list[NDArray[np.int64]]) -> list[int]:
        """Which pieces the row holds, whole tasks only, in the order in which they come."""
        room = int(self.length * FULLEST)
        by_task: dict[int | None, list[int]] = defaultdict(list)
        for i, piece in enumerate(pieces):
            by_task[piece.task].append(i)
        kept: list[int] = []
        for members in by_task.values():
            size = sum(len(tokens[i]) for i in members)
            if size <= room:
                room -= size
                kept += members
        return sorted(kept, key=lambda i: pieces[i].depth)

    def _lay(
        self, draw: Draw, pieces: list[_Piece], tokens: list[NDArray[np.int64]], offsets: list[Any], kept: list[int]
    ) -> RecallRow:
        """Pieces and real text, one after the other."""
        start = [] if kept and self._start == tokens[kept[0]][:1].tolist() else self._start  # templates bring their own
        size = self.length - len(start) - sum(len(tokens[i]) for i in kept)
        filler = self._filler(draw, size)
        ends = np.flatnonzero(self._is_end[filler]) + 1
        parts, at, used = [np.asarray(start, np.int64)], len(start), 0
        weight = np.ones(self.length, np.float32)
        weight[0] = 0  # nothing predicts it
        stated: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
        answers = []
        for i in kept:
            piece, place = pieces[i], _snap(ends, pieces[i].depth, size)
            parts += [filler[used:place], tokens[i]]
            at, used = at + place - used, place
            if piece.ask is None:
                stated[piece.task].append((at, at + len(tokens[i])))
            else:
                first, end = _span(offsets[i], len(piece.before), len(piece.before) + len(piece.answer))
                weight[at + first : at + end] = self.answer_weight
                answers.append(Answer(piece.kind, piece.ask, (at + first, at + end), tuple(stated[piece.task])))
            at += len(tokens[i])
        parts.append(filler[used:])
        return RecallRow(np.concatenate(parts), weight, tuple(answers))

    def _filler(self, draw: Draw, size: int) -> NDArray[np.int64]:
        """`size` tokens of real text from one to four random places."""
        cuts = sorted(draw.between(0, size) for _ in range(draw.between(0, 3)))
        parts = []
        for low, high in zip([0, *cuts], [*cuts, size], strict=True):
            start = draw.random.randrange(self.store.num_tokens)
            parts.append(self.store.tokens.take(np.arange(start, start + high - low), mode="wrap"))
        filler = np.concatenate(parts).astype(np.int64)
        if self._between is not None:  # an end of text would end a turn of a chat, and what stands before it
            filler[np.isin(filler, [*self._start, *end_tokens(self.tokenizer)])] = self._between
        return filler

    def _passage(self, source: random.Random) -> str | None:
        """Whole sentences of real text, or None where there are none."""
        start = source.randrange(self.store.num_tokens)
        tokens = self.store.tokens[start : start + PASSAGE].astype(np.int64)
        ends = np.flatnonzero(self._is_end[tokens]) + 1
        if len(ends) < 2:
            return None
        text: str = self.tokenizer.decode(tokens[ends[0] : ends[-1]], skip_special_tokens=True)
        return text.strip() or None


def _paragraph_break(tokenizer: Any) -> int | None:
    """The token of an empty line, or of a new line, where the tokenizer has one."""
    for text in ("\n\n", "\n"):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and tokenizer.decode(ids) == text:
            return ids[0]
    return None


def _pieces(draw: Draw, frame: Frame, number: int, kind: str, task: Task) -> Iterator[_Piece]:
    """Statements in their order at random depths, questions behind them."""
    reach = draw.pick([LATEST, LATEST, 0.3])  # a task's statements may all stand early
    depths = sorted(draw.random.uniform(0, reach) for _ in task.statements)
    for depth, statement in zip(depths, task.statements, strict=True):
        yield _Piece(depth, number, kind, frame.state(draw, statement))
    for ask in task.asks:
        middle = [draw.random.uniform(depths[-1], 1)] if draw.chance(AGAIN) else []
        for depth in [*middle, 1 + draw.random.random()]:
            before, after = frame.ask(draw, ask, depth > 1)
            yield _Piece(depth, number, kind, before, ask.answer, after, ask)


def _snap(ends: NDArray[np.int64], depth: float, size: int) -> int:
    """The place of a depth in `size` tokens of real text, moved on to the end of a sentence or line if one is near."""
    if depth >= 1:
        return size
    place = max(0, int(depth * size))
    following = int(np.searchsorted(ends, place))
    return int(ends[following]) if depth > 0 and following < len(ends) and ends[following] - place < SNAP else place


def _span(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """(first token, end) of the tokens that hold characters begin to end."""
    inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > begin]
    return inside[0], inside[-1] + 1
