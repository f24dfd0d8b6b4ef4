"""Kinds of recall tasks about single facts: what is stated somewhere in a row, and what may be asked about it later.

No sentence here is one of the judge's (`kvpleat.bench.tasks`): what is trained must serve wordings never seen. A test
holds this. Lists, counts and texts to be copied are in `data_series`.
"""

from dataclasses import dataclass

from kvpleat.retrofit.data_words import ROOMS, TOPICS, Draw, split


@dataclass(frozen=True)
class Ask:
    """A question and its answer.

    Args:
        question: in full.
        lead: the beginning of a sentence that names what is asked for and that the answer completes.
        answer: what is recalled.
        evidence: texts that stand in the task's statements and are needed; None: the answer itself.
        end: how the sentence ends.
    """

    question: str
    lead: str
    answer: str
    evidence: tuple[str, ...] | None = None
    end: str = "."

    @property
    def needs(self) -> tuple[str, ...]:
        """Texts that stand in the task's statements and are needed for the answer."""
        return (self.answer,) if self.evidence is None else self.evidence


@dataclass(frozen=True)
class Task:
    """Statements to be scattered over a row in their order, and what may be asked when all of them were made."""

    statements: tuple[str, ...]
    asks: tuple[Ask, ...]


ATTRIBUTES = split(
    """locker number, badge number, extension, customer number, ticket number, seat, licence plate, door code, username,
    shelf mark, batch number, tracking number, room, invoice number, start number, membership number, call sign, berth,
    file reference, safe combination, screen name, policy number, parking space, meter reading, case number""",
    ",",
)
HOLDER_FACTS = (
    "{w}'s {a} is {v}.",
    "The {a} of {w} is {v}.",
    "{a} for {w}: {v}",
    "Beside the name of {w} somebody had entered the {a} {v}.",
    "{w} was given {v} as {a}.",
    "Reminder: {w}, {a} {v}.",
    "(By the way, {v} is the {a} of {w}.)",
    "It turned out that {w} had the {a} {v}.",
    "| {w} | {a} | {v} |",
    "{w} wrote down a new {a}, {v}, and put the paper away.",
    "* {a} [{w}] = {v}",
    "Please update our files: for {w} the {a} is to be {v} from now on.",
)
HOLDER_ASKS = (
    ("What is {w}'s {a}?", "{w}'s {a} is"),
    ("Which {a} belongs to {w}?", "The {a} that belongs to {w} is"),
    ("Give the {a} of {w}.", "{a} of {w}:"),
    ("Do you recall the {a} of {w}?", "{w} has the {a}"),
    ("{w}'s {a}?", "{w}, {a}:"),
    ("I need the {a} that goes with {w}.", "The {a} that goes with {w} is"),
    ("Fill in the {a} for {w}.", "| {w} | {a} |"),
)


def holders(draw: Draw) -> Task:
    """People and their numbers, codes, words; asked both ways."""
    attribute, who = draw.pick(ATTRIBUTES), draw.people(draw.between(1, 5))
    make = draw.pick([draw.number, draw.number, draw.code, draw.phrase, draw.value])
    frames = draw.some(HOLDER_FACTS, draw.between(1, 2))
    facts, asks = [], []
    for person in who:
        value = make()
        facts.append(draw.pick(frames).format(w=person, a=attribute, v=value))
        question, lead = (text.format(w=person, a=attribute) for text in draw.pick(HOLDER_ASKS))
        asks.append(Ask(question, lead, value, end=""))
        if draw.chance(0.2):
            asks[-1] = Ask(f"Whose {attribute} is {value}?", f"The {attribute} {value} is that of", person)
    return Task(tuple(facts), tuple(asks))


def profile(draw: Draw) -> Task:
    """What a speaker told about himself."""
    facts, asks = [], []
    for attribute in draw.new(draw.between(1, 4), lambda: draw.pick(ATTRIBUTES), lambda: draw.things(1)[0] + " label"):
        value = draw.value()
        facts.append(
            draw.pick(
                [
                    f"My {attribute} is {value}.",
                    f"Just so you know, {value} is my {attribute}.",
                    f"I finally have a {attribute}: {value}.",
                    f"They changed my {attribute} to {value} today.",
                ]
            )
        )
        question, lead = draw.pick(
            [
                (f"What did I say my {attribute} was?", f"You said that your {attribute} was"),
                (f"Remind me: which {attribute} do I have?", f"Your {attribute} is"),
                (f"I forgot my {attribute}.", f"You told me your {attribute}:"),
            ]
        )
        asks.append(Ask(question, lead, value))
    return Task(tuple(facts), tuple(asks))


def labels(draw: Draw) -> Task:
    """Things and what is written on them."""
    verb = draw.pick(["stamped", "engraved", "painted", "printed", "scratched"])
    make = draw.pick([draw.code, draw.identifier, draw.phrase, draw.number])
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
                (f"What does the {thing} say?", f"The {thing} says"),
                (f"Copy the inscription of the {thing}.", f"{thing}:"),
            ]
        )
        asks.append(Ask(question, lead, value))
    return Task(tuple(facts), tuple(asks))


def identifiers(draw: Draw) -> Task:
    """Machines and their long identifiers, as logs write them."""
    hosts = [f"{word}-{draw.between(1, 99):02}" for word in draw.words(draw.between(1, 4))]
    field = draw.pick(["session", "request_id", "commit", "digest", "token", "volume", "node id", "mac"])
    style = draw.pick(
        ["[{h}] {f}={v}", "{h}: {f} {v}", "INFO {h} {f}: {v} ok", "{f} of host {h} set to {v}", "{h} reported {f} {v}"]
    )
    question, lead = draw.pick(
        [
            ("Which {f} did {h} have?", "{h} had {f}"),
            ("grep {f} {h}.log", "{h} {f}="),
            ("Look up {f} of {h}.", "{h}: {f}"),
        ]
    )
    values = [draw.identifier() for _ in hosts]
    facts = [style.format(h=host, f=field, v=value) for host, value in zip(hosts, values, strict=True)]
    asks = [
        Ask(question.format(h=host, f=field), lead.format(h=host, f=field), value, end="")
        for host, value in zip(hosts, values, strict=True)
    ]
    return Task(tuple(facts), tuple(asks))


def assignments(draw: Draw) -> Task:
    """Names that get values, some from other names: what one of them holds, and which of them hold a value."""
    form = draw.pick(
        ["{n} = {v}", "let {n} = {v};", "set {n} {v}", "{n} := {v}", "{n} <- {v}", "int {n} = {v};", "{n} equals {v}."]
    )
    names = draw.words(draw.between(2, 7))
    lines, holds = [], dict[str, str]()
    for name in names:
        older = draw.pick(sorted(holds)) if holds and draw.chance(0.6) else None
        holds[name] = holds[older] if older else str(draw.random.randrange(100, 10 ** draw.between(3, 6)))
        lines.append(form.format(n=name, v=older or holds[name]))
    question, lead = draw.pick(
        [
            ("print({n})", ">>> {n}"),
            ("What does {n} hold now?", "{n} holds"),
            ("Evaluate {n}.", "{n} =="),
            ("After all these lines, {n} equals what?", "{n} equals"),
        ]
    )
    asks = [Ask(question.format(n=n), lead.format(n=n), holds[n], end="") for n in draw.some(names, draw.between(1, 3))]
    if draw.chance(0.4):
        value = holds[draw.pick(names)]
        same = tuple(name for name in names if holds[name] == value)
        asks.append(Ask(f"List each name with a value of {value}.", f"Equal to {value}:", ", ".join(same), same, ""))
    return Task(tuple(lines), tuple(asks))


def dwellings(draw: Draw) -> Task:
    """Who lives where and has what: both ways, and over two facts."""
    who = draw.people(draw.between(2, 5))
    facts, asks = [], []
    for person, place, thing in zip(who, draw.places(len(who)), draw.things(len(who)), strict=True):
        at = [
            f"{person} lives in {place}.",
            f"{person} moved to {place} years ago.",
            f"{place} is where {person} is at home.",
        ]
        has = [f"{person} owns the {thing}.", f"The {thing} belongs to {person}.", f"{person} never sold the {thing}."]
        facts += [draw.pick(at), draw.pick(has)]
        asks += [
            Ask(f"In which town does {person} live?", f"{person} lives in", place),
            Ask(f"Who is at home in {place}?", f"In {place} lives", person),
            Ask(f"What does {person} own?", f"{person} owns the", thing),
            Ask(f"In which town would you find the {thing}?", f"The {thing} must be in", place),
        ]
    return Task(tuple(draw.some(facts, len(facts))), tuple(draw.some(asks, draw.between(1, 4))))


def sayings(draw: Draw) -> Task:
    """Who said what about what: the words, or the speaker."""
    facts, asks = [], []
    who = draw.people(draw.between(1, 4))
    topics = draw.new(len(who), lambda: draw.pick(TOPICS), lambda: "the " + draw.things(1)[0])
    for person, topic in zip(who, topics, strict=True):
        words = draw.sentence()
        facts.append(
            draw.pick(
                [
                    f'"{words}" said {person} about {topic}.',
                    f"{person}, asked about {topic}: '{words}'",
                    f"Of {topic} {person} only remarked: {words}",
                    f"Reporter: And {topic}?\n{person}: {words}",
                ]
            )
        )
        asks.append(
            draw.pick(
                [
                    Ask(f"What did {person} say about {topic}?", f"About {topic} {person} said:", words, end=""),
                    Ask(f'Who said "{words}"?', f'"{words}" These are the words of', person),
                    Ask(f"Quote {person} on {topic}.", f"{person} on {topic}:", words, end=""),
                ]
            )
        )
    return Task(tuple(facts), tuple(asks))


def errands(draw: Draw) -> Task:
    """Things that are put somewhere and carried on: where they are, where they were, who carried them."""
    facts, asks = [], []
    for thing in draw.things(draw.between(1, 3)):
        rooms, who = draw.some(ROOMS, draw.between(1, 3)), draw.people(3)
        facts.append(f"{who[0]} {draw.pick(['left', 'put', 'hid', 'forgot'])} the {thing} in the {rooms[0]}.")
        for person, room in zip(who[1:], rooms[1:], strict=False):
            facts.append(f"{person} {draw.pick(['carried', 'brought', 'moved'])} the {thing} to the {room}.")
        asks += [
            Ask(f"Where is the {thing} now?", f"By now the {thing} is in the", rooms[-1]),
            Ask(f"Where was the {thing} at first?", f"At first the {thing} was in the", rooms[0]),
            Ask(
                f"Who took the {thing} to the {rooms[-1]}?",
                f"The {thing} came to the {rooms[-1]} with",
                who[len(rooms) - 1],
            ),
        ]
    return Task(tuple(facts), tuple(draw.some(asks, draw.between(1, 3))))


def appointments(draw: Draw) -> Task:
    """Who meets whom, where and when."""
    facts, asks = [], []
    for _ in range(draw.between(1, 3)):
        (one, other), (place,), day, hour = draw.people(2), draw.places(1), draw.date(), draw.time()
        facts.append(
            draw.pick(
                [
                    f"{one} will meet {other} in {place} on {day} at {hour}.",
                    f"Calendar: {day}, {hour}, {place}. {one} with {other}.",
                    f"On {day} at {hour} {one} and {other} have a table in {place}.",
                ]
            )
        )
        pair = f"{one} and {other}"
        asks += [
            Ask(f"On which day do {pair} meet?", f"{pair} meet on", day),
            Ask(f"At what time do {pair} meet?", f"{pair} meet at", hour),
            Ask(f"Where do {pair} meet?", f"{pair} meet in", place),
            Ask(f"Whom does {one} meet in {place}?", f"In {place} {one} meets", other),
        ]
    return Task(tuple(facts), tuple(draw.some(asks, draw.between(1, 4))))
