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


class Inventor:
    """Draws values of which none contains another, and none stands in `avoid`."""

    def __init__(self, seed: int, avoid: str = "") -> None:
        # random() alone is promised to give the same numbers in every version of Python.
        self._random = random.Random(seed).random
        self._avoid = avoid.casefold()
        self._used: list[str] = []
        self._decks: dict[int, list[int]] = {}
        self._filler = ""  # a further syllable, once the short names are used up

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
        return self._new(lambda: f"{self._word()} {self._word()}")

    def place(self) -> str:
        """A place of one word."""
        return self._new(lambda: self.pick(_HEADS) + self._filler + self.pick(_PLACE_ENDS))

    def name(self) -> str:
        """A word for a thing."""
        return self._new(lambda: self._word() + self._filler)

    def date(self) -> str:
        """A day between 1931 and 2004."""
        return self._new(lambda: f"{self.number(1, 28)} {self.pick(_MONTHS)} {self.number(1931, 2004)}")

    def identity(self) -> str:
        """An identity number of a made-up shape."""
        return self._new(lambda: f"{self.pick('HKQVXZ')}{self.number(1000, 9999)}-{self.number(100, 999)}")

    def phone(self) -> str:
        """A number of the 555-01xx block, which is kept free for fiction."""
        return self._new(lambda: f"{self.number(200, 999)}-555-01{self.number(0, 99):02d}")

    def email(self) -> str:
        """A mailbox at a domain that is reserved for examples; it has nothing of its owner's name."""
        return self._new(
            lambda: f"{self._word().lower()}{self.number(10, 99)}@example.{self.pick(('com', 'org'))}",
        )

    def address(self) -> str:
        """House, street and town."""
        return self._new(
            lambda: (
                f"{self.number(1, 199)} {self._word()} {self.pick(_STREETS)}, "
                f"{self.pick(_HEADS)}{self._filler}{self.pick(_PLACE_ENDS)}"
            )
        )

    def document(self) -> str:
        """Eight hexadecimal digits."""
        return self._new(lambda: f"{self.number(0, 2**32 - 1):08x}")

    def _word(self) -> str:
        return self.pick(_HEADS) + self.pick(_TAILS)

    def _new(self, draw: Callable[[], str]) -> str:
        for attempt in range(1000):
            self._filler = self.pick(_TAILS) if attempt >= 20 else ""
            value = draw()
            plain = value.casefold()
            if plain not in self._avoid and not any(plain in other or other in plain for other in self._used):
                self._used.append(plain)
                return value
        raise ValueError("no further value of this kind is left")
