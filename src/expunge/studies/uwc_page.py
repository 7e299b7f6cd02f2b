"""What `uwc` found, as a document: before and after calibration, τ-curves, trends, and the audit of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.metrics.base import Resampling
from expunge.report import audit_page
from expunge.report.attack_record import AttackRecord
from expunge.report.calibration_record import Calibration
from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Curves, Line
from expunge.report.text import human, number, plural
from expunge.studies import trends
from expunge.studies.rules import spread
from expunge.studies.trends import Trend
from expunge.studies.trends_page import deviating, forest, table

if TYPE_CHECKING:
    from expunge.studies.ground import Ground
    from expunge.studies.uwc import Uwc

SUMMARY = "unlearning methods compared at equal retention, and which metrics can be trusted under attack"
ASCENT = "grad_ascent"
JUDGED = "retain_unseen"


@dataclass(frozen=True)
class Member:
    """A checkpoint of the zoo, and its calibration."""

    name: str
    method: str
    steps: int
    seed: int
    calibration: Calibration


@dataclass(frozen=True)
class Group:
    """The seeds of one method after one number of steps."""

    method: str
    steps: int
    members: tuple[Member, ...]

    @property
    def calibrations(self) -> list[Calibration]:
        """One per seed."""
        return [member.calibration for member in self.members]

    def over(self, read: Any) -> tuple[float, float | None]:
        """Mean and standard deviation over seeds of what `read` takes from a calibration."""
        return spread([read(found) for found in self.calibrations])


def document(
    ground: Ground, options: Uwc, members: Sequence[Member], found: audit_page.Findings, record: AttackRecord
) -> Document:
    """The whole document."""
    groups = grouped(members)
    last = [group for group in groups if group.steps == max(options.steps)]
    ranked = sorted(last, key=lambda group: group.over(_calibrated_forget)[0])
    claims = claims_of(groups, ranked, found, record, Resampling(2000, options.seed))
    return Document(
        name="uwc",
        summary=SUMMARY,
        paper="2406.09179",
        answer=answer(ranked, options, found),
        rule=f"Fixed beforehand: every checkpoint is mixed with the target until it keeps {options.share:.0%} of the "
        "target's extraction strength on validation rows (retain rows that no trial trained on), and methods are "
        "compared by what is then left of the forget rows. " + audit_page.RULE,
        remarks=[*ground.remarks, *audit_page.remarks(found)],
        planned=ground.planned,
        done=len(ground.trials),
        facts={
            "Checkpoints": f"{len(members)} ({plural(len({m.method for m in members}), 'method')}, steps "
            f"{', '.join(map(str, sorted(options.steps)))}, {plural(options.seeds, 'seed')})",
            "Learning rate": f"{options.rate:g}",
            "Kept": f"{options.share:.0%} of the target's",
        },
        settings={"Attacks": ", ".join(options.attacks), "Seed": str(options.seed)},
        sections=[
            Section(title="What should be seen", figures=[forest(claims)], tables=[table(claims)]),
            Section(
                title="Before and after calibration",
                lead="Extraction strength, mean ± standard deviation over seeds; retain: validation rows that no trial "
                "trained on.",
                tables=[calibration_table(groups, options)],
                figures=[tau_curves(last)],
            ),
            *audit_page.sections(found),
        ],
        left_out=dict(found.left_out),
        limits=[
            f"One target and {plural(options.seeds, 'seed')} of unlearning; the data are small, and facts that were "
            "taught in a fine-tuning are easier to remove than those of pretraining.",
            "Calibration and its report look at the same validation rows.",
            *audit_page.limits(found),
        ],
        results=results(groups, claims, found),
    )


def grouped(members: Sequence[Member]) -> list[Group]:
    """Members by method and steps, in the order in which they come."""
    keys = dict.fromkeys((member.method, member.steps) for member in members)
    return [
        Group(method, steps, tuple(m for m in members if (m.method, m.steps) == (method, steps)))
        for method, steps in sorted(
            keys, key=lambda key: (list(dict.fromkeys(k[0] for k in keys)).index(key[0]), key[1])
        )
    ]


def claims_of(
    groups: Sequence[Group],
    ranked: Sequence[Group],
    found: audit_page.Findings,
    record: AttackRecord,
    resampling: Resampling,
) -> list[Trend]:
    """The trends, where the zoo has what they are about."""
    claims: list[Trend] = []
    ascent = next((group for group in ranked if group.method == ASCENT), None)
    best = next((group for group in ranked if group.method != ASCENT), None)
    if ascent is not None:
        claims.append(trends.destroyed(ascent.calibrations, resampling))
        if best is not None:
            for calibrated in (False, True):
                claims.append(
                    trends.advantage(ascent.calibrations, best.calibrations, human(best.method), calibrated, resampling)
                )
    claims += [trends.order_kept(found.readings, other, resampling) for other in ("perplexity", "truth_ratio")]
    unlearned = ["model", *found.zoo.unlearned[1:]]  # the first goes by this name in the attacks
    claims.append(trends.coarser_brings_back_more(record, unlearned, resampling))
    claims.append(trends.reference_learns_too(record))
    return claims


def answer(ranked: Sequence[Group], options: Uwc, found: audit_page.Findings) -> str:
    """The study in a sentence."""
    if not ranked:
        return "No checkpoint came through."
    best = ranked[0]
    before, after = best.over(_raw_forget)[0], best.over(_calibrated_forget)[0]
    return (
        f"At {options.share:.0%} of the target's retention {human(best.method)} leaves least of the forget rows "
        f"({number(after)}; {number(before)} before calibration). {audit_page.answer(found)}"
    )


def calibration_table(groups: Sequence[Group], options: Uwc) -> Table:
    """Per method and steps: strengths as it is, α*, strengths after."""
    columns = [
        Column(label="Method", number=False),
        Column(label="Steps"),
        Column(label="Forget, raw", arrow="↓"),
        Column(label="Retain, raw", arrow="↑"),
        Column(label="α*", hint="1: the unlearned model as it is, 0: the target"),
        Column(label="Forget, calibrated", arrow="↓"),
        Column(label="Retain, calibrated", arrow="↑"),
        Column(label="Area", hint="under the least forget strength at each share of retention", arrow="↓"),
    ]
    reads = [_raw_forget, _raw_retain, lambda c: c.alpha, _calibrated_forget, lambda c: c.calibrated.retain]
    least = min((group.over(_calibrated_forget)[0] for group in groups), default=None)
    rows = []
    for group in groups:
        cells = [TableCell(text=human(group.method)), TableCell(text=str(group.steps))]
        cells += [deviating(group.over(read)) for read in reads]
        if group.over(_calibrated_forget)[0] == least:
            cells[5] = cells[5].model_copy(update={"shade": "best"})
        areas = [found.area for found in group.calibrations if found.area is not None]
        cells.append(deviating(spread(areas)) if areas else TableCell(text="–"))
        rows.append(TableRow(cells=cells))
    return Table(columns=columns, rows=rows, notes=[f"α* is found to {options.epsilon:g}."])


def tau_curves(groups: Sequence[Group]) -> Curves:
    """ES_f*(τ) per method, mean over seeds."""
    lines = []
    for group in groups:
        points: dict[float, list[float]] = {}
        for found in group.calibrations:
            for point in found.curve:
                points.setdefault(point.tau, []).append(point.forget)
        whole = {tau: values for tau, values in sorted(points.items()) if len(values) == len(group.members)}
        means = [sum(values) / len(values) for values in whole.values()]
        lines.append(Line(name=human(group.method), role="specialist", x=list(whole), y=means))
    return Curves(
        title="What is left at each share of retention",
        x_name="τ: part of the target's retain strength that must be kept",
        y_name="forget extraction strength",
        lines=lines,
    )


def results(groups: Sequence[Group], claims: Sequence[Trend], found: audit_page.Findings) -> dict[str, Any]:
    """The same for machines."""
    table = [
        {
            "method": group.method,
            "steps": group.steps,
            "seeds": len(group.members),
            "forget_raw": group.over(_raw_forget),
            "retain_raw": group.over(_raw_retain),
            "alpha": group.over(lambda c: c.alpha),
            "forget_calibrated": group.over(_calibrated_forget),
            "retain_calibrated": group.over(lambda c: c.calibrated.retain),
        }
        for group in groups
    ]
    return {
        "calibration": table,
        "trends": [{**vars(one), "shown": one.shown} for one in claims],
        **audit_page.results(found),
    }


def _raw_forget(found: Calibration) -> float:
    return found.at(1.0).forget or 0.0


def _raw_retain(found: Calibration) -> float:
    return found.at(1.0).retain


def _calibrated_forget(found: Calibration) -> float:
    return found.calibrated.forget or 0.0
