"""Tables of a report: variants × metrics of each split, with direction, interval, n and unscored rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from expunge.report.document import Column, Table, TableCell, TableRow
from expunge.report.records import MAIN, Measure, RunRecord, mapping
from expunge.report.text import grouped, human, interval, listed, number, plural

ARROWS = {"lower": "↓", "higher": "↑"}
_DIRECTIONS = {"lower": "lower is better", "higher": "higher is better", "none": "no direction: for orientation"}
#: Variants that a page shows; a sweep has a table of its own.
_VARIANTS = 40
_SPLIT_WORDS = {
    "forget": "rows that are to be forgotten",
    "retain": "rows that are to be kept; unlearning trained on them",
    "retain_unseen": "rows that are to be kept; unlearning never saw them",
    "holdout": "rows that no model was trained on",
    "model": "of each model as a whole",
}
#: With more metrics than this, a table shows those of LEADING, and families of the others are folded away.
_COLUMNS = 8
LEADING = (
    MAIN,
    "exact_memorization",
    "probability",
    "rouge_l_recall",
    "truth_ratio",
    "mia_loss",
    "perplexity",
)


@dataclass(frozen=True, slots=True)
class Head:
    """One metric of one split."""

    metric: str
    label: str
    arrow: str
    direction: str
    hint: str
    rows: str  # n and unscored, where they are the same for every variant


@dataclass(frozen=True, slots=True)
class Cell:
    """One measure, as shown."""

    value: str
    interval: str = ""
    shade: str = ""  # best, worst, or nothing
    anchored: str = ""
    flag: str = ""  # a warning
    rows: str = ""  # n and unscored, where they differ from the other variants'


@dataclass(frozen=True, slots=True)
class Row:
    """One variant."""

    variant: str
    kind: str
    label: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class SplitTable:
    """Variants × metrics of one split; `further` holds the metrics that are looked at less, by family."""

    split: str
    label: str
    words: str
    columns: tuple[Head, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # what metrics say of their own numbers
    further: tuple[SplitTable, ...] = ()


def comparison(record: RunRecord) -> list[Table]:
    """The tables of all splits, as a page shows them: each followed by its folded families."""
    found = []
    for table in split_tables(record):
        more = sum(len(part.columns) for part in table.further)
        group = f"{table.label}: {plural(more, 'further metric')}"
        found += [_shown(table), *(_shown(part, group) for part in table.further)]
    return found


def _shown(table: SplitTable, group: str = "") -> Table:
    columns = [Column(label="Model", number=False)]
    for head in table.columns:
        columns.append(Column(label=head.label, hint=head.hint, under=head.rows, arrow=head.arrow))
    rows = []
    for row in table.rows:
        cells = [TableCell(text=row.label, under=row.note)]
        for cell in row.cells:
            under = "\n".join(filter(None, (cell.interval, cell.anchored, cell.rows)))
            cells.append(TableCell(text=cell.value, under=under, note=cell.flag, shade=cell.shade))
        rows.append(TableRow(cells=cells, role=row.kind))
    words, notes = table.words, list(table.notes)
    return Table(title=table.label, words=words, columns=columns, rows=rows, notes=notes, group=group)


def split_tables(record: RunRecord) -> list[SplitTable]:
    """One table per split, in the order forget, retain, unseen retain, holdout, others."""
    return [_split_table(record, split) for split in record.splits]


def variant_label(record: RunRecord, variant: str) -> str:
    """The variant's name for reading."""
    given = mapping(mapping(record.info.get("models")).get(variant)).get("label")
    if given:
        return str(given)
    return variant.capitalize() if record.kind(variant) != "specialist" and variant.islower() else variant


def variant_note(record: RunRecord, variant: str) -> str:
    """What the variant is, in a few words."""
    recipe = record.recipe
    kind = record.kind(variant)
    if variant == "merged" and recipe and recipe.merge:
        names = recipe.merge.models or [entry.name for entry in recipe.unlearn]
        return f"{recipe.merge.method} of {listed(names)}"
    if recipe:
        entry = next((entry for entry in recipe.unlearn if entry.name == variant), None)
        if entry is not None:
            return entry.method + (", LoRA" if entry.lora else "")
    if kind == "target":
        return "was taught the forget rows" if recipe and recipe.prepare else "the model as given"
    return {"original": "before anything", "reference": "never saw the forget rows"}.get(variant, "")


def shown_variants(record: RunRecord) -> list[str]:
    """The measured variants; of very many, those that play a part and the first others."""
    names = record.variants
    parts = [name for name in names if record.kind(name) not in ("specialist", "other")]
    rest = [name for name in names if name not in parts][: _VARIANTS - len(parts)]
    return [name for name in names if name in parts or name in rest]


def _split_table(record: RunRecord, split: str) -> SplitTable:
    found = {(m.variant, m.metric): m for m in record.measures if m.split == split}
    metrics = [name for name in record.metrics if any(metric == name for _, metric in found)]
    first = leading(metrics)
    words = _SPLIT_WORDS.get(split, f"evaluated only; role {record.role(split)}")
    if split == "retain" and record.holds_out:
        words += ", but for those held out for keep"
    label = "Weights" if split == "model" else human(split)
    rest = [name for name in metrics if name not in first]
    further = tuple(_part(record, split, found, names, title, "") for title, names in families(rest).items())
    return replace(_part(record, split, found, first, label, words), further=further)


def leading(metrics: Sequence[str]) -> list[str]:
    """The metrics that are seen at once: all of a few, of many those of LEADING (or the first of them all)."""
    if len(metrics) <= _COLUMNS:
        return list(metrics)
    return [name for name in LEADING if name in metrics] or list(metrics[:_COLUMNS])


def families(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Family → metrics: those whose names begin alike; what stands alone comes last, together."""
    alike: dict[str, list[str]] = {}
    for name in metrics:
        alike.setdefault(name.partition("_")[0], []).append(name)
    found = {human(_common(names)): names for names in alike.values() if len(names) > 1}
    alone = [names[0] for names in alike.values() if len(names) == 1]
    found |= {"Others" if found else "Further metrics": alone} if alone else {}
    return found


def _common(names: Sequence[str]) -> str:
    """The words that all names begin with."""
    columns = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*(n.split("_") for n in names), strict=False))
    return "_".join(words[0] for words in columns)


def _part(
    record: RunRecord,
    split: str,
    found: Mapping[tuple[str, str], Measure],
    metrics: Sequence[str],
    label: str,
    words: str,
) -> SplitTable:
    """The variants that have any of these metrics."""
    variants = [name for name in shown_variants(record) if any((name, metric) in found for metric in metrics)]
    columns, shades, same = [], {}, {}
    for metric in metrics:
        measures = [found[v, metric] for v in variants if (v, metric) in found]
        counts = {(m.n, m.unscored) for m in measures}
        same[metric] = len(counts) == 1
        columns.append(_column(record, metric, measures[0], _rows(measures[0]) if same[metric] else ""))
        shades[metric] = _shades(record, measures)
    rows = []
    for variant in variants:
        cells = [_cell(record, found.get((variant, metric)), shades[metric], same[metric]) for metric in metrics]
        name, note = variant_label(record, variant), variant_note(record, variant)
        rows.append(Row(variant, record.kind(variant), name, note, tuple(cells)))
    notes = tuple(_notes(record, [found[v, m] for m in metrics for v in variants if (v, m) in found]))
    return SplitTable(split, label, words, tuple(columns), tuple(rows), notes)


def _notes(record: RunRecord, measures: Sequence[Measure]) -> Iterator[str]:
    """What metrics say of their own numbers; the same words of several models or metrics once."""
    said: dict[str, dict[str, list[str]]] = {}
    for m in measures:
        for note in filter(None, m.note.split("; ")):
            said.setdefault(note, {}).setdefault(m.metric, []).append(variant_label(record, m.variant))
    for note, by_metric in said.items():
        variants = {name for names in by_metric.values() for name in names}
        everyone = len(variants) == len({m.variant for m in measures})
        whose = "" if everyone else f" of {listed(sorted(variants))}"
        yield f"{listed(human(metric) for metric in by_metric)}{whose}: {note}."


def _column(record: RunRecord, metric: str, measure: Measure, rows: str) -> Head:
    # what the registry says of a metric comes with the run: the report knows no metric by name but the main one
    said = mapping(mapping(record.info.get("metrics")).get(metric))
    summary = str(said.get("summary") or said.get("description") or "")
    direction = measure.direction if measure.direction in _DIRECTIONS else "none"
    words = _DIRECTIONS[direction]
    hint = f"{summary.rstrip('.')} ({words})" if summary else words
    return Head(metric, human(metric), ARROWS.get(direction, ""), direction, hint, rows)


def _rows(measure: Measure) -> str:
    unscored = f", {grouped(measure.unscored)} unscored" if measure.unscored else ""
    return f"n {grouped(measure.n)}{unscored}"


def _cell(record: RunRecord, measure: Measure | None, shades: dict[str, str], same: bool) -> Cell:
    if measure is None:
        return Cell("–")
    shown = interval(measure.ci_low, measure.ci_high)
    anchored = "" if measure.variant in (record.target, record.reference) else _anchored(measure)
    flag = "over-unlearned" if measure.over_unlearned else ""
    rows = "" if same else _rows(measure)
    return Cell(number(measure.value), shown, shades.get(measure.variant, ""), anchored, flag, rows)


def _anchored(measure: Measure) -> str:
    """`a 0.12`: where a model stands between reference (0) and target (1)."""
    return "" if measure.anchored is None else f"a {number(measure.anchored)}"


def _shades(record: RunRecord, measures: Sequence[Measure]) -> dict[str, str]:
    """Best and worst among the models that know or knew the rows, where there are at least three; no yardsticks."""
    judged = [m for m in measures if record.kind(m.variant) not in ("original", "reference") and m.value is not None]
    values = [m.value for m in judged if m.value is not None]
    if len(values) < 3 or min(values) == max(values) or judged[0].direction not in ARROWS:
        return {}
    best, worst = (min, max) if judged[0].direction == "lower" else (max, min)
    return {
        m.variant: "best" if m.value == best(values) else "worst"
        for m in judged
        if m.value in (best(values), worst(values))
    }


def main_columns(record: RunRecord) -> list[tuple[str, str]]:
    """(split, metric) pairs for where room is short: the main metric on every split, ROUGE on the forget rows."""
    pairs = [(split, MAIN) for split in record.splits]
    spoken = next((name for name in ("rouge_l_recall", "rouge_l_f1") if name in record.metrics), None)
    if spoken and "forget" in record.splits:
        pairs.insert(1, ("forget", spoken))
    taken = {(m.split, m.metric) for m in record.measures}
    return [pair for pair in pairs if pair in taken]


def metric_glossary(record: RunRecord) -> list[tuple[str, str]]:
    """(metric, what it is) for the metrics whose description came with the run."""
    said = mapping(record.info.get("metrics"))
    pairs = [(human(name), str(mapping(said.get(name)).get("summary") or "")) for name in record.metrics]
    return [pair for pair in pairs if pair[1]]


def row_counts(record: RunRecord) -> str:
    """`30 forget, 60 retain` in one line."""
    data = mapping(record.info.get("data"))
    counted = [(name, mapping(part).get("rows")) for name, part in data.items()]
    return ", ".join(f"{grouped(rows)} {human(name).lower()}" for name, rows in counted if isinstance(rows, int))
