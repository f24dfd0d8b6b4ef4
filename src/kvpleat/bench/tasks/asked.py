"""Tasks of one shape: a long context, questions about it, short answers. Two forms tell what a policy could know.

known: the question is the end of the prompt, so that the policy compresses with it in view. after: the context is
compressed first, and the question comes as a further turn.
"""

import random
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from kvpleat.bench.methods import Session
from kvpleat.bench.tasks.base import Item, Observation, Source, Task, Trial, greedy, memory


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        tokens: of the question, up to where the answer begins.
        references: right answers.
        group: what the question adds to the item's group (its depth, say).
    """

    tokens: list[int]
    references: list[str]
    group: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A context and the questions about it."""

    context: list[int]
    questions: list[Question]


class AskedTask(Task):
    """A task that asks.

    Attributes:
        answer_tokens: how long an answer may be.
        stop: where an answer ends, or None.
    """

    answer_tokens: int = 32
    stop: str | None = None
    kinds: int = 1  # kinds of items of each length (the depths, say): `count` items of each are made

    @abstractmethod
    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        """Item `index` of a length: context and the longest question together at most `length` tokens."""

    @abstractmethod
    def score(self, answer: str, question: Question) -> dict[str, float]:
        """Scores of an answer."""

    def num_items(self, source: Source) -> int:
        """Items of each length and form."""
        return source.count

    def items(self, source: Source) -> list[Item]:
        items = []
        for length in source.lengths:
            for i in range(self.num_items(source)):
                asked = self.build(source, length, i, random.Random(f"{self.name}/{length}/{i}/{source.seed}"))
                for form in source.forms:
                    group = {"length": length, "form": form}
                    items.append(Item(f"{self.name}/{form}/{length}/{i}", group, asked))
        return items

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        asked: Asked = item.content
        if item.group["form"] == "known":
            question = asked.questions[sum(item.id.encode()) % len(asked.questions)]
            return [self._ask_known(trial, asked, question)]

        def act(session: Session) -> list[Observation]:
            session.prefill(trial.tensor(asked.context))
            after = session.memory()
            found = []
            for number, question in enumerate(asked.questions):
                with session.fork() as fork:
                    answer, _ = greedy(
                        trial, fork, fork.prefill(trial.tensor(question.tokens)), self.answer_tokens, self.stop
                    )
                    scores = self.score(answer, question)
                    found.append(Observation(scores, memory(fork.memory(), after), f"/{number}", question.group))
            return found

        result: list[Observation] = trial.run(act)
        return result

    def _ask_known(self, trial: Trial, asked: Asked, question: Question) -> Observation:
        def act(session: Session) -> Observation:
            logits = session.prefill(trial.tensor(asked.context + question.tokens))
            after = session.memory()
            answer, _ = greedy(trial, session, logits, self.answer_tokens, self.stop)
            return Observation(self.score(answer, question), memory(session.memory(), after), group=question.group)

        result: Observation = trial.run(act)
        return result
