"""The official numbers of a benchmark, from what was measured of each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.data.example import Splits
from expunge.metrics.base import METRICS, mean
from expunge.pipeline.asked import Exam


@dataclass(frozen=True)
class MeasuredModel:
    """What was measured of one model, as benchmarks read it (see expunge.data.registry.Measured)."""

    records: Mapping[tuple[str, str], Mapping[str, Any]]  # (split, metric) → record
    scored: Mapping[tuple[str, str], Mapping[str, float]]  # (split, metric) → example → value
    task_of: Mapping[str, Mapping[str, str]]  # split → example → task
    others: Mapping[str, MeasuredModel] = field(default_factory=dict, repr=False)  # by variant

    def mean(self, split: str, metric: str, task: str | None = None) -> float | None:
        """The metric's mean (or statistic) on a split, or its mean on the rows of one task; None if not there."""
        if task is None:
            record = self.records.get((split, metric))
            return None if record is None else record["value"]
        return mean(np.array(self.values(split, metric, task), dtype=np.float64), METRICS.get(metric).average)

    def values(self, split: str, metric: str, task: str | None = None) -> list[float]:
        """The metric's scored values, one per example."""
        found, tasks = self.scored.get((split, metric), {}), self.task_of.get(split, {})
        return [value for example, value in found.items() if task is None or tasks.get(example) == task]

    def tasks(self, split: str) -> list[str]:
        """The tasks of a split's rows."""
        return sorted(set(self.task_of.get(split, {}).values()))

    def other(self, variant: str) -> MeasuredModel | None:
        """What was measured of the variant `target` or `reference` on the same splits; None if it was not."""
        return self.others.get(variant)

    def note(self, split: str, metric: str) -> str:
        """What the metric itself says of its number."""
        return str(self.records.get((split, metric), {}).get("note") or "")


def official(
    exam: Exam, variants: Iterable[str], splits: Splits, records: Sequence[Mapping[str, Any]], values: pa.Table
) -> list[dict[str, Any]]:
    """Every aggregate of the exam's benchmark for every model, with its convention; empty without a benchmark."""
    benchmark = exam.benchmark
    if benchmark is None or benchmark.aggregate is None:
        return []
    task_of = {split.name: {example.id: example.task for example in split.examples} for split in splits}
    convention = exam.convention
    found = []
    models: dict[str, MeasuredModel] = {}
    for variant in variants:
        mine = {(r["split"], r["metric"]): r for r in records if r["variant"] == variant}
        models[variant] = MeasuredModel(mine, _scored(values, variant), task_of, models)
    for variant, measured in models.items():
        # the numbers are the source's own only if rows and texts were counted as the source counts them
        its_own = convention.official and convention.name == benchmark.convention
        about = {"variant": variant, "benchmark": benchmark.name, "convention": convention.name}
        for number in benchmark.aggregate(measured):
            found.append({**about, **asdict(number), "official": its_own and number.official})
    return found


def _scored(values: pa.Table, variant: str) -> dict[tuple[str, str], dict[str, float]]:
    scored: dict[tuple[str, str], dict[str, float]] = {}
    for row in values.to_pylist():
        if row["variant"] == variant and row["value"] is not None:
            scored.setdefault((row["split"], row["metric"]), {})[row["example_id"]] = row["value"]
    return scored
