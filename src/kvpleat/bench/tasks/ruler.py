"""Three of RULER's synthetic tasks (arXiv 2404.06654), generated as its authors' code does: variable tracking, common
words, frequent words. Each prompt holds one solved example, as RULER's prompts for base models do.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

from kvpleat.bench import corpus, metrics
from kvpleat.bench.tasks.asked import Asked, AskedTask, Question
from kvpleat.bench.tasks.base import Source
from kvpleat.errors import OptionError

HOPS = 4  # assignments of a chain after its first
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
COMMON, EXAMPLE_WORDS = 10, 40
ALPHA = 2.0  # of the zeta distribution of coded words
CODED_LENGTH = 6
STORED = 3  # frequent words asked for


class _RulerTask(AskedTask):
    def score(self, answer: str, question: Question) -> dict[str, float]:
        return {"found": metrics.found(answer, question.references)}


class VariableTracking(_RulerTask):
    """One chain VAR A = 12345, VAR B = VAR A, ... in repeated noise: name all variables that hold the value."""

    name: ClassVar[str] = "vt"
    summary: ClassVar[str] = "RULER variable tracking: five variables of one chain in noise"
    answer_tokens = 30
    ask = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {value}, they are:"
    )
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        text, value, names = self._chain(10, rng)
        solved = self.task + text + self._ask(value) + " " + " ".join(names) + "\n\n"
        head = source.start + source.encode(solved + self.task)

        def make(lines: int, rng: random.Random) -> tuple[str, str, list[str]]:
            text, value, names = self._chain(lines, rng)
            return text, self._ask(value), names

        return _fit(source, head, length, rng, make)

    def _ask(self, value: str) -> str:
        return self.ask.format(value=value) + self.prefix.format(count=HOPS + 1, value=value)

    def _chain(self, lines: int, rng: random.Random) -> tuple[str, str, list[str]]:
        """Text of `lines` lines of noise with a chain in it, its value and its variables."""
        names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(HOPS + 1)]
        value = str(rng.randrange(10_000, 100_000))
        links = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
        text = [NOISE] * max(lines, 1)
        for place, link in zip(
            sorted(rng.sample(range(len(text) + 1), min(len(links), len(text) + 1))), links, strict=False
        ):
            text.insert(place + links.index(link), link + ".")
        return "\n".join(text), value, names


class CommonWords(_RulerTask):
    """A numbered list in which ten words come ten times as often as the others: name them."""

    name: ClassVar[str] = "cwe"
    summary: ClassVar[str] = "RULER common words: the ten that come 30 times among those that come 3 times"
    answer_tokens = 80
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    ask = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        words = sorted(_words(source))
        text, _, common = self._list(words, EXAMPLE_WORDS, 10, 3, rng)
        listed = " ".join(f"{i + 1}. {word}" for i, word in enumerate(common))
        head = source.start + source.encode(self.task + text + self.ask + " " + listed + "\n" + self.task)
        often, seldom = (30, 3) if length >= 4096 else (15, 2)

        def make(size: int, rng: random.Random) -> tuple[str, str, list[str]]:
            return self._list(words, size, often, seldom, rng)

        return _fit(source, head, length, rng, make)

    def _list(
        self, words: list[str], size: int, often: int, seldom: int, rng: random.Random
    ) -> tuple[str, str, list[str]]:
        """A shuffled, numbered list of about `size` uncommon words' places and all of the common ones."""
        drawn = rng.sample(words, min(len(words), COMMON + max(size // seldom, 1)))
        common, others = drawn[:COMMON], drawn[COMMON:]
        listed = common * often + others * seldom
        rng.shuffle(listed)
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed)), self.ask, common


class FrequentWords(_RulerTask):
    """Coded words drawn from a zeta distribution: name the three most frequent, the dots left out."""

    name: ClassVar[str] = "fwe"
    summary: ClassVar[str] = "RULER frequent words: the three most frequent of a Zipf-like list of coded words"
    answer_tokens = 50
    task = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    ask = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )

    def build(self, source: Source, length: int, index: int, rng: random.Random) -> Asked:
        vocabulary = max(length // 50, 12)
        text, _, top = self._coded(60, 12, rng)
        head = source.start + source.encode(self.task + text + self.ask + " " + " ".join(top) + ".\n" + self.task)
        return _fit(source, head, length, rng, lambda size, rng: self._coded(size, vocabulary, rng))

    def _coded(self, size: int, vocabulary: int, rng: random.Random) -> tuple[str, str, list[str]]:
        """About `size` coded words: word k comes in proportion to 1 / k**ALPHA, and the most frequent is written as
        dots."""
        names: set[str] = set()
        while len(names) < vocabulary:
            names.add("".join(rng.choices(string.ascii_lowercase, k=CODED_LENGTH)))
        coded = ["...", *sorted(names)]
        shares = [1 / (k + 1) ** ALPHA for k in range(len(coded))]
        counts = [int(size * share / sum(shares)) for share in shares]
        text = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        order = [word for word, _ in Counter(text).most_common() if word != "..."]
        return " ".join(text), self.ask, order[:STORED] or coded[1 : 1 + STORED]


Make = Callable[[int, random.Random], tuple[str, str, list[str]]]


def _fit(source: Source, head: list[int], length: int, rng: random.Random, make: Make) -> Asked:
    """The largest text that `make` gives within `length` tokens: make(size, rng) -> (text, question, answers)."""
    seed = rng.random()

    def asked(size: int) -> Asked:
        text, ask, answers = make(size, random.Random(seed))
        return Asked(head + source.encode(text), [Question(source.encode(ask), answers)])

    def total(one: Asked) -> int:
        return len(one.context) + len(one.questions[0].tokens)

    low, high = 1, 2
    while total(asked(high)) <= length and high < 4 * length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(asked(middle)) <= length else (low, middle)
    best = asked(low)
    if total(best) > length:
        raise OptionError(
            f"{length} tokens do not hold the task: its solved example and shortest text need {total(best)}. Choose a "
            "greater length."
        )
    return best


def _words(source: Source) -> set[str]:
    """Words to make lists of: the distinct ones of the shipped texts, of six letters or more, in lower case."""
    found: set[str] = set()
    for _, text in corpus.read_documents(corpus.shipped()):
        found |= set(re.findall(r"\b[a-z]{6,12}\b", text))
    return found
