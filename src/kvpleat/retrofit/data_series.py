"""Kinds of recall tasks about many facts and about texts: records, lists, changes, counts, copies. See `data_kinds`."""

import json
import re
from collections.abc import Callable

from kvpleat.retrofit.data_kinds import Ask, Task
from kvpleat.retrofit.data_words import NUMERALS, ROOMS, Draw, listed, split

FIELDS = split("city balance colour weight floor status contact deposit grade version quota shift")
ORDINALS = split("first second third fourth fifth sixth seventh eighth ninth tenth")
LONGEST_COPY = 40  # words


def records(draw: Draw) -> Task:
    """Records with fields, one a line or all in one table: one field of one of them."""
    names = draw.words(draw.between(2, max(2, draw.size // 6)))
    fields = draw.some(FIELDS, draw.between(2, 4))
    table = {name: {field: _field(draw, field) for field in fields} for name in names}
    write = draw.pick([_json, _pairs, _row, _section])
    lines = [write(name, record) for name, record in table.items()]
    if write is _row:
        lines[0] = f"name | {' | '.join(fields)}\n{lines[0]}"
    asks = []
    for name in draw.some(names, draw.between(1, 4)):
        field = draw.pick(fields)
        question, lead = draw.pick(
            [
                (f"What is the {field} of {name}?", f"The {field} of {name} is"),
                (f"SELECT {field} FROM records WHERE name = '{name}';", f"{name}.{field} ="),
                (f'records["{name}"]["{field}"]', f'records["{name}"]["{field}"] =='),
                (f"Read out {field} in the record {name}.", f"{name}, {field}:"),
            ]
        )
        asks.append(Ask(question, lead, table[name][field], end=""))
    together = write is _row or draw.chance(0.6)
    return Task(("\n".join(lines),) if together else tuple(lines), tuple(asks))


def _field(draw: Draw, field: str) -> str:
    make: dict[str, Callable[[], str]] = {
        "city": lambda: draw.places(1)[0],
        "contact": lambda: draw.people(1)[0],
        "colour": draw.phrase,
        "version": lambda: f"{draw.between(0, 9)}.{draw.between(0, 40)}.{draw.between(0, 99)}",
        "shift": draw.time,
        "status": draw.code,
    }
    return make.get(field, draw.number)()


def _json(name: str, record: dict[str, str]) -> str:
    return json.dumps({"name": name, **record})


def _pairs(name: str, record: dict[str, str]) -> str:
    return f"{name}: " + ", ".join(f"{field} {value}" for field, value in record.items())


def _row(name: str, record: dict[str, str]) -> str:
    return " | ".join([name, *record.values()])


def _section(name: str, record: dict[str, str]) -> str:
    return "\n".join([f"[{name}]", *(f"{field} = {value}" for field, value in record.items())])


def entries(draw: Draw) -> Task:
    """Many short entries of one form, in one list or scattered."""
    make, value = (
        draw.pick([draw.code, draw.invented, draw.number]),
        draw.pick([draw.number, draw.phrase, draw.invented]),
    )
    keys = draw.new(draw.between(3, draw.size), make)
    held = {key: value() for key in keys}
    form = draw.pick(
        ["{k}: {v}", "{k} -> {v}", "{k} = {v}", '"{k}": "{v}",', "line {k}: REGISTER {v}", "{k}\t{v}", "- {k} ({v})"]
    )
    question, lead = draw.pick(
        [
            ("{k}?", "{k}:"),
            ("Look up {k}.", "{k} ->"),
            ("Which entry stands beside {k}?", "Beside {k} stands"),
            ("lookup({k!r})", "{k} ="),
        ]
    )
    lines = [form.format(k=key, v=held[key]) for key in keys]
    asked = draw.some(keys, draw.between(1, 5))
    asks = [Ask(question.format(k=key), lead.format(k=key), held[key], end="") for key in asked]
    return Task(("\n".join(lines),) if draw.chance(0.6) else tuple(lines), tuple(asks))


def glossary(draw: Draw) -> Task:
    """Words of a language that does not exist, and what they mean; both ways."""
    place, words = draw.places(1)[0], draw.words(draw.between(1, 6))
    facts, asks = [], []
    for word, meaning in zip(words, draw.things(len(words)), strict=True):
        facts.append(
            draw.pick(
                [
                    f'In the dialect of {place}, "{word}" means "{meaning}".',
                    f"{word} (noun, {place}): {meaning}.",
                    f"People in {place} call the {meaning} {word}.",
                ]
            )
        )
        asks.append(
            draw.pick(
                [
                    Ask(f"What does {word} mean in {place}?", f"{word} means", meaning),
                    Ask(f"How do they call the {meaning} in {place}?", f"In {place} the {meaning} is called", word),
                    Ask(f"Translate {word}.", f"{word} =", meaning, end=""),
                ]
            )
        )
    return Task(tuple(facts), tuple(draw.some(asks, draw.between(1, 3))))


def updates(draw: Draw) -> Task:
    """A value that changes: the last one, or the first."""
    what = draw.pick(["price", "depth", "weight", "score", "code", "owner"])
    make = {"code": draw.code, "owner": lambda: draw.people(1)[0]}.get(what, draw.number)
    thing, values = draw.things(1)[0], [make() for _ in range(draw.between(2, 4))]
    facts = [f"The {what} of the {thing} is {values[0]}."]
    change = draw.pick(
        [
            "The {w} of the {t} has changed to {v}.",
            "Correction: {t}, {w} {v}.",
            "From this day on the {t} had another {w}, {v}.",
        ]
    )
    facts += [change.format(w=what, t=thing, v=value) for value in values[1:]]
    last = Ask(
        f"After all changes, what is the {what} of the {thing}?", f"In the end the {what} of the {thing} is", values[-1]
    )
    first = Ask(
        f"What was the {what} of the {thing} at the beginning?", f"To begin with, the {thing} had the {what}", values[0]
    )
    return Task(tuple(facts), (last, first) if draw.chance(0.4) else (draw.pick([last, last, first]),))


def several(draw: Draw) -> Task:
    """Several values for one key, far apart: all of them, in order."""
    person, count = draw.people(1)[0], draw.between(2, 5)
    verb, base, items = draw.pick(
        [
            ("spent a week in", "spend a week in", draw.places(count)),
            ("bought the", "buy", draw.things(count)),
            ("wrote a letter to", "write to", draw.people(count)),
            ("learned the word", "learn", draw.words(count)),
        ]
    )
    order = draw.pick(["one after the other", "from the first to the last", "in order"])
    facts = tuple(f"{person} {verb} {item}." for item in items)
    ask = Ask(f"What or whom did {person} {base}? Name all, {order}.", f"{person} {verb}", listed(items), tuple(items))
    nth = draw.between(0, count - 1)
    single = Ask(
        f"Of those that {person} {verb}, which came {ORDINALS[nth]}?",
        f"The {ORDINALS[nth]} that {person} {verb}:",
        items[nth],
    )
    return Task(facts, (ask, single) if draw.chance(0.3) else (draw.pick([ask, ask, single]),))


def sequences(draw: Draw) -> Task:
    """A list made at one place: its n-th item, what follows an item, or all of it."""
    person, items = draw.people(1)[0], draw.things(draw.between(3, 10))
    title = draw.pick(
        [f"Shopping list of {person}", f"{person} packed", f"To be repaired for {person}", f"{person}'s prizes"]
    )
    numbered = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    fact = f"{title}: {', '.join(items)}." if draw.chance(0.5) else f"{title}:\n{numbered}"
    nth = draw.between(0, len(items) - 1)
    before = draw.between(1, len(items) - 1)
    asks = [
        Ask(f"Which item is the {ORDINALS[nth]} on the list of {person}?", f"{person}, item {nth + 1}:", items[nth]),
        Ask(
            f"On the list of {person}, what follows the {items[before - 1]}?",
            f"On the list of {person}, the {items[before - 1]} is followed by the",
            items[before],
        ),
        Ask(f"Repeat the list of {person}.", f"{title}:", ", ".join(items), tuple(items)),
    ]
    return Task((fact,), tuple(draw.some(asks, draw.between(1, 2))))


def counts(draw: Draw) -> Task:
    """How often something happened."""
    place, person, word = draw.places(1)[0], draw.people(1)[0], draw.words(1)[0]
    event, question, lead = draw.pick(
        [
            (
                f"A bell rang in {place}.",
                f"How often did a bell ring in {place}?",
                f"Times that a bell rang in {place}:",
            ),
            (f"Point for {person}!", f"How many points did {person} make?", f"Points of {person}:"),
            (f"[[{word}]]", f"How many marks of {word} were there?", f"Marks of {word}:"),
            (f"Another ship left {place}.", f"How many ships left {place}?", f"Ships that left {place}:"),
        ]
    )
    number = draw.between(1, 9)
    answer = str(number) if draw.chance(0.6) else NUMERALS[number]
    return Task((event,) * number, (Ask(question, lead, answer, (event,)),))


def frequent(draw: Draw) -> Task:
    """Lists of made-up words in which some come more often than others."""
    title, words = draw.places(1)[0], draw.words(draw.between(4, 10))
    top = draw.between(1, 3)
    often = [3 * (top - i) + 4 for i in range(top)]
    drawn = [
        word
        for word, count in zip(words, [*often, *[draw.between(1, 3) for _ in words[top:]]], strict=True)
        for _ in range(count)
    ]
    draw.random.shuffle(drawn)
    parts = draw.between(1, 3)
    facts = [f"Words heard in {title}: {' '.join(drawn[i::parts])}." for i in range(parts)]
    best = tuple(words[:top])
    question = (
        f"Which word was heard more than any other in {title}?"
        if top == 1
        else f"Rank the {NUMERALS[top]} words that people in {title} used most."
    )
    return Task(tuple(facts), (Ask(question, f"Used most in {title}:", ", ".join(best), best),))


def copies(draw: Draw) -> Task:
    """Numbered sentences to be repeated word for word."""
    name, place = draw.pick(["Rule", "Verse", "Clause", "Line", "Motto"]), draw.places(1)[0]
    numbers = draw.some(range(1, 100), draw.between(1, 4))
    held = {number: draw.sentence() for number in numbers}
    facts = [f"{name} {number} of {place}: {held[number]}" for number in numbers]
    number = draw.pick(numbers)
    question = draw.pick(
        [
            f"Cite {name.lower()} {number} of {place}.",
            f"What is {name.lower()} {number} of {place}, word for word?",
            f"Copy {name.lower()} {number} of {place}.",
        ]
    )
    return Task(tuple(facts), (Ask(question, f"{name} {number} of {place}:", held[number], end=""),))


def passages(draw: Draw) -> Task | None:
    """A paragraph of real text: to be continued from the first words of a sentence, or a word of it that is missing."""
    text = draw.passage()
    if text is None:
        return None
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 10 <= len(s.split(" ")) <= LONGEST_COPY]
    if not sentences:
        return None
    told = draw.pick(sentences)
    words = told.split(" ")
    cue = draw.between(4, 7)
    first, rest = " ".join(words[:cue]), " ".join(words[cue:]).strip()
    question, lead = draw.pick(
        [
            (f'One sentence begins "{first}". How does it go on?', first),
            (f'Continue the quotation: "{first} ..."', first),
            (f"Complete from memory: {first}", first),
        ]
    )
    asks = [Ask(question, lead, rest, (told,), end="")]
    long = [i for i, word in enumerate(words) if i > 1 and re.fullmatch(r"[A-Za-z0-9]{5,}", word)]
    if long and draw.chance(0.4):
        gap = draw.pick(long)
        blank = " ".join([*words[:gap], "____", *words[gap + 1 :]])
        asks = [Ask(f"Put in the word that is missing: {blank}", f"{blank} The gap stands for", words[gap], (told,))]
    return Task((text,), tuple(asks))


def inventories(draw: Draw) -> Task:
    """How many of what is in which room."""
    place, rooms = draw.places(1)[0], draw.some(ROOMS, draw.between(1, 6))
    facts, asks = [], []
    for room, thing in zip(rooms, draw.things(len(rooms)), strict=True):
        count = draw.between(13, 989)
        facts.append(f"{place}, {room}: {count} pieces, mostly {thing}s.")
        asks += [
            Ask(f"How many pieces does the {room} in {place} hold?", f"Pieces in the {room}, {place}:", str(count)),
            Ask(f"What fills the {room} in {place}?", f"The {room} in {place} is full of", f"{thing}s"),
        ]
    return Task(tuple(facts), tuple(draw.some(asks, draw.between(1, 3))))
