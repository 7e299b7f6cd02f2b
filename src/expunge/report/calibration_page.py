"""The page of a calibration: the line from target to unlearned, where it is read, and the τ-curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.report.calibration_record import Calibration, CalibrationPoint, tau_curve
from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Curves, Line, LineRole
from expunge.report.text import compact, human, interval, named, number, percent, plural

_FORGET: tuple[tuple[str, LineRole], ...] = (("forget", "forget"), ("paraphrase", "paraphrase"))
_ROLES = {"target": "target", "calibrated": "result", "unlearned": "specialist"}


def calibration_document(record: Calibration) -> Document:
    """The page of a folder that `expunge calibrate` wrote."""
    return Document(
        kind="calibration",
        name=named(record.unlearned),
        paper="arXiv:2406.09179",
        answer=record.answer,
        rule=(
            f"Fixed beforehand: of the models on the line from target (α = 0) to unlearned (α = 1), the one with the "
            f"largest α that keeps at least {percent(record.keep)} of the target's retain extraction strength. Methods "
            "are compared there, at equal cost."
        ),
        facts=_facts(record),
        settings=_settings(record),
        sections=[_figures(record), _tables(record)],
        limits=_limits(record),
        results={"alpha": record.alpha, "area": record.area, "aues": record.aues},
    )


def _facts(record: Calibration) -> dict[str, str]:
    found = record.calibrated
    facts = {"Target": named(record.target), "Unlearned": named(record.unlearned), "α*": number(record.alpha)}
    facts["Retain"] = f"{number(found.retain)} of {number(record.target_retain)}"
    if found.forget is not None:
        facts["Forget"] = number(found.forget)
    areas = {"Area under ES_f*(τ)": record.area, "The same, paraphrased": record.area_paraphrase, "AUES": record.aues}
    return {**facts, **{name: number(value) for name, value in areas.items() if value is not None}}


def _settings(record: Calibration) -> dict[str, str]:
    passes = record.passes
    searched = f"{plural(passes.search, 'retain pass', 'retain passes')} of mixed models"
    rest = f"{passes.retain} retain and {passes.forget} forget passes in all, {passes.target} of the target itself"
    return {
        "Kept": f"at least {percent(record.keep)}: retain strength ≥ {number(record.threshold)}",
        "Precision": f"α* is at most {compact(record.epsilon)} below the largest α that keeps enough",
        "Search": f"{searched}; {rest}; {passes.reused} of these were made before",
        "Rows": ", ".join(f"{human(name).lower()}: {split}" for name, split in record.splits.items()),
        "Convention": record.convention,
        "Calibrated model": record.model or "not written",
        "expunge": record.expunge,
    }


def _figures(record: Calibration) -> Section:
    figures = [_along(record), *([_over_tau(record)] if record.curve else [])]
    lead = "θ(α) = (1 − α) θ of the target + α θ of the unlearned model, tensor by tensor."
    if record.curve:
        lead += " One choice of what must be kept can flatter a method: the τ-curve shows them all."
    return Section(title="From target to unlearned", lead=lead, figures=figures)


def _along(record: Calibration) -> Curves:
    points = record.points
    alphas = [point.alpha for point in points]
    lines = [Line(name="retain", role="retain", x=alphas, y=[point.retain for point in points])]
    for name, role in _FORGET:
        column = [getattr(point, name) for point in points]
        if any(value is not None for value in column):
            lines.append(Line(name=name, role=role, x=alphas, y=column))
    words = [
        f"The dashed level is what has to be kept, {number(record.threshold)}. To the right of α* too much is lost, to "
        "the left less is removed than could be.",
        "Dots are models that were measured; between them the lines are guesses.",
    ]
    return Curves(
        title="Strength along the line",
        x_name="α: part of the unlearning that is kept",
        y_name="extraction strength",
        lines=lines,
        levels={"to be kept": record.threshold},
        marks={f"α* = {number(record.alpha)}": record.alpha},
        words=words,
    )


def _over_tau(record: Calibration) -> Curves:
    """The least forget strength at every τ, exact: it changes only where a measured model drops out."""
    whole = record.target_retain or 1.0
    reached = {min(1.0, point.retain / whole) for point in record.points if point.forget is not None}
    curve = tau_curve(record.points, [0.0, *sorted(reached)])
    taus = [point.tau for point in curve]
    lines = [Line(name="forget", role="forget", x=taus, y=[point.forget for point in curve])]
    if any(point.paraphrase is not None for point in curve):
        column = [point.paraphrase for point in curve]
        lines.append(Line(name="paraphrase", role="paraphrase", x=taus, y=column))
    words = [f"The shaded area is {number(record.area)}; lower is better."] if record.area is not None else []
    if record.aues is not None:
        words.append(
            f"AUES {number(record.aues)}: the area under the best forgetting (1 − forget strength) over every level of "
            "retain strength; higher is better (arXiv:2505.16252)."
        )
    return Curves(
        title="Least forget strength at each level of keeping",
        x_name="τ: part of the target's retain strength that must be kept",
        y_name="forget extraction strength",
        lines=lines,
        filled=True,
        stepped=True,
        marks={f"τ = {compact(record.keep)}": record.keep} if record.keep <= 1 else {},
        words=words,
    )


def _tables(record: Calibration) -> Section:
    return Section(title="Numbers", tables=[_measured(record), _visited(record), *_curve_table(record)])


def _measured(record: Calibration) -> Table:
    """Target, calibrated and unlearned with their intervals."""
    by_key = {(str(r.get("variant")), str(r.get("split")), str(r.get("metric"))): r for r in record.records}
    pairs = list(dict.fromkeys((split, metric) for _, split, metric in by_key))
    several = len({metric for _, metric in pairs}) > 1
    columns = [Column(label="Model", number=False)]
    for split, metric in pairs:
        label = split.replace("@", ", ").replace("_", " ")
        columns.append(Column(label=label[:1].upper() + label[1:], under=human(metric).lower() if several else ""))
    rows = []
    for variant in dict.fromkeys(variant for variant, _, _ in by_key):
        alpha = {"target": 0.0, "calibrated": record.alpha, "unlearned": 1.0}.get(variant)
        head = TableCell(text=variant.capitalize(), under=f"α = {number(alpha)}" if alpha is not None else "")
        cells = [_cell(by_key.get((variant, split, metric))) for split, metric in pairs]
        rows.append(TableRow(cells=[head, *cells], role=_ROLES.get(variant, "")))
    return Table(title="Models", words="extraction strength with 95% intervals", columns=columns, rows=rows)


def _cell(found: Mapping[str, Any] | None) -> TableCell:
    if found is None or found.get("value") is None:
        return TableCell(text="–")
    counts = f"n {found.get('n', 0)}" + (f", {found['unscored']} unscored" if found.get("unscored") else "")
    ends = interval(found.get("ci_low"), found.get("ci_high"))
    return TableCell(text=number(found["value"]), under=f"{ends} · {counts}" if ends else counts)


def _visited(record: Calibration) -> Table:
    columns = [Column(label=name) for name in ("α", "Retain", "Part of the target's", "Forget", "Forget, paraphrase")]
    whole = record.target_retain
    rows = []
    for point in record.points:
        part = percent(point.retain / whole) if whole else "–"
        numbers = [number(point.retain), part, number(point.forget), number(point.paraphrase)]
        chosen = point.alpha == record.alpha
        cells = [TableCell(text=text, shade="best" if chosen else "") for text in (compact(point.alpha), *numbers)]
        rows.append(TableRow(cells=cells))
    return Table(
        title=f"All {plural(len(rows), 'measured model')} on the line", columns=columns, rows=rows, folded=True
    )


def _curve_table(record: Calibration) -> list[Table]:
    if not record.curve:
        return []
    columns = [Column(label=name) for name in ("τ", "α", "Forget", "Forget, paraphrase")]
    rows = []
    for point in record.curve:
        numbers = [compact(point.tau), compact(point.alpha), number(point.forget), number(point.paraphrase)]
        rows.append(TableRow(cells=[TableCell(text=text) for text in numbers]))
    return [Table(title="The τ-curve in numbers", columns=columns, rows=rows, folded=True)]


def _limits(record: Calibration) -> list[str]:
    said = [
        "Evidence of tests, not proof of deletion. What is left at α* was read greedily, with the rows' own wording.",
        "A calibrated model is a mixture of weights. How it stands against attacks is measured by attacking it: "
        "expunge attack.",
        "The intervals come from drawing rows anew; they say nothing about another training of the unlearned model.",
        *record.notes,
    ]
    if not monotone(record.points):
        said.insert(
            0,
            "Retain strength does not fall steadily along the line: an α beyond α* may keep enough as well.",
        )
    return said


def monotone(points: list[CalibrationPoint]) -> bool:
    """Whether retain strength never rises by more than a hundredth as α grows."""
    least = float("inf")
    for point in points:
        if point.retain > least + 0.01:
            return False
        least = min(least, point.retain)
    return True
