"""The official numbers of a benchmark beside published ones, and what they cannot see."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.report.document import Column, Section, Table, TableCell, TableRow
from expunge.report.figure_data import HeatMap
from expunge.report.records import RunRecord
from expunge.report.tables import ARROWS, variant_label
from expunge.report.text import human, listed, number, plural

NAME = "aggregates.json"
#: One of several values of a kind: set, task, what is measured.
_PART = re.compile(r"(?P<set>forget|retain)_(?P<task>task\d+)_(?P<what>\w+)")
_SEEN = {
    "lume": [
        "The task aggregate is a harmonic mean of twelve values: it is 0 as soon as one of them is, "
        "and one value of 0.1 among eleven of 1 takes it to 0.57.",
        "Knowledge is exact match of the whole answer: a model that answers right and does not stop scores 0. "
        "Regurgitation is recall over as many as 256 new tokens for about 33 words: rambling raises it, and saying "
        "nothing at all is perfect forgetting.",
        "A model that fell apart gets a good MIA score; only MMLU shows it, and on a 1B model MMLU is near chance.",
        "Nothing in it asks in other words, attacks the model, or looks at single requests.",
    ],
}


@dataclass(frozen=True, slots=True)
class Number:
    """One aggregate of one variant."""

    variant: str
    benchmark: str
    convention: str
    official: bool
    name: str
    value: float | None
    summary: str
    direction: str
    note: str


def read_aggregates(folder: Path) -> list[Number]:
    """The aggregates of a folder; none where there is no such file or it can't be read."""
    path = Path(folder) / NAME
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [_number(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _number(row: Mapping[str, Any]) -> Number:
    value = row.get("value")
    known = isinstance(value, int | float) and not isinstance(value, bool)
    words = {key: str(row.get(key) or "") for key in ("benchmark", "convention", "summary", "direction", "note")}
    return Number(
        variant=str(row["variant"]),
        name=str(row["name"]),
        value=float(value) if known else None,  # type: ignore[arg-type]
        official=row.get("official") is True,
        **words,
    )


def benchmark_sections(record: RunRecord, numbers: Sequence[Number]) -> list[Section]:
    """The official numbers, and what they cannot see; empty where there are no aggregates."""
    if not numbers:
        return []
    first = numbers[0]
    official = any(number.official for number in numbers)
    lead = f"What {first.benchmark} itself makes of these measurements, under the convention {first.convention}. "
    lead += (
        "Rows and texts were counted as its own code counts them."
        if official
        else "Rows and texts were not counted as its own code counts them: these are not the official numbers, and not "
        "to be compared with published tables."
    )
    parts = [number for number in numbers if _PART.fullmatch(number.name)]
    tables = [_main(record, [number for number in numbers if number not in parts])]
    tables += [_main(record, parts, f"The {len({n.name for n in parts})} values behind the mean")] if parts else []
    tables += _published(record, numbers, official)
    title = f"Benchmark {first.benchmark}"
    sections = [Section(title=title, lead=lead, figures=list(_maps(record, numbers)), tables=tables)]
    seen = _SEEN.get(first.benchmark)
    return [*sections, Section(title="What the score cannot see", words=seen)] if seen else sections


def _main(record: RunRecord, numbers: Sequence[Number], title: str = "") -> Table:
    variants = list(dict.fromkeys(n.variant for n in numbers))
    found = {(n.variant, n.name): n for n in numbers}
    columns = [Column(label="Number", number=False)]
    columns += [Column(label=variant_label(record, variant)) for variant in variants]
    rows, notes = [], []
    for name in dict.fromkeys(n.name for n in numbers):
        mine = [found[v, name] for v in variants if (v, name) in found]
        arrow = ARROWS.get(mine[0].direction, "")
        beside = "" if mine[0].official else "not official"
        head = TableCell(text=f"{_words(name)} {arrow}".strip(), under=mine[0].summary, note=beside)
        cells = [TableCell(text=number(found[v, name].value) if (v, name) in found else "–") for v in variants]
        rows.append(TableRow(cells=[head, *cells]))
        notes += _notes(record, name, mine)
    return Table(title=title, columns=columns, rows=rows, notes=notes, folded=bool(title))


def _notes(record: RunRecord, name: str, numbers: Sequence[Number]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for one in numbers:
        if one.note:
            by_note.setdefault(one.note, []).append(variant_label(record, one.variant))
    everyone = len(numbers)
    return [
        f"{_words(name)}{'' if len(whose) == everyone else f' of {listed(whose)}'}: {note.rstrip('.')}."
        for note, whose in by_note.items()
    ]


def _words(name: str) -> str:
    return re.sub(r"\b([Tt]ask)(\d)", r"\1 \2", human(name))


def _maps(record: RunRecord, numbers: Sequence[Number]) -> list[HeatMap]:
    """The values behind a harmonic mean as a map per variant: the palest cell decides."""
    maps = []
    for variant in dict.fromkeys(n.variant for n in numbers):
        parts = {n.name: n.value for n in numbers if n.variant == variant and _PART.fullmatch(n.name)}
        matches = [match for name in parts if (match := _PART.fullmatch(name)) is not None]
        if len(matches) < 4:
            continue
        keys = list(dict.fromkeys((match["task"], match["what"]) for match in matches))
        sets = list(dict.fromkeys(match["set"] for match in matches))
        values = [[parts.get(f"{part}_{task}_{what}") for part in sets] for task, what in keys]
        maps.append(
            HeatMap(
                title=f"{variant_label(record, variant)}: {plural(len(parts), 'value')}, higher is better",
                measure="value",
                good="high",
                row_name="",
                rows=[f"{_words(task)}, {what.replace('_', ' ')}" for task, what in keys],
                column_name="",
                columns=[f"{part}" for part in sets],
                values=values,
            )
        )
    return maps


def _published(record: RunRecord, numbers: Sequence[Number], official: bool) -> list[Table]:
    """Published results of the same benchmark, each source folded, with the numbers of this page on top."""
    from expunge.data.registry import BENCHMARKS

    name = numbers[0].benchmark
    published = BENCHMARKS.get(name).published if name in BENCHMARKS else ()
    tables = []
    for source in dict.fromkeys(entry.source for entry in published):
        entries = [entry for entry in published if entry.source == source]
        names = list(dict.fromkeys(key for entry in entries for key in entry.numbers))
        rows = [_own(record, variant, names, numbers) for variant in dict.fromkeys(n.variant for n in numbers)]
        for entry in entries:
            cells = [TableCell(text=number(entry.numbers.get(key))) for key in names]
            rows.append(TableRow(cells=[TableCell(text=entry.label), *cells]))
        columns = [Column(label="Model or team", number=False), *(Column(label=_words(key)) for key in names)]
        notes = [] if official else ["Not comparable: this page was not counted as the source counts."]
        title = f"Beside published results: {source}"
        tables.append(Table(title=title, columns=columns, rows=rows, notes=notes, folded=True))
    return tables


def _own(record: RunRecord, variant: str, names: Sequence[str], numbers: Sequence[Number]) -> TableRow:
    mine = {n.name: n.value for n in numbers if n.variant == variant}
    cells = [TableCell(text=number(mine.get(key))) for key in names]
    head = TableCell(text=variant_label(record, variant), under="measured here")
    return TableRow(cells=[head, *cells], role=record.kind(variant))
