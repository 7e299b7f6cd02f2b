"""Values between two yardsticks: 1 where the target stands, 0 where a model stands that never saw the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from expunge.metrics.base import METRICS, Resampling

TARGET, REFERENCE = "target", "reference"

#: Below this, a model knows less of the rows than one that never saw them: it was pushed, and that shows.
OVER_UNLEARNED = -0.1


class Anchored(NamedTuple):
    """(u − reference) / (target − reference), with the ends of its interval where rows can be drawn anew."""

    value: float
    low: float | None = None
    high: float | None = None


def with_anchors(
    records: Sequence[Mapping[str, Any]], values: pa.Table, resampling: Resampling
) -> list[dict[str, Any]]:
    """The records with `anchored…` and `over_unlearned` filled, where a target and a reference were measured too.

    They stay None where the two yardsticks do not differ by more than their rows' chance. Rows are drawn jointly for
    all three models (paired bootstrap). The flag is for splits that are to be forgotten (direction as on those).
    """
    by_key = {(record["variant"], record["split"], record["metric"]): record for record in records}
    per_example = _by_example(values)
    filled = []
    for record in records:
        split, name = record["split"], record["metric"]
        yardsticks = [by_key.get((variant, split, name)) for variant in (TARGET, REFERENCE)]
        found = None
        if METRICS.get(name).anchors and all(yardsticks):
            keys = [(variant, split, name) for variant in (record["variant"], TARGET, REFERENCE)]
            samples = [per_example.get(key) for key in keys] if METRICS.get(name).per_example else [None] * 3
            points = [by_key[key]["value"] for key in keys]
            found = _anchor(points, samples, METRICS.get(name).average == "geometric", resampling)
        filled.append({**record, **_cells(found, str(split) == "forget" or split.startswith("forget"))})
    return filled


def _cells(found: Anchored | None, forget: bool) -> dict[str, Any]:
    if found is None:
        return {"anchored": None, "anchored_low": None, "anchored_high": None, "over_unlearned": None}
    over = found.value < OVER_UNLEARNED if forget else None
    return {
        "anchored": found.value,
        "anchored_low": found.low,
        "anchored_high": found.high,
        "over_unlearned": over,
    }


def _anchor(
    points: Sequence[float | None],
    samples: Sequence[Mapping[str, float] | None],
    geometric: bool,
    resampling: Resampling,
) -> Anchored | None:
    if any(point is None for point in points):
        return None
    model, target, reference = (float(np.log(point) if geometric else point) for point in points if point is not None)
    if not np.isfinite([model, target, reference]).all() or target == reference:
        return None
    value = (model - reference) / (target - reference)
    if any(sample is None for sample in samples):
        return Anchored(value)
    rows = _shared(samples)
    if rows.shape[1] < 2:
        return Anchored(value)
    if geometric:
        rows = np.log(rows)
    span, ratio = _drawn(rows, resampling)
    low, high = np.quantile(span, [0.025, 0.975])
    if low <= 0 <= high:
        return None
    ends = np.quantile(ratio, [0.025, 0.975])
    return Anchored(value, float(ends[0]), float(ends[1]))


def _shared(samples: Sequence[Mapping[str, float] | None]) -> NDArray[np.float64]:
    """[3, n]: values of the examples that all three models have."""
    given = [sample for sample in samples if sample is not None]
    names = [name for name in given[0] if all(name in sample for sample in given[1:])]
    return np.array([[sample[name] for name in names] for sample in given], dtype=np.float64).reshape(len(given), -1)


def _drawn(rows: NDArray[np.float64], resampling: Resampling) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """target − reference, and the anchored value, of each draw of rows."""
    generator = np.random.default_rng(resampling.seed)
    span, ratio = np.empty(resampling.count), np.empty(resampling.count)
    size = rows.shape[1]
    step = max(1, 2_000_000 // size)
    for start in range(0, resampling.count, step):
        count = min(step, resampling.count - start)
        draws = generator.integers(0, size, size=(count, size), dtype=np.int32)
        model, target, reference = (row[draws].mean(axis=1) for row in rows)
        span[start : start + count] = target - reference
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio[start : start + count] = (model - reference) / (target - reference)
    return span, np.nan_to_num(ratio, nan=0.0)


def _by_example(values: pa.Table) -> dict[tuple[str, str, str], dict[str, float]]:
    """(variant, split, metric) → example → scored value."""
    scored = values.filter(pc.is_valid(values["value"]))
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    columns = [scored[name].to_pylist() for name in ("variant", "split", "metric", "example_id", "value")]
    for variant, split, name, example, value in zip(*columns, strict=True):
        found.setdefault((variant, split, name), {})[example] = value
    return found
