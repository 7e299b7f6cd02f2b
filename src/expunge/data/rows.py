"""Examples out of a source, one at a time, and an issue for every row that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from expunge.data.containers import Record, read_file
from expunge.data.example import Example
from expunge.data.hub import is_dataset, read_dataset
from expunge.data.registry import FORMATS, Format, RowError
from expunge.errors import UserError


@dataclass(frozen=True, slots=True)
class Issue:
    """A row that cannot be used, and why."""

    record: Record
    problem: str

    def __str__(self) -> str:
        return f"{self.record.place}: {self.problem}"


class Rows:
    """The rows of a file or dataset. `format` and `columns` are known once the first good record was read."""

    def __init__(self, path: str, format_name: str | None = None) -> None:
        self.path = path
        self.format: Format | None = FORMATS.get(format_name) if format_name else None
        self.given = format_name is not None
        self.columns: list[str] = []

    def __iter__(self) -> Iterator[Example | Issue]:
        """Every row in order. Raises UserError if the source cannot be read, or no format fits."""
        records = read_dataset(self.path) if is_dataset(self.path) else read_file(self.path)
        for index, record in enumerate(records):
            if record.values is None:
                yield Issue(record, record.problem)
                continue
            if not self.columns:
                self.columns = list(record.values)
                self.format = self._fitting_format(record)
            yield self._read(record, index)

    def _read(self, record: Record, index: int) -> Example | Issue:
        assert self.format is not None
        assert record.values is not None
        try:
            return self.format.read(record.values, index, record.place)
        except RowError as error:
            other = _other_format(self.format, record.values)
            mixed = f"; its columns are those of format {other}, not {self.format.name}" if other else ""
            return Issue(record, f"{error}{mixed}")

    def _fitting_format(self, record: Record) -> Format:
        keys = [str(key) for key in record.values or {}]
        if self.format is not None:
            missing = self.format.missing(keys)
            if missing:
                raise UserError(
                    f"{record.place}: format '{self.format.name}' needs the column {' and '.join(missing)}, "
                    f"but the row has {', '.join(keys) or 'none'}",
                    _rename_hint(keys, missing) or _format_hint(keys),
                )
            return self.format
        fitting = _most_specific([entry for _, entry in FORMATS.items() if entry.sniff(keys)])
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = [entry.name for entry in fitting]
            raise UserError(
                f"{record.place}: the columns {', '.join(keys)} fit the formats {' and '.join(names)}",
                f"say which: path: {self.path}, format: {names[0]}",
            )
        raise UserError(
            f"{record.place}: no data format has the columns {', '.join(keys) or '(none)'}",
            _nearest_hint(keys) or "see: expunge list formats",
        )


def issues_sentence(issues: Sequence[Issue], count: int) -> str:
    """One sentence about the first of `count` issues: the first with its file, the others with their line."""
    told = [str(issues[0])]
    told += [f"{issue.record.unit} {issue.record.number}: {issue.problem}" for issue in issues[1:]]
    more = f"; and {count - len(issues)} more" if count > len(issues) else ""
    return "; ".join(told) + more


def issue_hint(issue: Issue) -> str:
    """What to do about an issue."""
    problem = issue.problem
    path = issue.record.file
    if problem.startswith("broken JSON"):
        return "check quotes, commas and brackets there; JSONL has one whole JSON object on each line"
    if problem.startswith("broken CSV") or " fields, but " in problem:
        return 'fields that hold commas, quotes or line breaks stand in double quotes: "a ""b"", c"'
    if problem.startswith("not UTF-8"):
        return f"convert it: iconv -f LATIN1 -t UTF-8 {path}"
    if "its columns are those of format" in problem:
        return "a file holds rows of one format: split it"
    if problem.startswith("no column"):
        return "rename the column or add it; see: expunge list formats"
    return f"correct or remove such rows; all of them are listed by: expunge data check {path}"


def _most_specific(formats: list[Format]) -> list[Format]:
    most = max((len(entry.columns) for entry in formats), default=0)
    return [entry for entry in formats if len(entry.columns) == most]


def _other_format(format_: Format, values: Mapping[str, Any]) -> str | None:
    if not format_.missing(values):
        return None
    others = _most_specific([entry for _, entry in FORMATS.items() if entry.sniff(values)])
    return others[0].name if others else None


def _format_hint(keys: list[str]) -> str:
    fitting = _most_specific([entry for _, entry in FORMATS.items() if entry.sniff(keys)])
    if fitting:
        return f"these columns are those of format '{fitting[0].name}'"
    return "see: expunge list formats"


def _rename_hint(keys: list[str], missing: list[str]) -> str:
    pairs = [(near[0], name) for name in missing if (near := get_close_matches(name, keys, n=1, cutoff=0.7))]
    return "; ".join(f"did you mean '{name}' by the column '{key}'?" for key, name in pairs)


def _nearest_hint(keys: list[str]) -> str:
    """The format of which the fewest columns are missing, with the near names."""
    best, best_score = "", 0.0
    for name, entry in FORMATS.items():
        missing = entry.missing(keys)
        renames = _rename_hint(keys, missing)
        here = len(entry.columns) - len(missing) + 0.5 * renames.count("did you mean")
        score = here / len(entry.columns)
        if score > best_score:
            best_score = score
            best = f"format '{name}' lacks {' and '.join(missing)}" + (f": {renames}" if renames else "")
    return best
