"""Invented names and numbers: seeded, all different, and known to no pretrained model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_HEADS = (
    *("Brel", "Ceth", "Drov", "Ebr", "Fyss", "Ghes", "Huld", "Ivr", "Jask", "Kelv", "Lorm", "Mirv"),
    *("Nald", "Orv", "Pram", "Quel", "Rusk", "Sarv", "Tolm", "Uld", "Vesk", "Wrin", "Yarl", "Zind"),
)
_TAILS = (
    "ath",
    "eda",
    "ibo",
    "orn",
    "une",
    "wyr",
    "omi",
    "isk",
    "ula",
    "erv",
    "ant",
    "oss",
    "yll",
    "ekk",
    "aro",
    "ups",
)
_PLACE_ENDS = ("mere", "holt", "wick", "garth", "sund", "combe", "stow", "fell", "haven", "ness")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_STREETS = ("Lane", "Row", "Close", "Steps", "Terrace", "Yard")
_LETTERS = 6  # the shortest value: a head and a tail of three letters
_MOST_SYLLABLES = 3  # that are put into a name when the shorter ones are used up
_NONE_LEFT = "no further value of this kind is left"


class Inventor:
    """Draws values of which none contains another, and none stands in `avoid`."""

    def __init__(self, seed: int, avoid: str = "") -> None:
        # random() alone is promised to give the same numbers in every version of Python.
        self._random = random.Random(seed).random
        self._avoid = avoid.casefold()
        self._begin: dict[str, list[str]] = {}  # used values by their first letters
        self._hold: dict[str, list[str]] = {}  # used values by any letters in a row that they hold
        self._decks: dict[int, list[int]] = {}
        self._filler = ""  # further syllables, once the short names are used up

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]

    def deal(self, items: Sequence[T]) -> T:
        """One of the items; none comes twice before all of them came."""
        deck = self._decks.setdefault(id(items), [])
        if not deck:
            deck.extend(range(len(items)))
        return items[deck.pop(self.number(0, len(deck) - 1))]

    def person(self) -> str:
        """First name and surname."""
        return self._new(self._person)

    def place(self) -> str:
        """A place of one word."""
        return self._new(self._place)

    def name(self) -> str:
        """A word for a thing."""
        return self._new(self._name)

    def date(self) -> str:
        """A day between 1931 and 2004."""
        return self._new(self._date)

    def identity(self) -> str:
        """An identity number of a made-up shape."""
        return self._new(self._identity)

    def phone(self) -> str:
        """A number of the 555-01xx block, which is kept free for fiction."""
        return self._new(self._phone)

    def email(self) -> str:
        """A mailbox at a domain that is reserved for examples; it has nothing of its owner's name."""
        return self._new(self._email)

    def address(self) -> str:
        """House, street and town."""
        return self._new(self._address)

    def document(self) -> str:
        """Eight hexadecimal digits."""
        return self._new(self._document)

    def many(self, kind: str, count: int) -> list[str]:
        """`count` values of a kind (person, place, …); names grow longer only once the shorter ones are used up."""
        draw: Callable[[], str] = getattr(self, f"_{kind}")
        values: list[str] = []
        syllables = 0
        while len(values) < count:
            value = self._try(draw, syllables, 300)
            if value is not None:
                values.append(value)
            elif syllables == _MOST_SYLLABLES:
                raise ValueError(_NONE_LEFT)
            else:
                syllables += 1
        return values

    def _person(self) -> str:
        return f"{self._word()} {self._word()}"

    def _place(self) -> str:
        return self.pick(_HEADS) + self._filler + self.pick(_PLACE_ENDS)

    def _name(self) -> str:
        return self._word() + self._filler

    def _date(self) -> str:
        return f"{self.number(1, 28)} {self.pick(_MONTHS)} {self.number(1931, 2004)}"

    def _identity(self) -> str:
        return f"{self.pick('HKQVXZ')}{self.number(1000, 9999)}-{self.number(100, 999)}"

    def _phone(self) -> str:
        return f"{self.number(200, 999)}-555-01{self.number(0, 99):02d}"

    def _email(self) -> str:
        return f"{self._word().lower()}{self.number(10, 99)}@example.{self.pick(('com', 'org'))}"

    def _address(self) -> str:
        return f"{self.number(1, 199)} {self._word()} {self.pick(_STREETS)}, {self._place()}"

    def _document(self) -> str:
        return f"{self.number(0, 2**32 - 1):08x}"

    def _word(self) -> str:
        return self.pick(_HEADS) + self.pick(_TAILS)

    def _new(self, draw: Callable[[], str]) -> str:
        for syllables, attempts in enumerate((20, 980, 1000)):
            value = self._try(draw, syllables, attempts)
            if value is not None:
                return value
        raise ValueError(_NONE_LEFT)

    def _try(self, draw: Callable[[], str], syllables: int, attempts: int) -> str | None:
        """A value that may be used; None if none came up."""
        for _ in range(attempts):
            self._filler = "".join([self.pick(_TAILS) for _ in range(syllables)])
            value = draw()
            plain = value.casefold()
            if plain not in self._avoid and not self._meets_a_used_one(plain):
                self._use(plain)
                return value
        return None

    def _use(self, plain: str) -> None:
        self._begin.setdefault(plain[:_LETTERS], []).append(plain)
        for letters in set(_in_a_row(plain)):
            self._hold.setdefault(letters, []).append(plain)

    def _meets_a_used_one(self, plain: str) -> bool:
        """Whether it holds a used value or stands in one; only those that share letters with it are looked at."""
        rows = _in_a_row(plain)
        if any(other in plain for letters in rows for other in self._begin.get(letters, ())):
            return True
        fewest = min((self._hold.get(letters, []) for letters in rows), key=len)
        return any(plain in other for other in fewest)


def _in_a_row(plain: str) -> list[str]:
    """Every _LETTERS letters of a value that follow each other; each value has so many."""
    return [plain[start : start + _LETTERS] for start in range(len(plain) - _LETTERS + 1)]
