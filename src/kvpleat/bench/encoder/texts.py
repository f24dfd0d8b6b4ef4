"""Texts to judge encoders with: questions with the text that answers each, sentences with a label, long windows.

A retrieval file has `paragraphs` and `questions` (each with `question` and `paragraph`, the number of the one that
answers it). Its paragraphs are taken as they are, or joined in the order of the file until a text has 256 tokens
("joined"): no paragraph is in two texts, and the right text of a question is the one that holds its paragraph.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpleat.bench import corpus
from kvpleat.errors import OptionError
from kvpleat.hf.embed import cut, max_tokens, tokenize
from kvpleat.hf.models import LoadedModel

LEAST = 256  # tokens of a joined text, unless the next paragraph would pass what the model takes
FORMS = ("joined", "paragraphs")


@dataclass(frozen=True)
class Retrieval:
    """Questions to texts.

    Args:
        texts: tokens of each. questions: tokens of each. right: for each question the number of its text.
        begins: for each question whether its paragraph is the first of its text: what a truncated text still holds.
    """

    texts: list[list[int]]
    questions: list[list[int]]
    right: list[int]
    begins: list[bool]


def retrieval(loaded: LoadedModel, path: Path, form: str, limit: int | None = None) -> Retrieval:
    """The questions of a file and its texts in one of FORMS; `limit` takes the first paragraphs only."""
    if form not in FORMS:
        raise OptionError(f"--texts {form}: there are {' and '.join(FORMS)}.")
    wanted = "a JSON file with `paragraphs` (texts) and `questions` (objects with `question` and `paragraph`)"
    content: Any = corpus.read_json(path, wanted)
    try:
        paragraphs = [str(text) for text in content["paragraphs"]][:limit]
        asked = [(str(q["question"]), int(q["paragraph"])) for q in content["questions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"{path} cannot be read as questions ({type(error).__name__}: {error}). Pass {wanted}."
        ) from error
    asked = [(question, place) for question, place in asked if 0 <= place < len(paragraphs)]
    if not asked:
        raise OptionError(f"{path} asks about none of its first {len(paragraphs)} paragraphs. Take more of them.")
    groups = join(loaded, paragraphs) if form == "joined" else [[i] for i in range(len(paragraphs))]
    holds = {place: text for text, group in enumerate(groups) for place in group}
    texts = ["\n".join(paragraphs[i] for i in group) for group in groups]
    questions = [question for question, _ in asked]
    right = [holds[place] for _, place in asked]
    begins = [groups[text][0] == place for text, (_, place) in zip(right, asked, strict=True)]
    return Retrieval(_fitting(loaded, texts), _fitting(loaded, questions), right, begins)


def _fitting(loaded: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    return cut(tokenize(loaded, texts), max_tokens(loaded))


def join(loaded: LoadedModel, paragraphs: Sequence[str]) -> list[list[int]]:
    """Numbers of the paragraphs of each joined text.

    A text ends once it has LEAST tokens, or where the next paragraph would pass what the model takes. A last one that
    is shorter stays as it is.
    """
    counts = [len(ids) - 2 for ids in tokenize(loaded, paragraphs)]
    most = max_tokens(loaded) - 2
    groups: list[list[int]] = [[]]
    held = 0
    for place, count in enumerate(counts):
        if groups[-1] and (held >= LEAST - 2 or held + count > most):
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += count
    return groups


def sentences(loaded: LoadedModel, path: Path, limit: int | None = None) -> tuple[list[list[int]], list[str]]:
    """Tokens and label of each line of a JSONL file with `text` and `label`."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
        texts, labels = [str(line["text"]) for line in lines], [str(line["label"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} cannot be read as sentences ({type(error).__name__}: {error}). Pass a JSONL file, each line an "
            "object with `text` and `label`."
        ) from error
    if len(set(labels)) < 2:
        raise OptionError(f"{path} has {len(set(labels))} labels, and a probe needs two at least. Pass another file.")
    return _fitting(loaded, texts), labels


def windows(loaded: LoadedModel, path: Path, count: int, seed: int) -> list[list[int]]:
    """`count` texts as long as the model takes, special tokens included, of a JSONL file of texts."""
    length = max_tokens(loaded) - 2
    drawn = corpus.token_windows(loaded, path, length, count, seed)
    first, last = (int(ids) for ids in loaded.tokenizer("")["input_ids"])
    return [[first, *ids.tolist(), last] for _, ids in drawn]
