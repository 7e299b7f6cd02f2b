"""What a metric declares, and how per-example values become a record with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.registry import Registry
from expunge.scoring.tables import RECORD_KEYS, VALUES

#: One float64 per example, in the table's order; NaN where the metric has nothing to say about the example.
Values = NDArray[np.float64]
TableName = Literal["scores", "generations"]
Direction = Literal["lower", "higher", "none"]
Average = Literal["arithmetic", "geometric"]

METRICS: Registry[Metric] = Registry("metric", "expunge.metrics")

#: Resampled examples held at once: 2M int32 indices and their float64 values, 24 MB.
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Metric:
    """A pure function from one table to per-example values, and all that help, report and card say about it."""

    name: str
    summary: str
    function: Callable[[pa.Table], Values]
    needs: TableName
    range: tuple[float, float]
    unit: str
    paper: str
    #: the end of the range at which a model stands that has learnt the answer by heart
    learnt: Literal["high", "low"]
    average: Average

    def direction(self, role: str) -> Direction:
        """Which values are good on a split of this role; a holdout is looked at, but has no good end."""
        if role == "holdout":
            return "none"
        wants_learnt = role != "forget"
        return "higher" if wants_learnt == (self.learnt == "high") else "lower"

    def describe(self) -> dict[str, str]:
        """Label → text, for `expunge list metrics` and the generated tables."""
        low, high = (f"{end:g}" for end in self.range)
        return {
            "summary": self.summary,
            "range": f"{low} to {high}",
            "unit": self.unit,
            "needs": self.needs,
            "average": f"{self.average} mean over examples",
            "direction": ", ".join(f"{role}: {self.direction(role)}" for role in ("forget", "retain", "holdout")),
            "paper": self.paper,
        }


def metric(
    name: str,
    *,
    summary: str,
    needs: TableName,
    range: tuple[float, float],
    unit: str,
    paper: str,
    learnt: Literal["high", "low"] = "high",
    average: Average = "arithmetic",
) -> Callable[[Callable[[pa.Table], Values]], Callable[[pa.Table], Values]]:
    """Decorator that files a function table → per-example values as the metric `name`."""

    def file(function: Callable[[pa.Table], Values]) -> Callable[[pa.Table], Values]:
        METRICS.register(name)(Metric(name, summary, function, needs, range, unit, paper, learnt, average))
        return function

    return file


def needed_tables(names: Sequence[str] | None) -> set[str]:
    """The tables that these metrics (all when None) are made from. Raises UserError on an unknown name."""
    return {METRICS.get(name).needs for name in _resolve(names)}


def left_out(tables: Mapping[str, pa.Table], names: Sequence[str] | None) -> dict[str, str]:
    """Metric → missing table, for the metrics that `evaluate_metrics` leaves out with these tables."""
    missing = {name: METRICS.get(name).needs for name in _resolve(names)}
    return {name: table for name, table in missing.items() if table not in tables}


def evaluate_metrics(
    tables: Mapping[str, pa.Table],
    role: str,
    names: Sequence[str] | None,
    bootstrap: int,
    seed: int,
    variant: str,
    split: str,
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Records (RECORD_KEYS) and per-example values (VALUES) of the metrics whose table is there (see `left_out`).

    `n` counts the examples behind `value`, `unscored` those for which the metric is undefined. Value and interval are
    None where nothing is scored; the interval also with a single example. Raises UserError on an unknown name.
    """
    records: list[dict[str, Any]] = []
    parts: list[pa.Table] = []
    for name in _resolve(names):
        entry = METRICS.get(name)
        if entry.needs not in tables:
            continue
        table = tables[entry.needs]
        values = entry.function(table)
        scored = values[~np.isnan(values)]
        value, low, high = summarise(scored, entry.average, bootstrap, seed)
        cells = (variant, split, name, value, low, high, len(scored), len(values) - len(scored), entry.direction(role))
        records.append(dict(zip(RECORD_KEYS, cells, strict=True)))
        parts.append(_value_rows(table, values, variant, split, name))
    return records, pa.concat_tables(parts) if parts else VALUES.empty_table()


def summarise(
    scored: Values, average: Average, bootstrap: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Mean of scored values and the ends of its bootstrap 95% percentile interval (on the log scale if geometric)."""
    if not len(scored):
        return None, None, None
    if average == "geometric":
        value, low, high = (
            None if end is None else math.exp(end) for end in summarise(np.log(scored), "arithmetic", bootstrap, seed)
        )
        return value, low, high
    mean = float(scored.mean())
    return (mean, *bootstrap_interval(scored, bootstrap, seed)) if len(scored) > 1 else (mean, None, None)


def mean(scored: Values, average: Average) -> float | None:
    """Mean of scored values; None without any."""
    if not len(scored):
        return None
    return math.exp(float(np.log(scored).mean())) if average == "geometric" else float(scored.mean())


def bootstrap_interval(values: Values, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over examples drawn with replacement (Efron 1979).

    Draws depend on `seed` and the number of values alone, so two variants of one split are resampled alike.
    """
    means = np.empty(resamples)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = generator.integers(0, len(values), size=(count, len(values)), dtype=np.int32)
        means[start : start + count] = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resolve(names: Sequence[str] | None) -> list[str]:
    return METRICS.names() if names is None else list(dict.fromkeys(names))


def _value_rows(table: pa.Table, values: Values, variant: str, split: str, name: str) -> pa.Table:
    size = len(values)
    constants = [pa.repeat(pa.scalar(text), size) for text in (variant, split, name)]
    ids = table.column("example_id").combine_chunks()
    return pa.Table.from_arrays([*constants, ids, pa.array(values, mask=np.isnan(values))], schema=VALUES)
