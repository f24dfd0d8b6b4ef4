"""Extractive question answering, few-shot, with distractor paragraphs that fill the context."""

import random
from pathlib import Path
from typing import Any, ClassVar

from kvpleat.bench import corpus, metrics
from kvpleat.bench.tasks.asked import Asked, AskedTask, Question
from kvpleat.bench.tasks.base import Source
from kvpleat.errors import OptionError

TASK = "Answer each question with a few words that stand in the text.\n\n"
SHOTS = 3
MOST_QUESTIONS = 4  # asked after about one context


class QuestionAnswering(AskedTask):
    """F1 and exact match of answers about paragraphs among others.

    The set is a JSON object: `paragraphs` (texts) and `questions` (`question`, `answers`, `paragraph`: its index). The
    last questions serve as solved examples and are never asked.
    """

    name: ClassVar[str] = "qa"
    summary: ClassVar[str] = "extractive question answering among distractor paragraphs, three solved examples"
    answer_tokens = 24
    stop = "\n"

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        data = read_qa(source.qa)
        paragraphs, questions = data["paragraphs"], data["questions"]
        shots = questions[-SHOTS:]
        used = {shot["paragraph"] for shot in shots}
        by_paragraph: dict[int, list[dict[str, Any]]] = {}
        for question in questions[:-SHOTS]:
            if question["paragraph"] not in used:
                by_paragraph.setdefault(question["paragraph"], []).append(question)
        solved = "".join(
            f"{paragraphs[s['paragraph']].strip()[:600]}{_ask(s['question'])} {s['answers'][0]}\n\n" for s in shots
        )
        head = source.start + source.encode(TASK + solved)
        order = [i for i in range(len(paragraphs)) if i not in used]
        rng.shuffle(order)
        order.sort(key=lambda i: i not in by_paragraph)  # those with questions first, then place them at random
        asked_about = order[: max(1, min(MOST_QUESTIONS, len(by_paragraph)))]
        texts = {i: source.encode(paragraphs[i].strip() + "\n\n") for i in order}
        room = length - len(head) - 80
        chosen: list[int] = []
        for i in [*asked_about, *rng.sample(order[len(asked_about) :], len(order) - len(asked_about))]:
            if len(texts[i]) <= room:
                chosen.append(i)
                room -= len(texts[i])
        rng.shuffle(chosen)
        context = head + [token for i in chosen for token in texts[i]]
        picked = [rng.choice(by_paragraph[i]) for i in chosen if i in asked_about]
        if not picked:
            raise OptionError(
                f"{length} tokens hold no paragraph with a question of {source.qa}. Choose a greater length."
            )
        return Asked(context, [Question(source.encode(_ask(q["question"])), q["answers"]) for q in picked])

    def score(self, answer: str, question: Question) -> dict[str, float]:
        return {
            "f1": metrics.f1(answer, question.references),
            "exact": metrics.exact_match(answer, question.references),
        }


def read_qa(path: Path) -> dict[str, Any]:
    """A question-answering set. Raises OptionError where it is none."""
    what = "a JSON object with `paragraphs` and `questions` (`question`, `answers`, `paragraph`)"
    data = corpus.read_json(path, what)
    try:
        fine = all(
            0 <= q["paragraph"] < len(data["paragraphs"]) and q["answers"] and q["question"] for q in data["questions"]
        )
    except (KeyError, TypeError):
        fine = False
    if not fine or len(data["questions"]) <= SHOTS:
        raise OptionError(f"{path} is not a question-answering set of more than {SHOTS} questions. Pass {what}.")
    return dict(data)


def _ask(question: str) -> str:
    return f"\n\nQuestion: {question.strip()}\nAnswer:"
