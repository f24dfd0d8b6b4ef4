"""Many turns on one cache: a story among other text is compressed once, then questions follow, turn after turn."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpleat.bench import corpus, metrics
from kvpleat.bench.methods import Session
from kvpleat.bench.tasks.base import Item, Observation, Source, Task, Trial, greedy, memory
from kvpleat.errors import OptionError

TURNS = 12
DRIFT_TURNS = 20
ANSWER_TOKENS = 24
INTRODUCTION = "Here are several texts. Afterwards questions are asked about one of them.\n\n"
ABOUT = '\n\nThe questions are about the story that begins with "{beginning}". Answer each with a few words.'
TURN = "\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Dialogue:
    """A context, and turns of (question tokens, right answer)."""

    context: list[int]
    turns: list[tuple[list[int], str]]


class MultiTurn(Task):
    """F1 by turn, the model's own answers staying in the cache. CoQA's format (arXiv 1808.07042): a list of objects
    with `story` and `turns` (`question`, `answer`)."""

    name: ClassVar[str] = "multiturn"
    summary: ClassVar[str] = "a story compressed once, then up to 12 questions on the same cache: F1 by turn"
    turns: ClassVar[int] = TURNS

    def items(self, source: Source) -> list[Item]:
        stories = [s for s in read_stories(source.multiturn) if len(s["turns"]) >= self.fewest(source)]
        random.Random(source.seed).shuffle(stories)
        if len(stories) < source.count:
            raise OptionError(
                f"{source.multiturn} holds {len(stories)} stories with turns enough and {source.count} were asked for. "
                "Ask for fewer with --count, or pass a larger set with --multiturn-data."
            )
        items = []
        for length in source.lengths:
            fillers = source.windows(length, source.count, salt=3)
            for i, (story, (_, filler)) in enumerate(zip(stories[: source.count], fillers, strict=True)):
                content = self._build(source, story, filler, length, random.Random(f"{i}/{source.seed}"))
                items.append(Item(f"{self.name}/{length}/{i}", {"length": length}, content))
        return items

    def fewest(self, source: Source) -> int:
        """Turns a story must have to be taken."""
        return 4

    def _build(
        self, source: Source, story: dict[str, Any], filler: list[int], length: int, rng: random.Random
    ) -> Dialogue:
        """The story at a random place in other text; context, questions and room for answers within `length` tokens."""
        turns = [
            (source.encode(TURN.format(question=t["question"])), t["answer"]) for t in story["turns"][: self.turns]
        ]
        head = source.start + source.encode(INTRODUCTION)
        about = source.encode(ABOUT.format(beginning=" ".join(story["story"].split()[:8])))
        body = source.encode("\n\n" + story["story"].strip() + "\n\n")
        talk = sum(len(question) + ANSWER_TOKENS for question, _ in turns)
        room = length - len(head) - len(about) - len(body) - talk
        if room < 0:
            raise OptionError(
                f"{length} tokens do not hold the story and its {len(turns)} turns. Choose a greater length."
            )
        place = rng.randrange(room + 1)
        return Dialogue(head + filler[:place] + body + filler[place:room] + about, turns)

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        dialogue: Dialogue = item.content

        def act(session: Session) -> list[Observation]:
            session.prefill(trial.tensor(dialogue.context))
            after, open_tokens, found = session.memory(), list[int](), []
            for number, (question, reference) in enumerate(dialogue.turns, 1):
                logits = session.prefill(trial.tensor([*open_tokens, *question]))
                answer, tokens = greedy(trial, session, logits, ANSWER_TOKENS, stop="\n")
                open_tokens = (
                    tokens[-1:] if len(tokens) == ANSWER_TOKENS else []
                )  # else it is the end of a line or text
                scores = {"f1": metrics.f1(answer, [reference])}
                found.append(Observation(scores, memory(session.memory(), after), f"/{number}", {"turn": number}))
            return found

        result: list[Observation] = trial.run(act)
        return result


class Drift(MultiTurn):
    """How far the cache drifts from the full one over 20 turns: questions and right answers are fed as they are, and
    the distributions over the answers' tokens are compared."""

    name: ClassVar[str] = "drift"
    summary: ClassVar[str] = "KL from the full cache over the right answers of 20 turns on one cache"
    turns: ClassVar[int] = DRIFT_TURNS

    def fewest(self, source: Source) -> int:
        return DRIFT_TURNS

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        dialogue: Dialogue = item.content
        answers = [corpus.encode(trial.loaded, " " + answer) for _, answer in dialogue.turns]

        def act(session: Session) -> list[tuple[Tensor, dict[str, Any]]]:
            session.prefill(trial.tensor(dialogue.context))
            after, found = session.memory(), []
            for (question, _), answer in zip(dialogue.turns, answers, strict=True):
                first = session.prefill(trial.tensor(question))
                rest = session.decode(trial.tensor(answer))  # its last token too: the next turn follows it
                logits = torch.cat([first[:, None], rest[:, :-1]], dim=1)
                found.append((logits, memory(session.memory(), after)))
            return found

        found = []
        for number, ((ours, held), (full, _), answer) in enumerate(
            zip(trial.run(act), trial.reference(act), answers, strict=True), 1
        ):
            scores = {
                "nll": float(metrics.token_losses(ours, trial.tensor(answer)).sum()),
                "kl": float(metrics.kl_divergence(full, ours).sum()),
                "agree": float(metrics.agreement(full, ours).sum()),
                "tokens": float(len(answer)),
            }
            found.append(Observation(scores, held, f"/{number}", {"turn": number}))
        return found


def read_stories(path: Path) -> list[dict[str, Any]]:
    """A multi-turn set. Raises OptionError where it is none."""
    what = "a JSON list of objects with `story` and `turns` (`question`, `answer`)"
    stories = corpus.read_json(path, what)
    try:
        fine = all(s["story"] and all(t["question"] and "answer" in t for t in s["turns"]) for s in stories)
    except (KeyError, TypeError):
        fine = False
    if not fine or not stories:
        raise OptionError(f"{path} is not a multi-turn set. Pass {what}.")
    return list(stories)
