"""The merges of `zjuklab` as tables: methods by density and scale over seeds, yardsticks, what was published."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from expunge.report.document import Column, Section, Table, TableCell, TableRow
from expunge.report.text import compact, human, listed, number, plural
from expunge.studies.trends_page import deviating
from expunge.studies.zjuklab_claims import FACTOR, JUDGED, UNMATCHED, best_searched, judged, mean_of
from expunge.studies.zjuklab_record import OVER, UNDER, Found, Merged, Scores
from expunge.studies.zjuklab_sections import NAMES

#: Label, name of the score, better direction.
SHOWN = (
    ("Forget ES", "forget_es", "↓"),
    ("Retain ES", "retain_es", "↑"),
    ("Task aggregate", "task_aggregate", "↑"),
    ("MIA score", "mia_score", "↑"),
    ("General", "general", "↑"),
    ("Final", "final", "↑"),
)
_ACRONYMS = ("dare", "ties", "sce", "uwc", "della")

#: The paper's Tables 1 and 2 (OLMo-7B): final, task aggregate, MIA score, MMLU.
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "Over-forgetter, local": (0.481, 0.968, 0.045, 0.431),
    "Under-forgetter, local": (0.504, 0.659, 0.364, 0.491),
    "TIES of the two, local": (0.806, 0.939, 0.997, 0.480),
    "The same, online (submitted)": (0.487, 0.944, 0.048, 0.471),
    "Merged by linear, local": (0.244, None, None, None),
    "Merged by DARE-linear, local": (0.440, None, None, None),
    "Merged by magnitude pruning, local": (0.558, None, None, None),
    "Merged by DARE-TIES, local": (0.561, None, None, None),
}
_KINDS = {
    (False, True): ("Weights merged, at the norm of the specialists", "methods differ in direction alone"),
    (False, False): ("Weights merged, at each method's own scale", ""),
    (True, False): ("LoRA's A and B merged apart, at each method's own scale", "as published"),
    (True, True): ("LoRA's A and B merged apart, at the norm of the specialists", ""),
}


def merges(found: Found) -> Section:
    """Yardsticks, the merges of each kind, and what was published."""
    title = "Merges"
    tables = [_yardsticks(found)]
    for (factor, matched), (name, words) in _KINDS.items():
        rows = [
            merge
            for merge in found.merges
            if not merge.searched and (merge.scope == FACTOR, merge.scale_match != UNMATCHED) == (factor, matched)
        ]
        if rows:
            tables.append(_methods(found, rows, name, words, folded=factor and matched))
    tables.append(_published())
    lead = (
        f"Mean ± standard deviation over {plural(found.seeds, 'seed')}. Norm: of the merged difference from the "
        "target, as a multiple of the mean norm of the two specialists' own. ES: extraction strength. General: "
        "accuracy on general knowledge, which stands in MMLU's place. Final: mean of task aggregate, MIA score and "
        "general."
    )
    return Section(title=title, lead=lead, tables=tables, words=in_words(found))


def called(method: str) -> str:
    """A merge method's name as papers write it: DARE-TIES, linear."""
    parts = method.split("_")
    if all(part in (*_ACRONYMS, "linear") for part in parts):
        return "-".join(part.upper() if part in _ACRONYMS else part for part in parts)
    return method.replace("_", " ")


def grouped(found: Sequence[Merged]) -> list[list[Merged]]:
    """The seeds of each setting together: by method, density, scope and match, in the order in which they come."""
    groups: dict[tuple[str, float, str, str], list[Merged]] = {}
    for merge in found:
        groups.setdefault((merge.method, merge.density, merge.scope, merge.scale_match), []).append(merge)
    return list(groups.values())


def relative_norm(merge: Merged) -> float:
    """The merged difference's norm as a multiple of the specialists' mean norm."""
    return merge.norm / merge.mean_norm if merge.mean_norm > 0 else math.nan


def cells_of(scores: Sequence[Scores]) -> list[TableCell]:
    """Mean and deviation of every shown score."""
    return [deviating(mean_of([one[name] for one in scores])) for _, name, _ in SHOWN]


def _columns() -> list[Column]:
    columns = [Column(label="Merge", number=False), Column(label="Density")]
    columns.append(Column(label="Norm", hint="of the merged difference over the mean of the specialists' own"))
    return columns + [Column(label=label, arrow=arrow) for label, _, arrow in SHOWN]


def _methods(found: Found, rows: Sequence[Merged], name: str, words: str, folded: bool) -> Table:
    key, lines = judged(found), []
    settings = sorted(grouped(rows), key=lambda group: (group[0].method, group[0].density))
    values = [mean_of([merge.scores[key] for merge in group])[0] for group in settings]
    best = max((value for value in values if not math.isnan(value)), default=None)
    place = 3 + [measure for _, measure, _ in SHOWN].index(key)
    for group, value in zip(settings, values, strict=True):
        first = group[0]
        said = [] if len(group) == found.seeds else [f"{len(group)} of {found.seeds} seeds"]
        said += ["submitted by ZJUKLAB"] if first.settings.get("published") else []
        cells = [TableCell(text=called(first.method), under=", ".join(said)), TableCell(text=compact(first.density))]
        cells.append(deviating(mean_of([relative_norm(merge) for merge in group])))
        cells += cells_of([merge.scores for merge in group])
        if value == best:
            cells[place] = cells[place].model_copy(update={"shade": "best"})
        lines.append(TableRow(cells=cells))
    return Table(title=name, words=words, columns=_columns(), rows=lines, folded=folded)


def _yardsticks(found: Found) -> Table:
    rows = []
    for name in (OVER, UNDER):
        scores = [one.scores for one in found.specialists if one.name == name]
        if scores:
            rows.append(_row(human(NAMES[name]), "specialist", scores))
    searched = list(best_searched(found).values())
    if searched:
        density = mean_of([merge.density for merge in searched])
        norm = deviating(mean_of([relative_norm(merge) for merge in searched]))
        names = listed(dict.fromkeys(called(merge.method) for merge in searched))
        row = _row("Searched merge", "result", [merge.scores for merge in searched], under=names)
        cells = [row.cells[0], deviating(density), norm, *row.cells[3:]]
        rows.append(row.model_copy(update={"cells": cells}))
    rows.append(_row("Target", "target", [found.target]))
    return Table(title="Specialists, searched merge and target", columns=_columns(), rows=rows)


def _row(name: str, role: str, scores: Sequence[Scores], under: str = "") -> TableRow:
    empty = [TableCell(text="–"), TableCell(text="–")]
    return TableRow(cells=[TableCell(text=name, under=under), *empty, *cells_of(scores)], role=role)


def _published() -> Table:
    labels = ("Final", "Task aggregate", "MIA score", "MMLU")
    columns = [Column(label="As published, OLMo-7B on LUME", number=False), *(Column(label=label) for label in labels)]
    rows = [
        TableRow(cells=[TableCell(text=name), *(TableCell(text=number(value)) for value in values)])
        for name, values in PUBLISHED.items()
    ]
    notes = [
        "The published comparison of methods is confounded by scale: at weights of 1, PEFT's linear, DARE-linear and "
        "magnitude pruning add up A and add up B, so that the product is up to four times the mean change, while TIES "
        "and DARE-TIES divide by the number of models that agree. One seed; the local and the online MIA differ by "
        "0.949 for the same system.",
    ]
    return Table(title="Published numbers", words="arXiv:2503.21088", columns=columns, rows=rows, notes=notes)


def in_words(found: Found) -> list[str]:
    """What scale does, and what merging the factors apart does, in numbers of this run."""
    said = []
    for factor, words in ((True, "LoRA's factors are merged"), (False, "the weights are merged")):
        own = [
            m for m in found.merges if not m.searched and m.scale_match == UNMATCHED and (m.scope == FACTOR) == factor
        ]
        norms = _by_method(own, relative_norm)
        finals = _by_method(own, lambda merge: merge.scores[judged(found)])
        if len(norms) > 1:
            parts = [f"{called(name)} {number(norms[name])} ({number(finals.get(name))})" for name in norms]
            said.append(
                f"When {words} at weights of 1, the merged change is this many times as long as the specialists' own, "
                f"over all densities (in brackets the {JUDGED[judged(found)]}): {listed(parts)}."
            )
    return said


def _by_method(found: Sequence[Merged], read: Callable[[Merged], float]) -> dict[str, float]:
    """Method → mean over its densities and seeds, where there is any."""
    names = dict.fromkeys(merge.method for merge in found)
    means = {name: mean_of([read(merge) for merge in found if merge.method == name])[0] for name in names}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
