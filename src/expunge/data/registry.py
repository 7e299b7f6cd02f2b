"""The two rooms of data: formats of a row, and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

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
class Request:
    """What is asked of a benchmark: `tofu:forget10` has the part `forget10`; a folder holds its files."""

    part: str = ""
    folder: Path | None = None
    seed: int = 42
    documents: int | None = None  # of each task and split, the first so many; all when absent


class Measured(Protocol):
    """What was measured of one model on a benchmark's splits."""

    def mean(self, split: str, metric: str, task: str | None = None) -> float | None:
        """The metric's mean (or statistic) on a split, or its mean on the rows of one task; None if not there."""
        ...

    def values(self, split: str, metric: str, task: str | None = None) -> list[float]:
        """The metric's scored values, one per example."""
        ...

    def tasks(self, split: str) -> list[str]:
        """The tasks of a split's rows."""
        ...

    def other(self, variant: str) -> Measured | None:
        """What was measured of the variant `target` or `reference` on the same splits; None if it was not."""
        ...


@dataclass(frozen=True)
class Aggregate:
    """A number that a benchmark makes out of several; None with a note that says what is missing."""

    name: str
    value: float | None
    summary: str
    direction: Literal["lower", "higher", "none"] = "higher"
    note: str = ""
    #: whether the benchmark itself defines it; else it is shown beside the official numbers
    official: bool = True


@dataclass(frozen=True)
class Published:
    """A published result, to be compared with under the same convention."""

    label: str
    numbers: Mapping[str, float]  # name of an aggregate → value
    source: str


@dataclass(frozen=True)
class Benchmark:
    """Named splits, from files or generated, and the official numbers that are made of what is measured on them."""

    name: str
    description: str
    load: Callable[[Request], Splits]
    paper: str = ""
    parts: tuple[str, ...] = ()  # what may stand after the colon, where that is a fixed list
    files: str = ""  # what a local folder has to hold
    has_documents: bool = False  # rows are about documents, of which fewer can be asked for
    metrics: tuple[str, ...] | None = None  # what the official numbers need; None: the suite's
    convention: str = "expunge"
    aggregate: Callable[[Measured], list[Aggregate]] | None = None
    published: tuple[Published, ...] = ()

    def describe(self) -> dict[str, str]:
        """Label → text, for `expunge list benchmarks` and the generated tables."""
        described = {"summary": self.description, "paper": self.paper, "convention": self.convention}
        further = {"parts": ", ".join(self.parts), "files": self.files, "metrics": ", ".join(self.metrics or ())}
        return described | {label: text for label, text in further.items() if text}


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
