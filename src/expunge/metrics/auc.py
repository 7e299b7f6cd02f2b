"""Area under the ROC curve of two samples, and its draws: rank sums, no curve is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expunge.metrics.base import Resampling, Statistic, Values
from expunge.numbers import auc_error

#: Below this many rows of either kind, a note says how far from 0.5 chance alone leads.
FEW = 200
#: Draws held at once.
_CHUNK = 2_000_000


def placements(members: Values, others: Values) -> Values:
    """[members]: the part of the others (m, none NaN) that score higher, ties by half; their mean is the AUC.

    Scores are high for what looks *less* like a member, so 1 is a row that stands out among all that were never seen.
    The values of all members are the whole ROC curve: its height at a false positive rate f is the part ≥ 1 − f.
    """
    left, right = _ranks(members, others)
    return 1 - (left + right) / (2 * len(others))


def auc_statistic(members: Values, others: Values, resampling: Resampling) -> Statistic:
    """P(a member looks more like one than another row), ties by half, with a stratified bootstrap interval.

    NaN scores are unscored. `values` are the members' placements.
    """
    scored, against = members[~np.isnan(members)], others[~np.isnan(others)]
    unscored = len(members) - len(scored)
    values = np.full(len(members), np.nan)
    if not len(scored) or not len(against):
        missing = "holdout" if len(scored) else "forget"
        return Statistic(None, unscored=len(members), note=f"no {missing} row is scored", values=values)
    values[~np.isnan(members)] = placements(scored, against)
    value = float(np.nanmean(values))
    low, high = interval(value, resampled_aucs([(scored, against)], resampling)[0])
    return Statistic(value, low, high, len(scored), unscored, chance_note(len(scored), len(against)), values)


def resampled_aucs(pairs: Sequence[tuple[Values, Values]], resampling: Resampling) -> NDArray[np.float64]:
    """[pairs, draws]: AUC of rows drawn with replacement, members and others apart; the same rows for every pair.

    Draws depend on the seed and the numbers of rows alone. Empty where a sample has fewer than two rows.
    """
    n, m = (len(sample) for sample in pairs[0])
    if min(n, m) < 2:
        return np.empty((len(pairs), 0))
    orders = [np.argsort(others, kind="stable") for _, others in pairs]
    ranks = [_ranks(members, others) for members, others in pairs]
    generator = np.random.default_rng(resampling.seed)
    drawn = np.empty((len(pairs), resampling.count))
    step = max(1, _CHUNK // (n + m))
    for start in range(0, resampling.count, step):
        count = min(step, resampling.count - start)
        members, others = _multiplicities(generator, count, n), _multiplicities(generator, count, m)
        for index, (order, (left, right)) in enumerate(zip(orders, ranks, strict=True)):
            below = np.zeros((count, m + 1), dtype=np.int64)
            np.cumsum(others[:, order], axis=1, out=below[:, 1:])
            lower = (members * (below[:, left] + below[:, right])).sum(axis=1)
            drawn[index, start : start + count] = 1 - lower / (2 * n * m)
    return drawn


def interval(value: float, draws: NDArray[np.float64], level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of draws, widened to `value` (clipped draws can lie to one side of it); None without any."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return None, None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), value), max(float(high), value)


def chance_note(n: int, m: int) -> str:
    """What chance does to an AUC of so few rows: its standard error at truth 0.5."""
    if min(n, m) >= FEW:
        return ""
    return f"{n} + {m} rows: standard error {auc_error(n, m):.3f} even if nothing is known"


def _ranks(members: Values, others: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[members]: how many others are lower, and how many are not higher."""
    ordered = np.sort(others)
    return np.searchsorted(ordered, members, side="left"), np.searchsorted(ordered, members, side="right")


def _multiplicities(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """[count, size]: how often each row was drawn."""
    draws = generator.integers(0, size, size=(count, size), dtype=np.int64)
    draws += np.arange(count)[:, None] * size
    return np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)
