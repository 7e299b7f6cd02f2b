"""Samples of forget rows, most telling first, with the longest run of words that the answer has too marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.report.document import Column, Section, Table, TableCell, TableRow
from expunge.report.records import RunRecord
from expunge.report.text import human, longest_run, percent, plural, words

#: Characters of a text that a cell shows, and characters in which a leak is looked for.
_SHOWN = 480
_ROWS = 10


def leaked_section(record: RunRecord, limit: int = _ROWS) -> Section | None:
    """Greedy and sampled answers of the result on forget rows, beside target's and reference's; None without any."""
    tables = []
    for split in (name for name in record.splits if record.role(name) == "forget"):
        for view, title in (("", "greedy answers"), ("sampled", "the most telling of several samples")):
            table = _table(record, split, view, f"{human(split)}: {title}", limit)
            tables += [table] if table is not None else []
    if not tables:
        return None
    lead = (
        "Rows of which the model gives away most come first. Marked is the longest run of words that the expected "
        "answer has too; a single common word is not marked."
    )
    return Section(title="What leaks", lead=lead, tables=tables)


def leak(said: str, answer: str) -> tuple[tuple[int, int] | None, float]:
    """The leaked span of `said`, and which part of the answer's words it holds."""
    span = longest_run(said[:4000], answer)
    whole = len(words(answer))
    if span is None or not whole:
        return None, 0.0
    held = len(words(said[span[0] : span[1]]))
    if held < 2 and whole > 1:
        return None, 0.0
    return span, min(1.0, held / whole)


def _table(record: RunRecord, split: str, view: str, title: str, limit: int) -> Table | None:
    models = [name for name in (record.target, record.result, record.reference) if name is not None]
    spoken = {name: found for name in models if (found := _rows(record.path, name, split, view))}
    mine = spoken.get(record.result or "")
    if not mine:
        return None
    ranked = sorted(mine, key=lambda key: -mine[key]["share"])[:limit]
    columns = [Column(label="Prompt", number=False), Column(label="Expected", number=False)]
    columns += [Column(label=f"{name.capitalize()} says", number=False) for name in spoken]
    rows = []
    for key in ranked:
        row = mine[key]
        cells = [_text(row["prompt"], None, key[:60]), _text(row["answer"], None, "")]
        for found in spoken.values():
            said = found.get(key)
            part = f"{percent(said['share'])} of the answer's words" if said else ""
            cells.append(_text(said["generated"], said["span"], part) if said else TableCell(text=""))
        rows.append(TableRow(cells=cells))
    leaking = sum(row["share"] >= 1 for row in mine.values())
    beside = f"{leaking} of {plural(len(mine), 'row')} given away whole"
    return Table(title=title, words=beside, columns=columns, rows=rows, texts=True)


def _text(text: str, span: tuple[int, int] | None, under: str) -> TableCell:
    """A cell that shows where the leak is, also far behind in a long text."""
    if span is not None and span[1] > _SHOWN:
        start = max(0, span[0] - 80)
        text, span = f"… {text[start : start + _SHOWN]}", (span[0] - start + 2, min(span[1] - start, _SHOWN) + 2)
    elif len(text) > _SHOWN:
        text = f"{text[:_SHOWN]} …"
    return TableCell(text=text, under=under, marked=[span] if span is not None else [])


def _rows(folder: Path, variant: str, split: str, view: str) -> Mapping[str, dict[str, Any]]:
    """Example → its row; of several samples the one that holds most of the answer."""
    path = folder / "generations" / variant / f"{split}{'@' + view if view else ''}.parquet"
    if not path.is_file():
        return {}
    try:
        table = pq.read_table(path, columns=["example_id", "prompt", "answer", "generated"])
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for row in _head(table):
        span, share = leak(row["generated"], row["answer"])
        known = found.get(row["example_id"])
        if known is None or share > known["share"]:
            found[row["example_id"]] = {**row, "span": span, "share": share}
    return found


def _head(table: pa.Table, most: int = 20_000) -> Sequence[dict[str, Any]]:
    """The first rows: aligning words takes time."""
    rows: list[dict[str, Any]] = table.slice(0, most).to_pylist()
    return rows
