"""Whether the truth ratios of the forget set could be those of a model that never saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import Resampling, Statistic, Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.truth_ratio import NEEDS, truth_ratio
from expunge.recipe.conventions import EXPUNGE, Convention

#: of this variant, then of the reference
_NEEDS = (*NEEDS, *(f"reference@{need}" for need in NEEDS))
_FEW = 100
_CHUNK = 8_000_000
_SETTINGS: dict[str, Any] = {
    "needs": _NEEDS,
    "paper": "arXiv:2401.06121",
    "roles": ("forget",),
    "anchors": False,
    "per_example": False,
}


@dataclass(frozen=True)
class Comparison:
    """Truth ratios [n] of the rows that both models score, and the two-sample Kolmogorov–Smirnov test of them."""

    values: Values
    reference: Values
    unscored: int
    distance: float  # D, largest distance of the two distribution functions; NaN without rows
    p: float

    @property
    def n(self) -> int:
        """Rows of each sample."""
        return len(self.values)

    @property
    def log10_p(self) -> float:
        """log10 p, also where p is below the smallest float64; NaN without rows."""
        if not self.n:
            return math.nan
        return math.log10(self.p) if self.p > 0 else _log10_p(self.distance, self.n)

    def statistic(self, value: float, low: float | None = None, high: float | None = None, note: str = "") -> Statistic:
        """One of the test's numbers, with what limits it."""
        if not self.n:
            return Statistic(None, unscored=self.unscored, note="no row has a truth ratio under both models")
        few = f"few rows ({self.n}): the test shows large differences only" if self.n < _FEW else ""
        return Statistic(value, low, high, self.n, self.unscored, "; ".join(filter(None, (note, few))))


@metric(
    "forget_quality",
    summary="p of a KS test between truth ratios of this model and of the reference; 1: they can't be told apart",
    range=(0, 1),
    unit="p-value",
    learnt="low",
    **_SETTINGS,
)
def forget_quality(*tables: pa.Table, convention: Convention = EXPUNGE) -> Statistic:
    """TOFU's forget quality. Models that talk gibberish can reach high values: read it beside utility and fluency."""
    found = compared(*tables, convention=convention)
    return found.statistic(found.p)


@metric(
    "forget_quality_log10",
    summary="log10 of forget quality, for what is far below 0.05",
    range=(-np.inf, 0),
    unit="log10 p",
    learnt="low",
    **_SETTINGS,
)
def forget_quality_log10(*tables: pa.Table, convention: Convention = EXPUNGE) -> Statistic:
    """log10 p of the same test; finite where p underflows."""
    found = compared(*tables, convention=convention)
    return found.statistic(found.log10_p)


@metric(
    "forget_quality_ks",
    summary="D: largest distance between the distributions of truth ratios of this model and of the reference",
    range=(0, 1),
    unit="difference of two distribution functions",
    learnt="high",
    **_SETTINGS,
)
def forget_quality_ks(
    *tables: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()
) -> Statistic:
    """D, ± what two samples of one distribution reach in 95% of permutations. Unlike p, it does not shrink with n.

    |D − true distance| is at most the largest error of the difference of the two empirical functions, which behaves
    like D of two samples of one distribution.
    """
    found = compared(*tables, convention=convention)
    if not found.n:
        return found.statistic(found.distance)
    noise = permutation_noise(found.values, found.reference, resampling)
    low, high = max(0.0, found.distance - noise), min(1.0, found.distance + noise)
    return found.statistic(found.distance, low, high, f"chance alone stays below {noise:.3f} in 95% of permutations")


def compared(*tables: pa.Table, convention: Convention = EXPUNGE) -> Comparison:
    """The test between two variants; `tables` are those of the first, then those of the reference.

    Rows that one of the two does not score are left out of both samples, so that both are about the same rows.
    """
    from scipy.stats import ks_2samp  # imported on use: lists of metrics need none of it

    own, theirs = tables[: len(NEEDS)], tables[len(NEEDS) :]
    values = truth_ratio(*own, convention=convention)
    reference = Examples.of(own[0]).align(truth_ratio(*theirs, convention=convention), Examples.of(theirs[0]))
    both = ~np.isnan(values) & ~np.isnan(reference)
    unscored = int(len(both) - both.sum())
    if not both.any():
        return Comparison(values[both], reference[both], unscored, math.nan, math.nan)
    test = ks_2samp(values[both], reference[both])
    return Comparison(values[both], reference[both], unscored, float(test.statistic), float(test.pvalue))


def permutation_noise(values: Values, reference: Values, resampling: Resampling, level: float = 0.95) -> float:
    """The `level` quantile of D when which of the two samples [n] a value came from is drawn anew."""
    n = len(values)
    pooled = np.sort(np.concatenate([values, reference]))
    ends = np.flatnonzero(np.append(pooled[1:] != pooled[:-1], True))  # ties step together
    labels = np.repeat(np.array([1, -1], dtype=np.int32), n)
    generator = np.random.default_rng(resampling.seed)
    found: list[NDArray[np.float64]] = []
    step = max(1, _CHUNK // (2 * n))
    for start in range(0, resampling.count, step):
        rows = min(step, resampling.count - start)
        drawn = generator.permuted(np.broadcast_to(labels, (rows, 2 * n)), axis=1)
        found.append(np.abs(np.cumsum(drawn, axis=1)[:, ends]).max(axis=1) / n)
    return float(np.quantile(np.concatenate(found), level))


def _log10_p(distance: float, n: int) -> float:
    """log10 of P(D ≥ distance) for two samples of n: the reflection series 2 Σ (−1)^(j−1) C(2n, n − jh) / C(2n, n).

    h = n · distance. Where p underflows, the second term is smaller than the first by as much, and plays no part.
    """
    h = round(distance * n)
    choices = [math.lgamma(2 * n + 1) - math.lgamma(n - k + 1) - math.lgamma(n + k + 1) for k in (h, 0)]
    return (math.log(2) + choices[0] - choices[1]) / math.log(10)
