"""Numbers made of numbers, for every room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

#: Below this extraction strength a target is said to hardly know the rows.
HARDLY = 0.2


def harmonic_mean(values: Iterable[float | None]) -> float | None:
    """Harmonic mean of values ≥ 0: 0 as soon as one is 0; None without values, or if one is None or NaN.

    Raises ValueError for a value below 0.
    """
    given: list[float] = []
    for value in values:
        if value is None or math.isnan(value):
            return None
        if value < 0:
            raise ValueError(f"harmonic mean of {value:g}: values are at least 0")
        given.append(value)
    if not given:
        return None
    return 0.0 if min(given) == 0 else len(given) / sum(1 / value for value in given)


def rate_for_size(rate: float, measured: float, parameters: float) -> float:
    """A learning rate found on a model of `measured` parameters, for one of another size, to two digits.

    Adam's best rate falls as 1 / width (arXiv:2203.03466), and parameters grow as width² at a given depth.
    """
    return float(f"{rate * math.sqrt(measured / parameters):.1e}")


def auc_error(members: int, others: int) -> float:
    """Standard error of the area under the ROC curve when nothing tells the two apart: that of the rank sum."""
    return math.sqrt((members + others + 1) / (12 * members * others))


def without_nan(value: Any) -> Any:
    """Data that JSON can hold: numbers that are not finite become None, keys text."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
