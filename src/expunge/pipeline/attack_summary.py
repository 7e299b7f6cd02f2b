"""From the tables of attacked models to attack.json: strengths, margins over the reference, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from expunge.attacks.base import Attack, Point
from expunge.data.example import Splits
from expunge.metrics.base import METRICS, Resampling, Statistic, bootstrap_interval, example_ids
from expunge.numbers import HARDLY
from expunge.pipeline.asked import AT, Exam
from expunge.pipeline.attacked import FORGET, STRENGTH, Attacked, place
from expunge.pipeline.evaluate import measure
from expunge.report.attack_record import AttackPoint, AttackResult, Dropped, Estimate, LeftOut, Verdict
from expunge.runs.atomic import plain

MODEL, TARGET, REFERENCE = "model", "target", "reference"
#: Part of its own strength that the target has to show under an attack, or else the attack reads nothing.
READABLE = 0.5
#: What a training on the measured rows has to teach the reference, or else it was too short to be an attack.
TAUGHT = 0.02

Strengths = Mapping[str, Mapping[str, float]]  # subject → row → strength


@dataclass(frozen=True)
class PointShelf:
    """The tables under one point of an attack; `target` and `reference` are those models under the same point.

    `rows`: forget rows that count, all if None.
    """

    root: Path
    attack: str = ""
    label: str = ""
    rows: frozenset[str] | None = None
    _kept: dict[tuple[str, str, str], pa.Table | None] = field(default_factory=dict, repr=False, compare=False)

    def find(self, variant: str, split: str, table: str) -> pa.Table | None:
        """The table, or None where it was not made."""
        key = (variant, split, table)
        if key not in self._kept:  # many metrics ask for the same one
            self._kept[key] = self._read(variant, split, table)
        return self._kept[key]

    def _read(self, variant: str, split: str, table: str) -> pa.Table | None:
        kind, _, view = table.partition("/")
        folder = self.root / place(variant, self.attack, self.label) / kind
        path = folder / f"{split}{AT + view if view else ''}.parquet"
        if not path.is_file():
            return None
        found = pq.read_table(path)
        if self.rows is not None and split == FORGET:
            found = found.filter(pc.is_in(found["example_id"], pa.array(sorted(self.rows), pa.string())))
        return found


@dataclass(frozen=True)
class Summary:
    """Turns what `Attacked` made into results; one per run."""

    root: Path
    subjects: Sequence[str]
    splits: Splits
    exam: Exam
    resampling: Resampling
    allowed: float  # thresholds.robust_margin
    attacked: Attacked

    def result(self, attack: Attack) -> tuple[AttackResult, list[pa.Table]] | None:
        """An attack over its points, and per-example values under the names of the variants; None without a point."""
        name = attack.about.name
        kind = "scores" if "scores" in attack.about.outputs else "generations"
        shelves = [(point, PointShelf(self.root, name, point.label)) for point in attack.points()]
        shelves = [(point, shelf) for point, shelf in shelves if shelf.find(MODEL, FORGET, kind) is not None]
        shelves = [(point, shelf) for point, shelf in shelves if (name, point.label, MODEL) not in self._missing]
        if not shelves:
            return None
        strengths = [self._strengths(shelf, kind, FORGET) for _, shelf in shelves]
        rows = frozenset(row for found in strengths for row in found[MODEL])
        bare = PointShelf(self.root, rows=rows)
        before = self._strengths(bare, kind, FORGET)
        points, values = [], []
        for (point, shelf), found in zip(shelves, strengths, strict=True):
            records, each = measure(self._made(name, point.label), self.splits, shelf, self.exam, self.resampling)
            values.append(_renamed(each, name, point.label))
            for record in records:
                record["variant"] = variant(record["variant"], name, point.label)
            points.append(self._point(attack, point, shelf, kind, found, before, records))
        start = AttackPoint(
            label="before",
            budget=0,
            rows={FORGET: len(rows)},
            strengths=self._estimates(before),
            retained=self._estimates(self._strengths(bare, kind, "retain")),
            margin=self._difference(before.get(MODEL), before.get(REFERENCE)),
        )
        verdict, reason = attack_verdict(points, start, attack.about.kind, self.allowed)
        declared = {key: getattr(attack.about, key) for key in ("idea", "paper", "kind", "budget")}
        settings = {item.name: plain(getattr(attack, item.name)) for item in fields(attack)}  # type: ignore[arg-type]
        made = AttackResult(
            name=name,
            settings=settings,
            strength=STRENGTH[kind],
            before=start,
            points=points,
            verdict=verdict,
            reason=reason,
            **declared,
        )
        return made, values

    def left_out(self) -> list[LeftOut]:
        """What could not be made, in the order in which it was tried."""
        return [
            LeftOut(attack=name, point=label or None, subject=subject or None, reason=reason)
            for (name, label, subject), reason in self._missing.items()
        ]

    @property
    def _missing(self) -> Mapping[tuple[str, str, str], str]:
        return self.attacked.left_out

    def _made(self, name: str, label: str) -> list[str]:
        return [subject for subject in self.subjects if (name, label, subject) not in self._missing]

    def _point(
        self,
        attack: Attack,
        point: Point,
        shelf: PointShelf,
        kind: str,
        found: Strengths,
        before: Strengths,
        records: list[dict[str, Any]],
    ) -> AttackPoint:
        rewritten = self.attacked.rewritten.get((attack.about.name, point.label))
        tables = {split.name: shelf.find(MODEL, split.name, kind) for split in self.splits}
        margin = self._difference(found.get(MODEL), found.get(REFERENCE))
        informative = None
        if TARGET in found and TARGET in before:
            informative = is_informative(before[TARGET], found[TARGET])
        if attack.about.name in self.attacked.taught and REFERENCE in found and REFERENCE in before:
            informative = informative is not False and has_taught(before[REFERENCE], found[REFERENCE])
        return AttackPoint(
            label=point.label,
            budget=point.budget,
            settings=plain(dict(point.settings)),
            rows={split: len(set(example_ids(table))) for split, table in tables.items() if table is not None},
            strengths=self._estimates(found),
            retained=self._estimates(self._strengths(shelf, kind, "retain")),
            margin=margin,
            recovered=self._difference(found.get(MODEL), before.get(MODEL)),
            informative=informative,
            verdict=point_verdict(margin, informative, attack.about.kind, self.allowed),
            dropped=rewritten.dropped if rewritten is not None else Dropped(),
            notes=rewritten.notes if rewritten is not None else [],
            records=records,
        )

    def _strengths(self, shelf: PointShelf, kind: str, split: str) -> dict[str, dict[str, float]]:
        """Per subject the strength of each scored row."""
        metric = METRICS.get(STRENGTH[kind])
        strengths = {}
        for subject in self._made(shelf.attack, shelf.label):
            table = shelf.find(subject, split, kind)
            if table is None:
                continue
            values = metric.compute([table], self.exam.convention)
            assert not isinstance(values, Statistic)
            pairs = zip(example_ids(table), values.tolist(), strict=True)
            strengths[subject] = {row: value for row, value in pairs if value == value}
        return strengths

    def _estimates(self, strengths: Strengths) -> dict[str, Estimate]:
        found = {subject: self._estimate(list(rows.values())) for subject, rows in strengths.items()}
        return {subject: estimate for subject, estimate in found.items() if estimate is not None}

    def _difference(self, first: Mapping[str, float] | None, second: Mapping[str, float] | None) -> Estimate | None:
        """Mean of first − second over the rows of both, with its paired bootstrap interval."""
        if first is None or second is None:
            return None
        return self._estimate([first[row] - second[row] for row in first if row in second])

    def _estimate(self, values: Sequence[float]) -> Estimate | None:
        if not values:
            return None
        array = np.asarray(values, dtype=np.float64)
        low, high = None, None
        if len(array) > 1:
            low, high = bootstrap_interval(array, self.resampling.count, self.resampling.seed)
        return Estimate(value=float(array.mean()), low=low, high=high, n=len(array))


def variant(subject: str, attack: str, label: str) -> str:
    """The name of a subject under a point of an attack."""
    return f"{subject}~{attack}-{label}"


def is_informative(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the target, asked under an attack, still shows at least half of what it shows without."""
    shared = [row for row in after if row in before]
    if not shared:
        return False
    own, shown = (sum(strengths[row] for row in shared) / len(shared) for strengths in (before, after))
    return own >= HARDLY and shown >= READABLE * own


def has_taught(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether a training on the measured rows taught the reference anything of them; else it was no attack."""
    shared = [row for row in after if row in before]
    return bool(shared) and sum(after[row] - before[row] for row in shared) / len(shared) >= TAUGHT


def point_verdict(margin: Estimate | None, informative: bool | None, kind: str, allowed: float) -> Verdict:
    """Robust at one point: no as soon as the margin is shown to be larger, yes only where the attack can read.

    Without a target, only training attacks are taken to read what is there.
    """
    if margin is None or margin.low is None or margin.high is None:
        return "not shown"
    if margin.low > allowed:
        return "no"
    reads = informative if informative is not None else kind == "knowledge"
    return "yes" if reads and margin.high <= allowed else "not shown"


def attack_verdict(
    points: Sequence[AttackPoint], before: AttackPoint, kind: str, allowed: float
) -> tuple[Verdict, str]:
    """Robust against an attack, over its points, and why in a sentence."""
    failed = [point for point in points if point.verdict == "no"]
    if failed:
        worst = max(failed, key=lambda point: point.margin.value if point.margin else 0.0)
        assert worst.margin is not None
        already = f", {before.margin.value:.3f} of it without any attack" if before.margin else ""
        return "no", f"at {worst.label} the model is {worst.margin.value:.3f} above the reference{already}"
    if all(point.margin is None for point in points):
        return "not shown", "no reference model to compare with: what a model that never saw the rows shows is unknown"
    telling = [point for point in points if point.informative is not False]
    if not telling:
        short = "the training taught not even the reference: give it more steps, or a higher rate"
        reads = "not even the target shows the knowledge under it"
        return "not shown", f"uninformative: {short if kind == 'knowledge' else reads}"
    if all(point.informative is None for point in telling) and kind != "knowledge":
        return "not shown", "no target model was given, so that nobody knows whether the attack can read anything"
    if all(point.verdict == "yes" for point in telling):
        left = len(points) - len(telling)
        aside = f" ({left} uninformative points aside)" if left else ""
        return "yes", f"at most {allowed:g} above the reference at every point{aside}"
    open_ = next(point for point in telling if point.verdict != "yes")
    if open_.margin is None or open_.margin.low is None or open_.margin.high is None:
        return "not shown", f"at {open_.label} there are too few rows, or no reference"
    ends = f"{open_.margin.low:.3f} … {open_.margin.high:.3f}"
    return "not shown", f"at {open_.label} the margin's interval ({ends}) holds {allowed:g}"


def overall_verdict(results: Sequence[AttackResult]) -> tuple[Verdict, str]:
    """Robust against all attacks of a run, and why in a sentence."""
    failed = [result.name for result in results if result.verdict == "no"]
    if failed:
        return "no", f"not robust to {', '.join(failed)}"
    unclear = [result.name for result in results if result.verdict == "not shown"]
    if not results or unclear:
        return "not shown", f"not shown for {', '.join(unclear)}" if unclear else "no attack could be run"
    return "yes", f"robust to {', '.join(result.name for result in results)}"


def _renamed(values: pa.Table, attack: str, label: str) -> pa.Table:
    names = [variant(subject, attack, label) for subject in values.column("variant").to_pylist()]
    place = values.schema.get_field_index("variant")
    return values.set_column(place, values.schema.field(place), pa.array(names, pa.string()))
