"""The page of an audit: which metrics keep their order under attack, see the knowledge, and are not fooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expunge.metrics.audit import AttackPointOf, Correlation, Reading, Trust, Zoo
from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Cell, Dot, HeatMap, Role, Scatter
from expunge.report.text import human, interval, listed, number, plural

PAPERS = "2406.09179, 2506.12618"
_FORGET = "forget"
#: Metrics whose scatters are drawn, best and worst of the ranking.
_SCATTERS = 2


@dataclass(frozen=True)
class Findings:
    """What an audit found."""

    readings: tuple[Reading, ...]
    standing: tuple[Trust, ...]
    zoo: Zoo
    strengths: Mapping[str, tuple[float | None, float | None]]  # checkpoint → extraction strength, forget and retain
    points: tuple[AttackPointOf, ...]
    left_out: Mapping[str, str]
    seed: int
    usable: float

    @property
    def ranking(self) -> list[Trust]:
        """Metrics by the mean correlation over attacks, those without one last."""
        return sorted(self.standing, key=lambda one: (one.order is None, -(one.order or 0), one.metric))


def audit_document(found: Findings) -> Document:
    """The page's data."""
    return Document(
        kind="audit",
        name="metrics under attack",
        summary="Which metrics can be trusted: each is read on every checkpoint before and after every attack.",
        paper=PAPERS,
        answer=answer(found),
        rule=RULE,
        remarks=remarks(found),
        facts={
            "Checkpoints": f"{len(found.zoo.names)}: {plural(len(found.zoo.unlearned), 'unlearned model')}, "
            f"{len(found.zoo.knowing)} with the knowledge, {len(found.zoo.lacking)} without it",
            "Attacks": f"{len({point.attack for point in found.points})}, at {plural(len(found.points), 'point')}",
            "Metrics": str(len(found.standing)),
            "Seed": str(found.seed),
        },
        sections=sections(found),
        left_out=dict(found.left_out),
        limits=limits(found),
        results=results(found),
    )


RULE = (
    "Metrics are ranked by the mean Pearson correlation, over attacks, between a checkpoint's value before and after "
    "the strongest point of each attack that still reads the knowledge from the target. Faithfulness is the chance "
    "that a checkpoint with the knowledge is read higher than one without it; robustness compares what comes back "
    "with what the reference learns; the symmetric form also punishes a metric that breaks."
)


def answer(found: Findings) -> str:
    """The audit in a sentence."""
    ranked = [one for one in found.ranking if one.order is not None]
    if not ranked:
        return "No metric could be ranked: no attack left enough checkpoints to compare."
    best, last = ranked[0], ranked[-1]
    tied = sum(one.order is not None and (best.order or 0) - one.order < 0.005 for one in ranked) - 1
    beside = f" ({plural(tied, 'other metric')} within 0.005)" if tied else ""
    return (
        f"{human(best.metric)} keeps its order best under attack (mean correlation {number(best.order)} over "
        f"{plural(best.attacks, 'attack')}){beside}, {human(last.metric).lower()} least ({number(last.order)})."
    )


def remarks(found: Findings) -> list[str]:
    """What a reader should know at once."""
    silent = sorted({f"{point.attack} {point.label}" for point in found.points if not point.informative})
    said = []
    if silent:
        said.append(
            f"{listed(silent)} could not read the knowledge from the target itself: marked grey, and not counted as "
            "passed."
        )
    if min(len(found.zoo.knowing), len(found.zoo.lacking)) < 3:
        said.append(
            f"Faithfulness rests on {len(found.zoo.knowing)} checkpoint(s) with and {len(found.zoo.lacking)} without "
            "the knowledge: too few to part metrics from each other."
        )
    return said


def sections(found: Findings) -> list[Section]:
    """Ranking, correlations, scatters, checkpoints."""
    metrics = [one.metric for one in found.ranking]
    parts = [
        Section(title="Ranking", tables=[ranking_table(found.ranking)]),
        Section(
            title="Correlation before and after",
            lead="Pearson's correlation over the checkpoints, forget rows. Grey: the attack reads nothing, not even "
            "from the target.",
            figures=[heat_map(found, metrics, split) for split in _splits(found)],
            tables=[readings_table(found, metrics)],
        ),
        Section(title="Before and after, checkpoint by checkpoint", figures=scatters(found)),
        Section(title="The checkpoints", tables=[checkpoints_table(found)]),
    ]
    return [part for part in parts if part.figures or part.tables]


def ranking_table(ranked: Sequence[Trust]) -> Table:
    """One row per metric, best first."""
    columns = [
        Column(label="Metric", number=False),
        Column(label="Order", hint="mean Pearson correlation over attacks", arrow="↑"),
        Column(label="Worst", hint="the attack that disturbs its order most"),
        Column(label="Faithfulness", hint="AUC: with the knowledge against without it", arrow="↑"),
        Column(label="Relearning", hint="symmetric robustness; below it the one-sided one", arrow="↑"),
        Column(label="Quantization", hint="symmetric robustness; below it the one-sided one", arrow="↑"),
        Column(label="Overall", hint="harmonic mean of faithfulness and symmetric robustness", arrow="↑"),
    ]
    best = ranked[0].order if ranked else None
    rows = []
    for one in ranked:
        shade = "best" if one.order is not None and one.order == best else ""
        cells = [
            TableCell(text=human(one.metric)),
            TableCell(text=number(one.order), under=f"of {plural(one.attacks, 'attack')}", shade=shade),
            TableCell(text=number(one.worst), under=human(one.worst_attack) if one.worst_attack else ""),
            TableCell(text=number(one.faithfulness)),
            TableCell(text=number(one.relearning_symmetric), under=_one_sided(one.relearning)),
            TableCell(text=number(one.quantization_symmetric), under=_one_sided(one.quantization)),
            TableCell(text=number(one.overall), under=f"{plural(one.looked, 'model')} looked unlearned"),
        ]
        rows.append(TableRow(cells=cells))
    return Table(columns=columns, rows=rows)


def heat_map(found: Findings, metrics: Sequence[str], split: str) -> HeatMap:
    """Metrics × points."""
    by_key = {(one.metric, one.point): one for one in found.readings if one.split == split}
    values: list[list[float | None]] = []
    silent: list[Cell] = []
    for row, metric in enumerate(metrics):
        values.append([])
        for column, point in enumerate(found.points):
            one = by_key.get((metric, point))
            values[-1].append(None if one is None else one.pearson.value)
            if not point.informative:
                silent.append((row, column))
    return HeatMap(
        title=f"{human(split)} rows",
        measure="Pearson's correlation before ↔ after",
        good="high",
        row_name="metric",
        rows=[human(metric) for metric in metrics],
        column_name="attack",
        columns=[f"{human(point.attack)} {point.label}" for point in found.points],
        values=values,
        uninformative=silent,
    )


def readings_table(found: Findings, metrics: Sequence[str]) -> Table:
    """Every metric under every point, with intervals."""
    columns = [
        Column(label="Metric", number=False),
        Column(label="Attack", number=False),
        Column(label="Pearson", hint="95% interval: checkpoints drawn anew"),
        Column(label="Spearman"),
        Column(label="Distance", hint="mean |after − before| in units of target − reference", arrow="↓"),
        Column(label="Slope", hint="1: the attack leaves the metric as it was"),
        Column(label="Checkpoints"),
    ]
    place = {metric: i for i, metric in enumerate(metrics)}
    rows = []
    for one in sorted(found.readings, key=lambda one: place.get(one.metric, len(place))):
        if one.split != _FORGET:
            continue
        shade = "" if one.point.informative else "grey"
        cells = [
            TableCell(text=human(one.metric)),
            TableCell(text=f"{human(one.point.attack)} {one.point.label}"),
            _correlation(one.pearson),
            _correlation(one.spearman),
            TableCell(text=number(one.distance)),
            TableCell(text=number(one.slope)),
            TableCell(text=str(len(one.names))),
        ]
        rows.append(TableRow(cells=[cell.model_copy(update={"shade": shade}) for cell in cells]))
    return Table(title="Every reading", columns=columns, rows=rows, folded=True)


def scatters(found: Findings) -> list[Scatter]:
    """The best and the worst metrics of the ranking under their worst attack."""
    ranked = [one for one in found.ranking if one.order is not None]
    chosen = dict.fromkeys([*ranked[:_SCATTERS], *ranked[-_SCATTERS:]])
    drawn = []
    for one in chosen:
        mine = [r for r in found.readings if r.metric == one.metric and r.split == _FORGET]
        worst = [r for r in mine if r.point.attack == one.worst_attack and r.point.informative]
        if worst:
            drawn.append(_scatter(worst[-1], found.zoo))
    return drawn


def checkpoints_table(found: Findings) -> Table:
    """Who was in the zoo, and how much each knew."""
    columns = [
        Column(label="Checkpoint", number=False),
        Column(label="Part", number=False),
        Column(label="Forget", hint="extraction strength on the forget rows"),
        Column(label="Retain", hint="extraction strength on the retain rows"),
    ]
    parts = {"unlearned": found.zoo.unlearned, "knows": found.zoo.knowing, "never knew": found.zoo.lacking}
    rows = [
        TableRow(cells=[TableCell(text=text) for text in (name, part, *map(number, found.strengths[name]))])
        for part, names in parts.items()
        for name in names
    ]
    return Table(columns=columns, rows=rows, folded=len(rows) > 20)


def limits(found: Findings) -> list[str]:
    """What the audit does not say."""
    return [
        f"A correlation over {len(found.zoo.names)} checkpoints has a wide interval; the table of readings has it.",
        "The zoo decides what is seen: a metric that is never asked about collapsed or barely changed models keeps an "
        "easy order.",
        f"Robustness is a mean over the unlearned models that keep {100 * found.usable:.0f}% of the target's strength "
        "on the retain rows and look unlearned to the metric itself; where there is none, nothing is said.",
    ]


def results(found: Findings) -> dict[str, object]:
    """The same for machines."""
    return {
        "ranking": [vars(one) for one in found.ranking],
        "readings": [
            {
                "metric": one.metric,
                "split": one.split,
                "attack": one.point.attack,
                "point": one.point.label,
                "informative": one.point.informative,
                "pearson": vars(one.pearson),
                "spearman": vars(one.spearman),
                "distance": one.distance,
                "slope": one.slope,
                "checkpoints": list(one.names),
                "before": one.before.tolist(),
                "after": one.after.tolist(),
            }
            for one in found.readings
        ],
        "strengths": {name: list(values) for name, values in found.strengths.items()},
    }


def _scatter(one: Reading, zoo: Zoo) -> Scatter:
    def role(name: str) -> Role:
        return "target" if name in zoo.knowing else "reference" if name in zoo.lacking else "specialist"

    pairs = zip(one.names, one.before.tolist(), one.after.tolist(), strict=True)
    return Scatter(
        title=f"{human(one.metric)} under {human(one.point.attack).lower()} {one.point.label}",
        x_name="before (higher knows more)",
        y_name="after",
        dots=[Dot(name=name, x=before, y=after, role=role(name)) for name, before, after in pairs],
        pearson=one.pearson.value,
        spearman=one.spearman.value,
    )


def _correlation(found: Correlation) -> TableCell:
    return TableCell(text=number(found.value), under=interval(found.low, found.high))


def _one_sided(value: float | None) -> str:
    return "" if value is None else f"one-sided {number(value)}"


def _splits(found: Findings) -> list[str]:
    return list(dict.fromkeys(one.split for one in found.readings))
