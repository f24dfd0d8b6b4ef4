"""What recall tasks are made of: words, and values drawn at random that no model can know."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar


def split(text: str, at: str | None = None) -> list[str]:
    """The words of a text, or what stands between commas."""
    return [" ".join(part.split()) for part in text.split(at)]


NAMES = split("""
    Abel Ada Agnes Aisha Alma Amir Anton Aram Astrid Basil Beata Bruno Carmen Cedric Chiara Conrad Dagmar Darius
    Delia Dimitri Edda Edgar Emeka Esther Fabian Farah Felix Fiona Gideon Greta Gustav Hana Hector Hedda Hugo
    Ines Ivo Jasper Joana Kai Katya Kenji Lars Leila Leon Lucia Magda Malik Marek Mina Nadia Nestor Nils Noor
    Odette Olaf Otto Paloma Pavel Petra Quentin Ramon Renata Rosa Rufus Sanjay Selma Silas Sonja Tariq Thea
    Tomas Ulla Uri Vera Viktor Wanda Wilma Xenia Yara Yusuf Zelda Zoran
""")
SURNAMES = split("""
    Abara Bergman Castillo Dunne Eklund Farrow Grimaldi Hofer Ibarra Jansen Kovacs Lindqvist Moreau Nakata
    Okafor Petrov Quigley Rossi Sato Thorne Urbina Vogel Whitlock Yilmaz Zielinski
""")
PLACES = split("""
    Aarhus Almeria Arequipa Bergen Bilbao Brno Cagliari Cork Cuzco Dakar Durban Esbjerg Faro Galway Ghent Graz
    Haifa Hobart Ioannina Izmir Jaipur Kaunas Kobe Lagos Leiden Linz Lodz Malmo Matera Nantes Odense Oulu Parma
    Perth Plovdiv Porto Quito Riga Salta Split Tartu Tromso Turku Umea Utrecht Valdivia Varna Vigo Windhoek
    Zadar
""")
THINGS = split("""
    anchor anvil atlas banner barrel basket bell bicycle binoculars blanket bottle bracelet camera candle canoe
    carpet cello chalice clock compass crate drum easel fiddle flute globe guitar hammer harp hourglass kettle
    kite ladder lantern ledger loom mandolin medal microscope mirror notebook oar organ paddle piano pitcher
    plough radio rope saddle scarf shovel sled spindle statue suitcase sundial teapot telescope tent tripod
    trumpet typewriter umbrella vase violin wagon whistle
""")
ADJECTIVES = split("""
    amber ancient azure brass bronze carved cobalt copper crimson dusty emerald faded frozen gilded golden
    hollow indigo ivory jade lacquered leather lilac marble mossy oaken ochre painted patched pearl polished
    purple rusty scarlet silent silver slender striped tin turquoise velvet violet walnut weathered wicker
    wooden
""")
ANIMALS = split("""
    badger bittern bison boar caribou cormorant crane curlew dingo dolphin falcon ferret gannet gecko gibbon
    heron ibex jackal kestrel lapwing lemur lynx magpie marmot marten mongoose newt ocelot osprey otter panther
    pelican pika plover puffin quail raven salamander seal shrew starling stoat swift tapir toucan viper weasel
    wombat zebu
""")
ROOMS = split("""
    archive attic boathouse cellar chapel corridor courtyard dairy foundry gallery garage granary greenhouse
    hangar infirmary kitchen laboratory library loft mill observatory orchard pantry pavilion quarry refectory
    sacristy stable studio tower vault veranda workshop
""")
TOPICS = split(
    """the bridge, the budget, the choir, the concert, the election, the excavation, the ferry, the festival, the
    garden, the harbour, the harvest, the lighthouse, the merger, the museum, the new school, the parade, the
    railway, the repairs, the rehearsal, the storm, the survey, the timetable, the trial, the wedding, the
    weather""",
    ",",
)
MONTHS = split("January February March April May June July August September October November December")
ONSETS = split("b br d dr f fl g gr k kl l m n p pr r s sk t tr v z")
VOWELS, CODAS = "aeiou", ("", "", "l", "n", "r", "s")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
NUMERALS = split("zero one two three four five six seven eight nine ten eleven twelve")

T = TypeVar("T")


class Draw:
    """Draws from one random generator. People, places, things and new words never come twice from one of these.

    Args:
        random: what everything is drawn from.
        size: entries of a long list, so that it suits the row's length.
        passage: draws a paragraph of real text; None where there is none.
    """

    def __init__(self, random: random.Random, size: int, passage: Callable[[random.Random], str | None]) -> None:
        self.random, self.size = random, size
        self._passage = passage
        self._used: set[str] = set()

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(options)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones in any order, or all."""
        return self.random.sample(options, min(count, len(options)))

    def chance(self, share: float) -> bool:
        """True in a share of all draws."""
        return self.random.random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.random.randint(low, high)

    def passage(self) -> str | None:
        """A paragraph of real text, or None."""
        return self._passage(self.random)

    def new(self, count: int, *makers: Callable[[], str]) -> list[str]:
        """`count` texts that did not come before, of the first maker that still has some; the last one always has."""
        found: list[str] = []
        while len(found) < count:
            tries = (make() for make in makers for _ in range(20))
            text = next((t for t in tries if t not in self._used), None) or makers[-1]()
            self._used.add(text)
            found.append(text)
        return found

    def people(self, count: int) -> list[str]:
        """Different people; all by first names, or all by full names."""
        names = self.new(count, lambda: self.pick(NAMES), lambda: self.invented().title())
        return [f"{name} {self.pick(SURNAMES)}" for name in names] if self.chance(0.4) else names

    def places(self, count: int) -> list[str]:
        """Different towns."""
        return self.new(
            count, lambda: self.pick(PLACES), lambda: self.invented().title() + self.pick(["ville", "ford"])
        )

    def things(self, count: int) -> list[str]:
        """Different things such as "copper lantern"."""
        return self.new(count, lambda: f"{self.pick(ADJECTIVES)} {self.pick(THINGS)}")

    def words(self, count: int) -> list[str]:
        """Different words that do not exist."""
        return self.new(count, self.invented)

    def invented(self) -> str:
        """A word that does not exist."""
        syllables = range(self.between(2, 3))
        return "".join(self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in syllables)

    def number(self) -> str:
        """Three to eight digits, now and then in groups."""
        digits = self.between(3, 8)
        value = self.random.randrange(10 ** (digits - 1), 10**digits)
        if digits > 4 and self.chance(0.2):
            return f"{value:,}"
        if digits > 5 and self.chance(0.2):
            return f"{str(value)[:3]}-{str(value)[3:]}"
        return str(value)

    def code(self) -> str:
        """Letters and digits, such as "QX-4821-B"."""
        parts = ["".join(self.random.choices(LETTERS, k=self.between(1, 3)))]
        parts.append(str(self.random.randrange(10, 10 ** self.between(2, 5))))
        if self.chance(0.5):
            parts.append("".join(self.random.choices(LETTERS + "0123456789", k=self.between(1, 4))))
        return self.pick(["-", "-", "/", "", "."]).join(parts)

    def identifier(self) -> str:
        """A UUID, a part of one, or a hash."""
        digits = "".join(self.random.choices("0123456789abcdef", k=32))
        cuts = [digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]]
        return self.pick(["-".join(cuts), "-".join(cuts[:3]), digits[:12], "0x" + digits[:8], ":".join(cuts[1:4])])

    def phrase(self) -> str:
        """Two or three words that do not belong together."""
        parts = [self.pick(ADJECTIVES), self.pick(ANIMALS)]
        return self.pick([" ", " ", "-"]).join([*parts, self.pick(THINGS)] if self.chance(0.3) else parts)

    def time(self) -> str:
        """A time of the day."""
        return f"{self.between(0, 23)}:{self.between(0, 59):02}"

    def date(self) -> str:
        """A day."""
        return f"{self.between(1, 28)} {self.pick(MONTHS)} {self.between(1702, 2097)}"

    def value(self) -> str:
        """A value of any kind."""
        makers = [self.number, self.number, self.number, self.code, self.identifier, self.phrase, self.time, self.date]
        return self.pick(makers)()

    def sentence(self) -> str:
        """A sentence that nobody has written before."""
        thing, other = self.things(2)
        room, place, animal = self.pick(ROOMS), self.pick(PLACES), self.pick(ANIMALS)
        return self.pick(
            [
                f"The {thing} stands behind the {room}, {self.between(3, 99)} steps from the {other}.",
                f"No {animal} ever carried {one(thing)} to {place}.",
                f"Every {self.pick(MONTHS)} {self.between(11, 999)} {animal}s pass the {thing}.",
                f"I would rather paint the {room} {self.pick(ADJECTIVES)} than sell my {thing}.",
                f"Bring the {thing} and the {other} to {place} by {self.date()}.",
                f"Whoever finds {one(thing)} in the {room} must tell {self.pick(NAMES)} before {self.time()}.",
                f"Under the {other} lay {self.between(2, 80)} letters about {one(animal)} and {one(thing)}.",
            ]
        )


def one(noun: str) -> str:
    """A noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(items) if len(items) < 2 else f"{', '.join(items[:-1])} and {items[-1]}"
