"""Pass keys: numbers hidden in real text, one or several, over a grid of depth and length."""

import random
from typing import ClassVar

from kvpleat.bench import metrics
from kvpleat.bench.tasks.asked import Asked, AskedTask, Question
from kvpleat.bench.tasks.base import Source

INTRODUCTION = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
NAMED_NEEDLE = "\n\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n\n"
NAMED_QUESTION = "\n\nWhat is the pass key of {name}? The pass key of {name} is"
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis")
KEYS = 4  # pass keys of a multi-key prompt


class PassKey(AskedTask):
    """One number, at a depth that follows from the item's place in the grid."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "one number hidden in real text, over depth x length"
    answer_tokens = 10

    def num_items(self, source: Source) -> int:
        return source.count * source.depths

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        key = _key(rng)
        depth = (index % source.depths + 0.5) / source.depths
        question = _question(source, QUESTION, key, round(depth, 3))
        return _hide(source, length, index, 1, [(depth, NEEDLE.format(key=key))], [question])

    def score(self, answer: str, question: Question) -> dict[str, float]:
        return {"correct": metrics.starts_with(answer, question.references[0])}


class MultiKey(PassKey):
    """Several named numbers in one text: each distracts from the others, and asked after, all of them must be kept."""

    name: ClassVar[str] = "multikey"
    summary: ClassVar[str] = "four named numbers in one text; asked after compression, each of them in turn"

    def num_items(self, source: Source) -> int:
        return source.count

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        names, keys = rng.sample(NAMES, KEYS), [_key(rng) for _ in range(KEYS)]
        needles, questions = [], []
        for i, (name, key) in enumerate(zip(names, keys, strict=True)):
            depth = (i + rng.random()) / KEYS
            needles.append((depth, NAMED_NEEDLE.format(name=name, key=key)))
            questions.append(_question(source, NAMED_QUESTION.format(name=name), key, (i + 0.5) / KEYS))
        return _hide(source, length, index, 2, needles, questions)


def _key(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _question(source: Source, text: str, key: str, depth: float) -> Question:
    """The question's tokens up to the first digit of the answer, so that the space before it is not judged."""
    tokens, bare = source.encode(f"{text} {key}"), source.encode(text)
    while len(tokens) > len(bare) and any(ch in key for ch in source.loaded.tokenizer.decode(tokens[len(bare) :])):
        tokens = tokens[:-1]
    return Question(tokens, [key], {"depth": depth})


def _hide(
    source: Source, length: int, index: int, salt: int, needles: list[tuple[float, str]], questions: list[Question]
) -> Asked:
    """Needles at their depths (0 to 1) in a window of text, so that context and question have `length` tokens."""
    head = source.start + source.encode(INTRODUCTION)
    pieces = [(depth, source.encode(text)) for depth, text in needles]
    longest = max(len(question.tokens) for question in questions)
    room = length - len(head) - longest - sum(len(tokens) for _, tokens in pieces)
    _, filler = source.windows(length, index + 1, salt)[index]
    context, last = list(head), 0
    for depth, tokens in sorted(pieces):
        place = int(depth * room)
        context += filler[last:place] + tokens
        last = place
    return Asked(context + filler[last:room], questions)
