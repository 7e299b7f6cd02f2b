"""Does unlearning leave holes around what it removed? Kept rows near the forgotten ones against the other kept rows."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import METRICS, Resampling, Statistic, Values, bootstrap_means, example_ids, metric
from expunge.recipe.conventions import EXPUNGE, Convention

_SETTINGS: dict[str, Any] = {
    "needs": ("scores", "forget:scores"),
    "range": (-1, 1),
    "unit": "difference of extraction strength",
    "paper": "arXiv:2502.19207",
    "learnt": None,
    "roles": ("retain",),
    "anchors": False,
    "per_example": False,
    "good": {"retain": "higher"},
}


@metric(
    "neighbour_gap",
    summary="extraction strength of kept rows about someone of whom other rows are to be forgotten, minus that of the "
    "other kept rows",
    **_SETTINGS,
)
def neighbour_gap(
    table: pa.Table, forget: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()
) -> Statistic:
    """Below 0: neighbours pay for the removal. Rows say whom they are about in the column `subject` (or `document`)."""
    near = _first(table, [name or None for name in table.column("group").to_pylist()])
    theirs = set(forget.column("group").to_pylist()) - {None, ""}
    return _gap(table, near, theirs, "subject", convention, resampling)


@metric(
    "same_answer_gap",
    summary="extraction strength of kept rows that have the same answer as a row to be forgotten, minus that of the "
    "other kept rows",
    **_SETTINGS,
)
def same_answer_gap(
    table: pa.Table, forget: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()
) -> Statistic:
    """Below 0: an answer was removed instead of the fact. Answers are compared token by token."""
    return _gap(table, _first(table, _answers(table)), set(_answers(forget)) - {None}, "answer", convention, resampling)


def difference(near: Values, far: Values, resampling: Resampling) -> tuple[float, float | None, float | None]:
    """mean(near) − mean(far) and the ends of its bootstrap 95% interval (both drawn anew); None with a single value."""
    value = float(near.mean() - far.mean())
    if min(len(near), len(far)) < 2:
        return value, None, None
    # another seed, or equally many rows on both sides would be drawn alike
    means = [bootstrap_means(part, resampling.count, resampling.seed + shift) for shift, part in enumerate((near, far))]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return value, float(low), float(high)


def _gap(
    table: pa.Table,
    own: NDArray[np.object_],
    theirs: AbstractSet[object],
    what: str,
    convention: Convention,
    resampling: Resampling,
) -> Statistic:
    values = METRICS.get("extraction_strength").compute([table], convention)
    assert not isinstance(values, Statistic)
    scored = ~np.isnan(values)
    shared = np.array([name is not None and name in theirs for name in own], dtype=bool)
    near, far = values[shared & scored], values[~shared & scored]
    unscored = int((~scored).sum())
    if not len(near) or not len(far):
        which = "no scored kept row shares its" if not len(near) else "every scored kept row shares its"
        return Statistic(None, unscored=unscored, note=f"{which} {what} with a row to be forgotten")
    found = difference(near, far, resampling)
    return Statistic(*found, len(near) + len(far), unscored, f"{len(near)} neighbours, {len(far)} other rows")


def _answers(table: pa.Table) -> list[tuple[int, ...] | None]:
    """The answer's tokens of every row; None where it has none."""
    lengths = table.column("answer_tokens").to_pylist()
    rows = zip(table.column("token_ids").to_pylist(), lengths, strict=True)
    return [tuple(ids[:length]) if length else None for ids, length in rows]


def _first(table: pa.Table, values: list) -> NDArray[np.object_]:
    """[examples]: the value of each example's first row."""
    found: dict[str, object] = {}
    for name, value in zip(table.column("example_id").to_pylist(), values, strict=True):
        found.setdefault(name, value)
    ordered = np.empty(len(example_ids(table)), dtype=object)
    ordered[:] = [found[name] for name in example_ids(table)]
    return ordered
