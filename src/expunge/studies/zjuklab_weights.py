"""The weight perspective of `zjuklab` as a section: angles of the phases, and the task vectors module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from expunge.report.document import Column, Section, Table, TableCell, TableRow
from expunge.report.figure_data import AnyFigure, Curves, Heat, Line
from expunge.report.text import number, plural
from expunge.studies.trends_page import deviating
from expunge.studies.zjuklab_claims import mean_of
from expunge.studies.zjuklab_record import OVER, UNDER, Found, Group
from expunge.studies.zjuklab_sections import NAMES

#: The paper's angles between the first phase and the later or the whole change, in degrees (its Figure 4).
PUBLISHED_ANGLES = "about 70–85"
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What two vectors without relation give when the largest fifth of each is compared: 0.04 / (0.4 − 0.04).
_CHANCE_OVERLAP = 0.2**2 / (2 * 0.2 - 0.2**2)


def weights(found: Found) -> Section:
    """Angles between the phases, and the specialists' task vectors layer by layer and module by module."""
    title = "Weight perspective"
    if not found.turns and not found.groups:
        return Section(title=title, words=["The weights of the specialists were not compared."])
    words = _in_words(found)
    figures = [*_maps(found.groups), *_profiles(found.groups)] if found.groups else []
    tables = [_angles(found)] if found.turns else []
    if found.groups:
        tables.append(_modules(found.groups))
    lead = (
        "How the weights move, and where the two specialists' changes from the target (task vectors) agree. Overlap: "
        "of the largest fifth of the elements of each task vector, those in both over those in either. Conflict: of "
        "the elements that both change, the share that they change in opposite directions. Blue is "
        "agreement, orange the opposite."
    )
    return Section(title=title, lead=lead, figures=figures, tables=tables, words=words)


def _angles(found: Found) -> Table:
    hints = {
        "First ↔ later": "between the change up to the inflection and the change after it",
        "First ↔ whole": "between the change up to the inflection and the whole change",
        "Later ↔ whole": "between the change after the inflection and the whole change",
    }
    columns = [Column(label="Training", number=False), Column(label="Inflection", hint="step that parts the phases")]
    columns += [
        Column(label="Steps"),
        *(Column(label=label, hint=hint, under="degrees") for label, hint in hints.items()),
    ]
    rows = []
    for turn in found.turns:
        cells = [TableCell(text=NAMES.get(turn.specialist, turn.specialist))]
        cells += [TableCell(text=str(turn.inflection)), TableCell(text=str(turn.last))]
        for name in ("first_later", "first_whole", "later_whole"):
            factor = turn.factors.get(name)
            under = "" if factor is None else f"A and B: {number(factor, 100)}"
            cells.append(TableCell(text=number(getattr(turn, name), 100), under=under))
        rows.append(TableRow(cells=cells, role="specialist"))
    paper = ["Paper, on 7B", "165", "–", PUBLISHED_ANGLES, PUBLISHED_ANGLES, "–"]
    rows.append(TableRow(cells=[TableCell(text=text) for text in paper]))
    notes = [
        "Large numbers: ΔW, the change of the weights themselves; below them LoRA's A and B flattened. The paper does "
        "not say which of the two it flattened.",
        "Two changes without relation are at 90° in a space of so many weights: a right angle says that the later "
        "phase does not go on as the first began, not that it undoes it (that would be above 90°).",
    ]
    return Table(title="Angles between the phases of training", columns=columns, rows=rows, notes=notes)


def _maps(groups: Sequence[Group]) -> list[AnyFigure]:
    def conflict_kept(group: Group) -> float:
        return group.conflict_kept

    made: list[AnyFigure] = [
        _map(groups, "Cosine of the task vectors", "cosine", lambda group: group.cosine, -1, 1, 0),
        _map(groups, "Overlap of the largest fifth", "overlap", lambda group: group.overlap, 0, _tenth(groups)),
        _map(groups, "Sign conflict, all elements", "conflict", lambda group: group.conflict, 0, 1, 0.5, turned=True),
    ]
    if any(not math.isnan(group.conflict_kept) for group in groups):
        made.append(
            _map(groups, "Sign conflict, largest fifth of both", "conflict", conflict_kept, 0, 1, 0.5, turned=True)
        )
    return made


def _map(
    groups: Sequence[Group],
    title: str,
    measure: str,
    read: Callable[[Group], float],
    low: float,
    high: float,
    middle: float | None = None,
    turned: bool = False,
) -> Heat:
    modules = _ordered(groups)
    layers = sorted({group.layer for group in groups})
    cells = {(group.module, group.layer): read(group) for group in groups}
    values = [[_known(cells.get((module, layer))) for layer in layers] for module in modules]
    return Heat(
        title=title,
        measure=measure,
        row_name="module",
        rows=modules,
        column_name="decoder layer",
        columns=["–" if layer < 0 else str(layer) for layer in layers],
        values=values,
        low=low,
        high=high,
        middle=middle,
        turned=turned,
        words=["–: what belongs to no layer."] if layers[0] < 0 else [],
    )


def _tenth(groups: Sequence[Group]) -> float:
    """The largest overlap, rounded up to a tenth."""
    return (
        max(1, math.ceil(10 * max((group.overlap for group in groups if group.overlap > 0), default=1.0) - 1e-9)) / 10
    )


def _ordered(groups: Sequence[Group]) -> list[str]:
    present = list(dict.fromkeys(group.module for group in groups))
    return [*(name for name in _MODULES if name in present), *sorted(name for name in present if name not in _MODULES)]


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _profiles(groups: Sequence[Group]) -> list[AnyFigure]:
    """Norm of each task vector and its mean effective rank, layer by layer."""
    layers = sorted({group.layer for group in groups if group.layer >= 0})
    if not layers:
        return []

    def lines(read: Callable[[Sequence[Group], int], float]) -> list[Line]:
        made = []
        for which, name in enumerate((OVER, UNDER)):
            values = [_known(read([group for group in groups if group.layer == layer], which)) for layer in layers]
            made.append(Line(name=NAMES[name], role="specialist", x=[float(layer) for layer in layers], y=values))
        return made

    norms = lines(lambda inside, which: math.sqrt(sum(group.norms[which] ** 2 for group in inside)))
    ranks = lines(lambda inside, which: mean_of([group.rank[which] for group in inside])[0])
    return [
        Curves(
            title="Norm of the task vectors",
            x_name="decoder layer",
            y_name="‖Δ‖",
            y_range=_from_zero(norms),
            lines=norms,
        ),
        Curves(
            title="Effective rank, mean over modules",
            x_name="decoder layer",
            y_name="effective rank",
            y_range=_from_zero(ranks),
            lines=ranks,
        ),
    ]


def _from_zero(lines: Sequence[Line]) -> tuple[float, float]:
    return 0.0, 1.08 * max((value for line in lines for value in line.y if value), default=1.0)


def _modules(groups: Sequence[Group]) -> Table:
    columns = [Column(label="Module", number=False), Column(label="‖Δ‖ over"), Column(label="‖Δ‖ under")]
    columns += [Column(label="Cosine"), Column(label="Overlap"), Column(label="Conflict", under="all elements")]
    columns += [Column(label="Conflict", under="largest fifth of both")]
    columns += [Column(label="Rank over", hint="effective rank"), Column(label="Rank under", hint="effective rank")]
    reads: list[Callable[[Group], float]] = [
        lambda group: group.norms[0],
        lambda group: group.norms[1],
        lambda group: group.cosine,
        lambda group: group.overlap,
        lambda group: group.conflict,
        lambda group: group.conflict_kept,
        lambda group: group.rank[0],
        lambda group: group.rank[1],
    ]
    rows = []
    for module in _ordered(groups):
        own = [group for group in groups if group.module == module]
        rows.append(
            TableRow(
                cells=[TableCell(text=module), *(deviating(mean_of([read(one) for one in own])) for read in reads)]
            )
        )
    title = "Module by module, mean ± standard deviation over layers"
    return Table(title=title, columns=columns, rows=rows, folded=len(rows) > 12)


def _in_words(found: Found) -> list[str]:
    groups = [group for group in found.groups if group.layer >= 0] or list(found.groups)
    return [*_turned(found), *(_agreement(groups) if groups else [])]


def _turned(found: Found) -> list[str]:
    said = []
    for turn in found.turns:
        lean = turn.first_later - 90
        if math.isnan(lean):
            continue
        meaning = "partly on in the same direction"
        if lean > -5:
            meaning = "about at right angles to it" if lean < 5 else f"turned back by {number(lean, 100)}°"
        said.append(
            f"The {NAMES.get(turn.specialist, turn.specialist)} moves, after step {turn.inflection}, at "
            f"{number(turn.first_later, 100)}° to its first change: {meaning}. The first change lies at "
            f"{number(turn.first_whole, 100)}° to the whole one, the later change at "
            f"{number(turn.later_whole, 100)}°."
        )
    return said


def _agreement(groups: Sequence[Group]) -> list[str]:
    """How far the specialists agree, beside what vectors without relation would give, and where they do least."""
    cosine, overlap, conflict, kept = (
        mean_of([getattr(group, name) for group in groups])[0]
        for name in ("cosine", "overlap", "conflict", "conflict_kept")
    )
    inside = "" if math.isnan(kept) else f", {number(kept)} among the largest fifth of both"
    said = [
        f"Over {plural(len(groups), 'module')} the specialists' task vectors have a mean cosine of {number(cosine)}, "
        f"an overlap of {number(overlap)} and a sign conflict of {number(conflict)}{inside}; vectors without relation "
        f"would have 0, {number(_CHANCE_OVERLAP)} and 0.5."
    ]
    means = {
        module: mean_of([group.conflict for group in groups if group.module == module])[0]
        for module in _ordered(groups)
    }
    known = {module: value for module, value in means.items() if not math.isnan(value)}
    if len(known) > 1:
        most, least = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
        said.append(
            f"They disagree most in {most} ({number(known[most])} of the elements) and least in {least} "
            f"({number(known[least])}): TIES settles such disagreements, a mean lets them cancel."
        )
    return said
