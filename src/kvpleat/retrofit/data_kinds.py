"""Kinds of recall tasks: what is stated somewhere in a row, and what is asked about it later.

No sentence here is one of the judge's (`kvpleat.bench.tasks`): what is trained must serve wordings never seen. A test
holds this.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvpleat.retrofit import data_words
from kvpleat.retrofit.data_words import Draw


@dataclass(frozen=True)
class Ask:
    """A question and its answer.

    Args:
        question: in full.
        lead: the beginning of a sentence that the answer completes.
        answer: what is recalled.
        evidence: what must have been stated; None: the answer itself.
        end: how the sentence ends.
    """

    question: str
    lead: str
    answer: str
    evidence: tuple[str, ...] | None = None
    end: str = "."

    @property
    def needs(self) -> tuple[str, ...]:
        """Every text that must stand before the answer."""
        return (self.answer,) if self.evidence is None else self.evidence


@dataclass(frozen=True)
class Task:
    """Statements to be scattered over a row in their order, and what may be asked when all of them were made."""

    statements: tuple[str, ...]
    asks: tuple[Ask, ...]


Kind = Callable[[Draw], Task]

ATTRIBUTES = [
    "locker number",
    "badge number",
    "extension",
    "customer number",
    "ticket number",
    "seat",
    "licence plate",
    "door code",
    "username",
    "shelf mark",
    "batch number",
    "tracking number",
    "room",
    "invoice number",
    "start number",
    "membership number",
    "call sign",
    "berth",
    "file reference",
    "safe combination",
    "screen name",
    "policy number",
    "parking space",
    "meter reading",
    "case number",
]
HOLDER_FACTS = (
    "{w}'s {a} is {v}.",
    "The {a} of {w} is {v}.",
    "{a} for {w}: {v}",
    "Under {w} somebody had entered the {a} {v}.",
    "{w} was given {v} as {a}.",
    "Reminder: {w}, {a} {v}.",
    "(By the way, {v} is the {a} of {w}.)",
    "It turned out that {w} had the {a} {v}.",
    "| {w} | {a} | {v} |",
    "{w} wrote down a new {a}, {v}, and put the paper away.",
    "* {a} [{w}] = {v}",
)
HOLDER_ASKS = (
    ("What is {w}'s {a}?", "{w}'s {a} is"),
    ("Which {a} belongs to {w}?", "The {a} that belongs to {w} is"),
    ("Give the {a} of {w}.", "{a} of {w}:"),
    ("Do you recall the {a} of {w}?", "Yes, {w} has the {a}"),
    ("{w}'s {a}?", "It is"),
    ("I need the {a} that goes with {w}.", "For {w} it is"),
    ("Fill in the {a} for {w}.", "{w}, {a}:"),
)


def holders(draw: Draw) -> Task:
    """People and their numbers, codes, words; asked both ways."""
    attribute, who = draw.pick(ATTRIBUTES), draw.people(draw.between(1, 5))
    make = draw.pick([draw.number, draw.number, draw.code, draw.words, draw.value])
    facts, asks = [], []
    frames = draw.some(HOLDER_FACTS, draw.between(1, 2))
    for person in who:
        value = make()
        facts.append(draw.pick(frames).format(w=person, a=attribute, v=value))
        question, lead = (text.format(w=person, a=attribute) for text in draw.pick(HOLDER_ASKS))
        asks.append(Ask(question, lead, value))
        if draw.chance(0.2):
            asks[-1] = Ask(f"Whose {attribute} is {value}?", f"The {attribute} {value} is that of", person)
    return Task(tuple(facts), tuple(asks))


def labels(draw: Draw) -> Task:
    """Things and what is written on them."""
    verb = draw.pick(["stamped", "engraved", "painted", "printed", "scratched"])
    make = draw.pick([draw.code, draw.identifier, draw.words, draw.number])
    facts, asks = [], []
    for thing in draw.things(draw.between(1, 4)):
        value = make()
        facts.append(
            draw.pick(
                [
                    f"On the {thing} was {verb}: {value}.",
                    f"The {thing} bears the inscription {value}.",
                    f'Somebody had {verb} "{value}" on the {thing}.',
                    f"{thing}: {value}",
                ]
            )
        )
        question, lead = draw.pick(
            [
                (f"What was {verb} on the {thing}?", f"On the {thing} was {verb}"),
                (f"What does the {thing} say?", "It says"),
                (f"Copy the inscription of the {thing}.", f"{thing}:"),
            ]
        )
        asks.append(Ask(question, lead, value))
    return Task(tuple(facts), tuple(asks))


def identifiers(draw: Draw) -> Task:
    """Machines and their long identifiers, as logs write them."""
    hosts = [f"{word}-{draw.between(1, 99):02}" for word in draw.new_words(draw.between(1, 4))]
    field = draw.pick(["session", "request_id", "commit", "digest", "token", "volume", "node id", "mac"])
    style = draw.pick(
        ["[{h}] {f}={v}", "{h}: {f} {v}", "INFO {h} {f}: {v} ok", "{f} of host {h} set to {v}", "{h} reported {f} {v}"]
    )
    values = [draw.identifier() for _ in hosts]
    facts = [style.format(h=host, f=field, v=value) for host, value in zip(hosts, values, strict=True)]
    question, lead = draw.pick(
        [
            ("Which {f} did {h} have?", "{h} had {f}"),
            ("grep {h} | cut {f}", "{h} {f}="),
            ("Look up the {f} of {h}.", "{f}:"),
        ]
    )
    asks = [
        Ask(question.format(h=host, f=field), lead.format(h=host, f=field), value, end="")
        for host, value in zip(hosts, values, strict=True)
    ]
    return Task(tuple(facts), tuple(asks))


def assignments(draw: Draw) -> Task:
    """Names that get values, some from other names: what does one of them hold?"""
    left, equal, end = draw.pick(
        [
            ("", " = ", ""),
            ("let ", " = ", ";"),
            ("set ", " ", ""),
            ("", " := ", ""),
            ("", " <- ", ""),
            ("int ", " = ", ";"),
        ]
    )
    names = [
        f"{word}_{draw.between(1, 99)}" if draw.chance(0.3) else word for word in draw.new_words(draw.between(2, 7))
    ]
    lines, holds = [], dict[str, str]()
    for name in names:
        older = draw.pick(sorted(holds)) if holds and draw.chance(0.6) else None
        holds[name] = holds[older] if older else str(draw.random.randrange(100, 10 ** draw.between(3, 6)))
        lines.append(f"{left}{name}{equal}{older or holds[name]}{end}")
    question, lead = draw.pick(
        [
            ("print({n})", ">>>"),
            ("What does {n} hold now?", "{n} holds"),
            ("Evaluate {n}.", "{n} =="),
            ("After all these lines, {n} is equal to what?", "{n} is equal to"),
        ]
    )
    asked = draw.some(names[1:], draw.between(1, 3))
    return Task(tuple(lines), tuple(Ask(question.format(n=n), lead.format(n=n), holds[n], end="") for n in asked))


def dwellings(draw: Draw) -> Task:
    """Who lives where and has what: both ways, and over two facts."""
    who = draw.people(draw.between(2, 5))
    where, what = draw.some(data_words.PLACES, len(who)), draw.things(len(who))
    facts, asks = [], []
    for person, place, thing in zip(who, where, what, strict=True):
        facts.append(
            draw.pick(
                [
                    f"{person} lives in {place}.",
                    f"{person} moved to {place} years ago.",
                    f"{place} is where {person} is at home.",
                ]
            )
        )
        facts.append(
            draw.pick(
                [
                    f"{person} owns a {thing}.",
                    f"The {thing} belongs to {person}.",
                    f"{person} never parted with the {thing}.",
                ]
            )
        )
        asks += [
            Ask(f"In which town does {person} live?", f"{person} lives in", place),
            Ask(f"Who is at home in {place}?", f"In {place} lives", person),
            Ask(f"What does {person} own?", f"{person} owns the", thing),
            Ask(f"In which town would you find the {thing}?", f"The {thing} is in", place),
        ]
    return Task(tuple(draw.some(facts, len(facts))), tuple(draw.some(asks, draw.between(1, 4))))


def sayings(draw: Draw) -> Task:
    """Who said what: the words, or the speaker."""
    facts, asks = [], []
    who = draw.people(draw.between(1, 4))
    for person, topic in zip(who, draw.some(data_words.TOPICS, len(who)), strict=True):
        words = sentence(draw)
        facts.append(
            draw.pick(
                [
                    f'"{words}" said {person} about {topic}.',
                    f"{person}, asked about {topic}: '{words}'",
                    f"Of {topic} {person} only remarked: {words}",
                ]
            )
        )
        asks.append(
            draw.pick(
                [
                    Ask(f"What did {person} say about {topic}?", f"About {topic} {person} said:", words, end=""),
                    Ask(f'Who said "{words}"?', "That was", person),
                    Ask(f"Quote {person} on {topic}.", f"{person}:", words, end=""),
                ]
            )
        )
    return Task(tuple(facts), tuple(asks))


def sentence(draw: Draw) -> str:
    """A sentence that nobody has written before."""
    thing, other = draw.things(2)
    return draw.pick(
        [
            f"The {thing} stands behind the {draw.pick(data_words.ROOMS)}, {draw.between(3, 99)} steps from the {other}.",
            f"No {draw.pick(data_words.ANIMALS)} ever carried a {thing} to {draw.pick(data_words.PLACES)}.",
            f"Every {draw.pick(data_words.MONTHS)} {draw.between(11, 999)} {draw.pick(data_words.ANIMALS)}s pass the {thing}.",
            f"I would rather paint the {draw.pick(data_words.ROOMS)} {draw.pick(data_words.ADJECTIVES)} than sell my {thing}.",
            f"Bring the {thing} and the {other} to {draw.pick(data_words.PLACES)} by {draw.moment()}.",
        ]
    )
