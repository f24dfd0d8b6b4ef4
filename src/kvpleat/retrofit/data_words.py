"""What recall tasks are made of: words, and values drawn at random that no model can know."""

import random
from collections.abc import Sequence
from typing import TypeVar


def _split(text: str, at: str | None = None) -> list[str]:
    """The words of a text, or what stands between commas."""
    return [" ".join(part.split()) for part in text.split(at)]


NAMES = _split("""
    Abel Ada Agnes Aisha Alma Amir Anton Aram Astrid Basil Beata Bruno Carmen Cedric Chiara Conrad Dagmar Darius
    Delia Dimitri Edda Edgar Emeka Esther Fabian Farah Felix Fiona Gideon Greta Gustav Hana Hector Hedda Hugo
    Ines Ivo Jasper Joana Kai Katya Kenji Lars Leila Leon Lucia Magda Malik Marek Mina Nadia Nestor Nils Noor
    Odette Olaf Otto Paloma Pavel Petra Quentin Ramon Renata Rosa Rufus Sanjay Selma Silas Sonja Tariq Thea
    Tomas Ulla Uri Vera Viktor Wanda Wilma Xenia Yara Yusuf Zelda Zoran
""")
SURNAMES = _split("""
    Abara Bergman Castillo Dunne Eklund Farrow Grimaldi Hofer Ibarra Jansen Kovacs Lindqvist Moreau Nakata
    Okafor Petrov Quigley Rossi Sato Thorne Urbina Vogel Whitlock Yilmaz Zielinski
""")
PLACES = _split("""
    Aarhus Almeria Arequipa Bergen Bilbao Brno Cagliari Cork Cuzco Dakar Durban Esbjerg Faro Galway Ghent Graz
    Haifa Hobart Ioannina Izmir Jaipur Kaunas Kobe Lagos Leiden Linz Lodz Malmo Matera Nantes Odense Oulu Parma
    Perth Plovdiv Porto Quito Riga Salta Split Tartu Tromso Turku Umea Utrecht Valdivia Varna Vigo Windhoek
    Zadar
""")
THINGS = _split("""
    anchor anvil atlas banner barrel basket bell bicycle binoculars blanket bottle bracelet camera candle canoe
    carpet cello chalice clock compass crate drum easel fiddle flute globe guitar hammer harp hourglass kettle
    kite ladder lantern ledger loom mandolin medal microscope mirror notebook oar organ paddle piano pitcher
    plough radio rope saddle scarf shovel sled spindle statue suitcase sundial teapot telescope tent tripod
    trumpet typewriter umbrella vase violin wagon whistle
""")
ADJECTIVES = _split("""
    amber ancient azure brass bronze carved cobalt copper crimson dusty emerald faded frozen gilded golden
    hollow indigo ivory jade lacquered leather lilac marble mossy oaken ochre painted patched pearl polished
    purple rusty scarlet silent silver slender striped tin turquoise velvet violet walnut weathered wicker
    wooden
""")
ANIMALS = _split("""
    badger bittern bison boar caribou cormorant crane curlew dingo dolphin falcon ferret gannet gecko gibbon
    heron ibex jackal kestrel lapwing lemur lynx magpie marmot marten mongoose newt ocelot osprey otter panther
    pelican pika plover puffin quail raven salamander seal shrew starling stoat swift tapir toucan viper weasel
    wombat zebu
""")
ROOMS = _split("""
    archive attic boathouse cellar chapel corridor courtyard dairy foundry gallery garage granary greenhouse
    hangar infirmary kitchen laboratory library loft mill observatory orchard pantry pavilion quarry refectory
    sacristy stable studio tower vault veranda workshop
""")
TOPICS = _split(
    """
    the bridge, the budget, the choir, the concert, the election, the excavation, the ferry, the festival, the
    garden, the harbour, the harvest, the lighthouse, the merger, the museum, the new school, the parade, the
    railway, the repairs, the rehearsal, the storm, the survey, the timetable, the trial, the wedding, the
    weather
""",
    ",",
)
MONTHS = _split("""
    January February March April May June July August September October November December
""")
ONSETS, VOWELS, CODAS = (
    [
        "b",
        "br",
        "d",
        "dr",
        "f",
        "fl",
        "g",
        "gr",
        "k",
        "kl",
        "l",
        "m",
        "n",
        "p",
        "pr",
        "r",
        "s",
        "sk",
        "t",
        "tr",
        "v",
        "z",
    ],
    "aeiou",
    ["", "", "l", "n", "r", "s"],
)
NUMERALS = _split("""
    zero one two three four five six seven eight nine ten eleven twelve
""")

T = TypeVar("T")


class Draw:
    """Draws from one random generator.

    Args:
        random: what everything is drawn from.
        size: entries of a long list, so that it suits the row's length.
    """

    def __init__(self, random: random.Random, size: int) -> None:
        self.random, self.size = random, size

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(options)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, or all."""
        return self.random.sample(options, min(count, len(options)))

    def chance(self, share: float) -> bool:
        """True in a share of all draws."""
        return self.random.random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.random.randint(low, high)

    def people(self, count: int) -> list[str]:
        """Different people; all by first names, or all by full names."""
        names = self.some(NAMES, count)
        return [f"{name} {self.pick(SURNAMES)}" for name in names] if self.chance(0.4) else names

    def things(self, count: int) -> list[str]:
        """Different things such as "copper lantern"."""
        return [f"{self.pick(ADJECTIVES)} {thing}" for thing in self.some(THINGS, count)]

    def invented(self) -> str:
        """A word that does not exist."""
        return "".join(self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in range(self.between(2, 3)))

    def new_words(self, count: int) -> list[str]:
        """Different words that do not exist."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.invented()] = None
        return list(found)

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
        parts = ["".join(self.random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=self.between(1, 3)))]
        parts.append(str(self.random.randrange(10, 10 ** self.between(2, 5))))
        if self.chance(0.5):
            parts.append("".join(self.random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789", k=self.between(1, 4))))
        return self.pick(["-", "-", "/", "", "."]).join(parts)

    def identifier(self) -> str:
        """A UUID, a part of one, or a hash."""
        digits = "".join(self.random.choices("0123456789abcdef", k=32))
        cuts = [digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]]
        return self.pick(["-".join(cuts), "-".join(cuts[:3]), digits[:12], "0x" + digits[:8], ":".join(cuts[1:4])])

    def words(self) -> str:
        """Two or three words that do not belong together."""
        parts = [self.pick(ADJECTIVES), self.pick(ANIMALS)]
        return self.pick([" ", " ", "-"]).join([*parts, self.pick(THINGS)] if self.chance(0.3) else parts)

    def moment(self) -> str:
        """A date, a time, or both."""
        date = f"{self.between(1, 28)} {self.pick(MONTHS)} {self.between(1702, 2097)}"
        return self.pick([date, f"{self.between(0, 23):02}:{self.between(0, 59):02}", date])

    def value(self) -> str:
        """A value of any kind."""
        return self.pick([self.number, self.number, self.number, self.code, self.identifier, self.words, self.moment])()
