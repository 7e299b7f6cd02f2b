"""The two rooms of data: formats of a row, and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expunge.data.example import Example, Splits
from expunge.registry import Registry

#: A column by its names: the first is the one that messages use.
Column = tuple[str, ...]


class RowError(ValueError):
    """A row that cannot be used: one clause, without the place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, as the readers of formats see it."""

    values: Mapping[str, Any]
    index: int  # from 0, among the rows of the file
    source: str  # "file:line"


@dataclass(frozen=True)
class Format:
    """A way in which a record holds a prompt and an answer."""

    name: str
    description: str
    columns: tuple[Column, ...]  # every one is needed
    example: Mapping[str, Any]  # a record, as `expunge list formats` shows it
    reader: Callable[[Row], Example]
    not_with: frozenset[str] = frozenset()  # columns that show that it is something else

    def sniff(self, keys: Iterable[str]) -> bool:
        """Whether a record with these columns is of this format."""
        present = set(keys)
        return not (self.not_with & present) and all(present.intersection(names) for names in self.columns)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Names of the needed columns that are not among `keys`."""
        present = set(keys)
        return [names[0] for names in self.columns if not present.intersection(names)]

    def read(self, row: Mapping[str, Any], index: int, source: str) -> Example:
        """The example in a record. Raises RowError."""
        return self.reader(Row(row, index, source))


@dataclass(frozen=True)
class Benchmark:
    """Named splits that need no file. `load(seed, size)` makes them; size None is the benchmark's own."""

    name: str
    description: str
    load: Callable[[int, int | None], Splits]
    paper: str = ""


FORMATS: Registry[Format] = Registry("data format", "expunge.data.formats")
BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "expunge.data.benchmarks")


def data_format(
    name: str,
    *,
    description: str,
    columns: tuple[Column, ...],
    example: Mapping[str, Any],
    not_with: Iterable[str] = (),
) -> Callable[[Callable[[Row], Example]], Callable[[Row], Example]]:
    """Decorator that files the reader of one format."""

    def file(reader: Callable[[Row], Example]) -> Callable[[Row], Example]:
        FORMATS.register(name)(Format(name, description, columns, example, reader, frozenset(not_with)))
        return reader

    return file
