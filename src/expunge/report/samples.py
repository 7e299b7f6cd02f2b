"""Side-by-side samples, worst first: forget rows that still leak, retain rows that lost most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from expunge.report.records import RunRecord
from expunge.report.text import grouped, human, marked, number, plain, plural

#: Measures that break ties in the order, where they were taken.
_SECOND = ("rouge_l_recall", "rouge_l_f1", "probability")

#: Rows that are shown of a retain split that lost nothing.
_UNHARMED = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: what was asked, what was expected, and what each model says, as marked HTML."""

    id: str
    prompt: Markup
    expected: Markup
    says: tuple[Markup, ...]  # in the order of SampleTable.models; empty markup where a model said nothing
    scores: tuple[str, ...]  # extraction strengths of the same models


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The worst rows of one split."""

    split: str
    label: str
    order: str
    models: tuple[tuple[str, str], ...]  # (variant, part it plays)
    rows: tuple[Sample, ...]


def sample_tables(record: RunRecord, limit: int) -> list[SampleTable]:
    """Worst rows of the forget and retain splits, at most `limit` of the first and fewer of the others."""
    tables = []
    for split in record.splits:
        role = record.role(split)
        if role in ("forget", "retain"):
            count = limit if role == "forget" else -(-limit // 2)
            table = _table(record, split, role, count)
            if table is not None:
                tables.append(table)
    return tables


def _table(record: RunRecord, split: str, role: str, limit: int) -> SampleTable | None:
    available = record.generated_ids(record.result, split)
    if not available or limit < 1:
        return None
    found, order = worst_first(record, split, role, available)
    ids = found[:limit]
    models = _models(record, split)
    spoken = {variant: record.generations(variant, split, ids) for variant, _ in models}
    scores = {variant: record.values(variant, split) for variant, _ in models}
    rows = [_sample(name, spoken, scores) for name in ids]
    more = f"; {plural(rest, 'further row')} not shown" if (rest := len(found) - limit) > 0 else ""
    return SampleTable(split, human(split), order + more, tuple(models), tuple(rows))


def _models(record: RunRecord, split: str) -> list[tuple[str, str]]:
    parts = ((record.target, "target"), (record.result, "result"), (record.reference, "reference"))
    return [(name, part) for name, part in parts if name is not None and record.generated_ids(name, split)]


def worst_first(record: RunRecord, split: str, role: str, ids: list[str]) -> tuple[list[str], str]:
    """`ids` by what the result leaks (forget) or has lost against the target (retain), and that order in words."""
    result, target = record.values(record.result, split), record.values(record.target, split)
    if not result or (role != "forget" and not target):
        return ids, "in the order of the file: there are no values per row to sort by"
    metric = next((name for name in _SECOND if name in record.metrics), "")
    second, second_before = {}, {}
    if metric:
        second, second_before = record.values(record.result, split, metric), record.values(record.target, split, metric)

    def leak(name: str) -> tuple[float, float]:
        return -result.get(name, -1.0), -second.get(name, 0.0)

    def loss(name: str) -> tuple[float, float]:
        lost = target.get(name, 0.0) - result[name] if name in result else -1.0
        return -lost, -(second_before.get(name, 0.0) - second.get(name, 0.0))

    ordered = sorted(ids, key=leak if role == "forget" else loss)  # stable: rows that tie keep the file's order
    if role == "forget":
        return ordered, "rows that still give away most come first"
    lost = [name for name in ordered if loss(name)[0] < 0]
    if not lost:
        return ordered[:_UNHARMED], f"none of {plural(len(ids), 'row')} lost extraction strength"
    words = "; those that lost most come first" if len(lost) > 1 else ""
    return lost, f"{grouped(len(lost))} of {plural(len(ids), 'row')} lost extraction strength{words}"


def _sample(
    name: str, spoken: Mapping[str, Mapping[str, Mapping[str, str]]], scores: Mapping[str, Mapping[str, float]]
) -> Sample:
    row = next(rows[name] for rows in spoken.values() if name in rows)
    says = []
    for rows in spoken.values():
        text = rows[name]["generated"] if name in rows else ""
        says.append(marked(text, row["answer"]) if text.strip() else Markup('<span class="empty">nothing</span>'))
    values = tuple(number(found.get(name)) if found else "" for found in scores.values())
    return Sample(name, plain(row["prompt"]), plain(row["answer"]), tuple(says), values)
