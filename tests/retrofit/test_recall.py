"""Rows of recall tasks: what is asked was stated before, far away, in words that are not the judge's."""

import ast
import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvpleat
from kvpleat.errors import OptionError
from kvpleat.retrofit import data_frames, data_kinds, data_series, recall
from kvpleat.retrofit.data_frames import Chat, Plain, chat_turns, transcript
from kvpleat.retrofit.data_kinds import Ask, Task
from kvpleat.retrofit.data_words import Draw
from kvpleat.retrofit.recall import KINDS, RecallRow, RecallRows
from tests.bench import byte_model
from tests.retrofit import texts

SOURCE = Path(kvpleat.__file__).parent
FAST = texts.tokenizer()
SENTENCES = re.split(r"(?<=[.!?])\s+", texts.prose())
NOT_STATED = {"counts"}  # whose answer follows from the statements without standing in them


def rows(length: int = 1500, seed: int = 0, chat: bool = False, **options: Any) -> RecallRows:
    """Rows over some prose."""
    return RecallRows(texts.tokenizer(chat), texts.prose_store(), length, seed, **options)


def draw(seed: int) -> Draw:
    """Draws for one task."""
    return Draw(random.Random(seed), 20, lambda source: " ".join(source.sample(SENTENCES, 4)))


def task(kind: str, seed: int) -> Task:
    """One task of a kind."""
    drawn = draw(seed)
    while (made := KINDS[kind](drawn)) is None:
        pass
    return made


def text(row: RecallRow, place: tuple[int, int]) -> str:
    return str(FAST.decode(row.tokens[slice(*place)]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [256, 411, 1500, 4097])
def test_what_is_asked_was_stated(length: int, chat: bool) -> None:
    """An answer stands where it is said to, all it needs in statements before it, and weights mark it alone."""
    made = rows(length, chat=chat, answer_weight=3.0)
    for index in range(12):
        row = made.compose(index)
        assert row.tokens.shape == row.weight.shape == (length,)
        assert row.answers
        weight = np.ones(length, np.float32)
        weight[0] = 0
        for answer in row.answers:
            found = text(row, answer.place)
            assert answer.ask.answer in found
            assert len(found) <= len(answer.ask.answer) + 3  # a space, a quotation mark or a full stop in its tokens
            assert answer.statements
            assert max(end for _, end in answer.statements) <= answer.place[0]
            stated = "\n".join(text(row, place) for place in answer.statements)
            for needed in answer.ask.needs:
                assert needed in stated
            weight[slice(*answer.place)] = 3
        assert np.array_equal(row.weight, weight)


def test_rows_are_one_document() -> None:
    """Nothing keeps the question from what was stated."""
    made = rows(700)
    tokens, doc_start, weight = made.row(3)
    assert tokens.dtype == np.int64
    assert doc_start.dtype == np.int32
    assert weight.dtype == np.float32
    assert not doc_start.any()
    assert np.array_equal(tokens, made.compose(3).tokens)


def test_every_row_is_a_function_of_seed_and_index() -> None:
    """In any order, from any instance; another seed gives other rows."""
    wanted = [rows().row(i) for i in range(8)]
    again = rows()
    for i in (5, 0, 7, 5):
        assert all(np.array_equal(a, b) for a, b in zip(again.row(i), wanted[i], strict=True))
    assert not np.array_equal(rows(seed=1).row(0)[0], wanted[0][0])
    assert not np.array_equal(wanted[0][0], wanted[1][0])


def test_depths_and_distances() -> None:
    """Statements everywhere, all questions at the end, some before as well; far from what they need."""
    length = 4096
    stated, distances, asked, twice = [], [], 0, 0
    for index in range(40):
        row = rows_of_4096().compose(index)
        places: dict[Ask, list[int]] = defaultdict(list)
        for answer in row.answers:
            places[answer.ask].append(answer.place[0])
            stated += [place[0] / length for place in answer.statements]
            distances.append(answer.place[0] - answer.statements[0][1])
        asked += len(places)
        twice += sum(len(found) == 2 for found in places.values())
        assert all(len(found) <= 2 for found in places.values())
        closing = min(found[-1] for found in places.values())
        assert all(first < closing for *before, _ in places.values() for first in before)
    shares = np.histogram(stated, bins=7, range=(0, 0.7))[0] / len(stated)
    assert (shares > 0.05).all(), shares
    assert 0.2 < twice / asked < 0.4
    assert np.median(distances) > length / 2


_CACHED: list[RecallRows] = []


def rows_of_4096() -> RecallRows:
    """One instance for several tests."""
    if not _CACHED:
        _CACHED.append(rows(4096))
    return _CACHED[0]


def test_all_kinds_come() -> None:
    """Each of the twenty."""
    seen = Counter(answer.kind for index in range(60) for answer in rows_of_4096().compose(index).answers)
    assert set(seen) == set(KINDS)
    assert len(KINDS) >= 10


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kinds_state_what_they_ask(kind: str) -> None:
    """Every text an answer needs stands in the statements, and the answer is made of them; one question, one answer."""
    for seed in range(150):
        made = task(kind, seed)
        stated = "\n".join(made.statements)
        assert made.statements
        assert made.asks
        by_question: dict[str, set[str]] = defaultdict(set)
        for ask in made.asks:
            by_question[ask.question].add(ask.answer)
            assert all(needed in stated for needed in ask.needs), ask
            if kind not in NOT_STATED:
                rest = ask.answer
                for needed in sorted(ask.needs, key=len, reverse=True):
                    rest = rest if rest in needed else rest.replace(needed, "", 1)
                assert rest in stated or not rest.replace("and", "").strip(", "), ask
            assert ask.answer == ask.answer.strip()
            assert ask.answer
        assert all(len(answers) == 1 for answers in by_question.values()), by_question


def test_assignments_are_worked_out() -> None:
    """By an interpreter of these lines that shares nothing with what wrote them."""
    for seed in range(200):
        made, held = task("assignments", seed), dict[str, str]()
        for line in made.statements:
            name, value = re.fullmatch(r"(?:let |int |set )?(\w+)(?: =| :=| <-| equals|) (\w+)[;.]?", line).groups()  # type: ignore[union-attr]
            held[name] = held.get(value, value)
        assert all(value.isdigit() for value in held.values())
        for ask in made.asks:
            if "each name" in ask.question:
                value = re.search(r"\d+", ask.question)[0]  # type: ignore[index]
                assert ask.answer.split(", ") == [name for name in held if held[name] == value]
            else:
                (name,) = (name for name in held if re.search(rf"\b{name}\b", ask.question))
                assert ask.answer == held[name]


def test_counts_are_counted() -> None:
    """Marks are as many as the answer says; the most frequent words are the most frequent ones."""
    numerals = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for seed in range(200):
        made = task("counts", seed)
        (ask,) = made.asks
        assert len(set(made.statements)) == 1
        assert len(made.statements) == (int(ask.answer) if ask.answer.isdigit() else numerals.index(ask.answer))
        made = task("frequent", seed)
        words = Counter(word for fact in made.statements for word in re.findall(r"[a-z]+", fact.partition(":")[2]))
        (ask,) = made.asks
        best = ask.answer.split(", ")
        ranked = words.most_common()
        assert [word for word, _ in ranked[: len(best)]] == best
        counts = [count for _, count in ranked[: len(best) + 1]]
        assert all(more > less for more, less in pairwise(counts)), "a tie has no right answer"


def test_changes_and_moves_are_followed() -> None:
    """The last value or the first; where a thing was carried, by whom."""
    for seed in range(200):
        for ask in (made := task("updates", seed)).asks:
            last = "all changes" in ask.question
            assert ask.answer in made.statements[-1 if last else 0]
            assert last == ("In the end" in ask.lead)
        made = task("errands", seed)
        for ask in made.asks:
            thing = re.search(r"(?:is|was|took) the (\w+ \w+)", ask.question)[1]  # type: ignore[index]
            about = [fact for fact in made.statements if f"the {thing} " in fact]
            assert about
            if ask.question.startswith("Who"):
                assert about[-1].startswith(ask.answer)
                assert re.search(r"to the (\w+)\?", ask.question)[1] in about[-1]  # type: ignore[index]
            else:
                assert about[0 if "at first" in ask.question else -1].endswith(f" the {ask.answer}.")


def test_items_of_a_list_are_counted() -> None:
    """The n-th, the next, and all of them."""
    ordinals = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
    for seed in range(200):
        made = task("sequences", seed)
        (fact,) = made.statements
        items = re.sub(r"\d+\.", ",", fact.partition(":")[2]).replace("\n", "").rstrip(".").strip(", ").split(",")
        items = [item.strip() for item in items]
        for ask in made.asks:
            if ask.question.startswith("Which item"):
                assert ask.answer == items[ordinals.index(ask.question.split(" ")[4])]
            elif "what follows" in ask.question:
                before = ask.question.partition("what follows the ")[2].rstrip("?")
                assert ask.answer == items[items.index(before) + 1]
            else:
                assert ask.answer.split(", ") == items


def test_records_hold_what_is_asked() -> None:
    """Read back from JSON, where it is JSON: the field of the name."""
    read = 0
    for seed in range(200):
        made = task("records", seed)
        lines = "\n".join(made.statements).split("\n")
        if not lines[0].startswith("{"):
            continue
        held = {item["name"]: item for item in map(json.loads, lines)}
        for ask in made.asks:
            (name,) = (name for name in held if name in ask.question)
            (field,) = (field for field in held[name] if re.search(rf"\b{field}\b", ask.question) and field != "name")
            assert ask.answer == held[name][field]
            read += 1
    assert read > 50


def test_answers_come_in_many_forms() -> None:
    """Bare, quoted, in a sentence, after "Answer:"; in chats after the template's words."""
    ask = Ask("Who?", "It was", "Ada")
    seen = set()
    for seed in range(300):
        drawn = draw(seed)
        before, after = Plain(drawn).ask(drawn, ask, last=True)
        seen.add((before + "{}" + after).strip())
    assert {"Who?\n{}", 'Who?\n"{}"', "It was {}.", "Question: Who?\nAnswer: {}", "Who? Answer: {}"} <= seen
    assert len(seen) >= 12
    turns = chat_turns(texts.tokenizer(chat=True))
    assert turns is not None
    assert (turns.opening, turns.reply, turns.next) == (
        "<|start|> user ",
        " <|end|> <|start|> assistant ",
        " <|end|> <|start|> user ",
    )
    seen = set()
    for seed in range(20):
        drawn = draw(seed)
        before, after = Chat(drawn, turns).ask(drawn, ask, last=True)
        seen.add(before + "{}" + after)
    assert seen == {
        "Who? <|end|> <|start|> assistant {} <|end|> <|start|> user ",
        "Who? <|end|> <|start|> assistant It was {}. <|end|> <|start|> user ",
    }


def test_chats_are_whole() -> None:
    """Turns alternate, and no end of a text stands among them; without a template there are transcripts only."""
    start = FAST.convert_tokens_to_ids("<|start|>")
    chats, made, without = 0, rows(800, chat=True), rows(800)
    for index in range(40):
        tokens = made.compose(index).tokens
        marks = tokens[np.isin(tokens, [start, FAST.eos_token_id])].tolist()
        if marks:
            chats += 1
            assert marks[::2] == [start] * len(marks[::2])
            assert marks[1::2] == [FAST.eos_token_id] * len(marks[1::2])
            speakers = re.findall(r"<\|start\|>\s*(user|assistant)", FAST.decode(tokens))
            assert speakers == [("user", "assistant")[i % 2] for i in range(len(speakers))]
            assert len(speakers) == marks.count(start)
    assert 3 < chats < 20
    plain = np.concatenate([without.compose(index).tokens for index in range(40)])
    assert not np.isin(plain, [start, FAST.eos_token_id]).any()


def test_templates_that_change_what_they_are_given() -> None:
    """They serve no chats, rather than wrong ones."""
    fast = texts.tokenizer(chat=True)
    for template in (
        "{% for m in messages %}{{ m['role'] }} {% endfor %}",  # drops what was said
        "{% for m in messages %}{{ m['content'] }}{{ loop.index }} {% endfor %}",  # turns differ
        None,
    ):
        fast.chat_template = template
        assert chat_turns(fast) is None


def test_transcripts_have_two_speakers() -> None:
    """What stands before a reply is not what stands before a question."""
    for seed in range(30):
        turns = transcript(draw(seed))
        assert turns.next.strip() == turns.opening.strip() != turns.reply.strip()


def test_a_start_token_stands_first_and_nowhere_else() -> None:
    """Of a tokenizer that puts one before every text."""
    fast = byte_model.tokenizer(start=True)
    ids = [*fast(texts.prose()[:9000])["input_ids"], fast.eos_token_id]
    store = texts.TokenStore(np.array(ids * 3, np.uint16), np.cumsum([len(ids)] * 3))
    made = RecallRows(fast, store, 900)
    for index in range(10):
        tokens = made.compose(index).tokens
        assert tokens[0] == 0
        assert not np.isin(tokens[1:], [0, 1]).any()


def test_what_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too short, tokenizers that do not tell where text stands, tasks that never fit."""
    with pytest.raises(OptionError, match=r"length=255: .* at least 256 tokens\. Choose a greater length"):
        rows(255)

    class Slow:
        is_fast = False

    with pytest.raises(OptionError, match=r"Slow is no fast tokenizer.*recall_share=0"):
        RecallRows(Slow(), texts.prose_store(), 300)
    monkeypatch.setattr(recall, "FULLEST", 0.001)
    with pytest.raises(OptionError, match=r"length=300: no recall task fitted"):
        rows(300).compose(0)


def grams(words: list[str]) -> set[tuple[str, ...]]:
    """All sequences of five words."""
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def words_of(written: str) -> list[str]:
    """Words in lower case; a placeholder is the word _."""
    return re.findall(r"[a-z0-9']+|_", re.sub(r"\{[^{}]*\}", " _ ", written.lower()))


def strings(path: Path) -> list[str]:
    """All strings of a file that are no docstrings, {} for what an f-string puts in."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped |= set(node.values)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            found.append(node.value)
    return found


def test_no_words_of_the_judge() -> None:
    """No five words in a row of the judge's prompts and data stand in a template here, nor in what is made of them."""
    judge: set[tuple[str, ...]] = set()
    for path in sorted((SOURCE / "bench" / "tasks").glob("*.py")):
        judge |= set().union(*(grams(words_of(written)) for written in strings(path)))
    for name in ("qa.json", "multiturn.json"):
        written = json.loads((SOURCE / "bench" / "data" / name).read_text())
        judge |= set().union(*(grams(words_of(one)) for one in _texts(written)))
    assert ("what", "is", "the", "pass", "key") in judge
    assert ("the", "pass", "key", "of", "_") in judge
    assert ("marta", "kept", "bees", "on", "the") in judge

    ours = [s for module in (data_frames, data_kinds, data_series) for s in strings(Path(module.__file__ or ""))]
    assert len(ours) > 300
    for kind in KINDS:
        if kind == "passages":
            continue  # real text
        for seed in range(40):
            made, drawn = task(kind, seed), draw(seed)
            frame = Plain(drawn)
            ours += [frame.state(drawn, statement) for statement in made.statements]
            ours += [ask.answer.join(frame.ask(drawn, ask, last=True)) for ask in made.asks]
    for one in ours:
        assert not grams(words_of(one)) & judge, one


def _texts(value: Any) -> list[str]:
    """All strings of a JSON value."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inside for text in _texts(one)]
