"""A file of rows, examined as a whole: everything that is wrong with it, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.data.alternatives import COLUMNS, usable_columns
from expunge.data.containers import container_of
from expunge.data.example import Example
from expunge.data.hub import is_dataset
from expunge.data.load import content
from expunge.data.registry import RowError
from expunge.data.rows import Issue, Rows, issue_hint
from expunge.data.spans import ENTITIES, entity_spans
from expunge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of one part of the rows."""

    unit: str  # "characters" or "tokens"
    least: int
    median: float
    p95: float
    most: int


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. `errors` holds the first 20 of `bad_rows`, each with its place."""

    path: str
    format: str | None
    columns: list[str]
    rows: int  # usable and not
    good_rows: int
    bad_rows: int
    empty: int  # rows of which a needed cell is blank or null
    duplicates: int  # rows whose prompt and answer stand in an earlier row
    duplicate_places: list[str]  # "file:9 repeats file:2"
    tasks: dict[str, int]
    lengths: dict[str, Lengths]  # prompt, answer, and (with a tokenizer) prompt_tokens, answer_tokens
    errors: list[str]
    hint: str
    examples: list[Example] = field(default_factory=list)
    entities: int | None = None  # rows whose column `entities` can be used; None without such a column
    alternatives: dict[str, int] = field(default_factory=dict)  # rows with another answer, by column

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "ok": self.ok}


def check(
    path: str,
    format: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: int = 3,
) -> CheckReport:
    """Examine a file or dataset without stopping at the first problem.

    Raises UserError only where there is nothing to examine: no such file, or no such format.
    """
    rows = Rows(path, format)
    if not is_dataset(path) and not Path(path).is_file():
        container_of(path)
    good: list[Example] = []
    errors: list[str] = []
    hint, bad, empty = "", 0, 0
    try:
        for entry in rows:
            if isinstance(entry, Issue):
                bad += 1
                empty += entry.problem.startswith("empty ") or entry.problem.endswith(" is null")
                hint = hint or issue_hint(entry)
                if len(errors) < _SHOWN:
                    errors.append(str(entry))
            else:
                good.append(entry)
    except UserError as error:
        errors.append(error.message)
        hint = error.hint
    if not good and not errors:
        errors, hint = [f"{path} has no rows"], "see the row of each format in: expunge list formats"
    repeats = _repeats(good)
    return CheckReport(
        path=path,
        format=rows.format.name if rows.format else None,
        columns=rows.columns,
        rows=len(good) + bad,
        good_rows=len(good),
        bad_rows=bad,
        empty=empty,
        duplicates=len(repeats),
        duplicate_places=[f"{second.source} repeats {first.source}" for first, second in repeats[:_SHOWN]],
        tasks=_tasks(good),
        lengths=_lengths(good, tokenizer),
        errors=errors,
        hint=hint,
        examples=good[:examples],
        entities=sum(map(_has_entities, good)) if any(ENTITIES in example.extra for example in good) else None,
        alternatives=_alternatives(good),
    )


def _repeats(examples: Sequence[Example]) -> list[tuple[Example, Example]]:
    first: dict[tuple[str, ...], Example] = {}
    repeats = []
    for example in examples:
        earlier = first.setdefault(content(example), example)
        if earlier is not example:
            repeats.append((earlier, example))
    return repeats


def _has_entities(example: Example) -> bool:
    try:
        return bool(entity_spans(example))
    except RowError:
        return False


def _alternatives(examples: Sequence[Example]) -> dict[str, int]:
    present = [column for column in COLUMNS if any(column in example.extra for example in examples)]
    counts = Counter(column for example in examples for column in usable_columns(example))
    return {column: counts[column] for column in present}


def _tasks(examples: Sequence[Example]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in examples:
        if example.task:
            counts[example.task] = counts.get(example.task, 0) + 1
    return counts


def _lengths(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Lengths]:
    if not examples:
        return {}
    parts = {"prompt": [example.prompt for example in examples], "answer": [example.answer for example in examples]}
    lengths = {name: _summary("characters", [len(text) for text in texts]) for name, texts in parts.items()}
    if tokenizer is not None:
        for name, texts in parts.items():
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            lengths[f"{name}_tokens"] = _summary("tokens", [len(row) for row in ids])
    return lengths


def _summary(unit: str, lengths: list[int]) -> Lengths:
    median, p95 = np.percentile(lengths, [50, 95])
    return Lengths(unit, min(lengths), float(median), float(p95), max(lengths))
