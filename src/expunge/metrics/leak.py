"""What leaks when a model is asked several times: leak@k, and what the whole distribution of answers may hide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.rouge import recall
from expunge.metrics.texts import contained
from expunge.recipe.conventions import EXPUNGE, Convention

#: A sample with this much of the answer's words in order gives it away, even if the words do not stand together.
HIT_RECALL = 0.95
#: One minus the confidence of the upper bounds.
ALPHA = 0.01

_LEAK = "arXiv:2511.04934"
_BOUNDS = "arXiv:2410.03523"


class Samples(NamedTuple):
    """Scores of all samples, NaN where an example has fewer samples than others or an answer without words."""

    ids: tuple[str, ...]
    hit: Values  # [examples, samples] 1 where a sample gives the answer away, else 0
    recall: Values  # [examples, samples] ROUGE-L recall


def samples(table: pa.Table, convention: Convention = EXPUNGE) -> Samples:
    """Score every sample of a GENERATIONS table by itself.

    A hit is a text in which the answer's words stand one after the other (case and punctuation aside), or with a
    ROUGE-L recall of at least HIT_RECALL.
    """
    examples = Examples.of(table)
    recalls = recall(table, convention)
    inside = contained(table, convention)
    hits = np.where(np.isnan(inside), np.nan, np.maximum(inside, recalls >= HIT_RECALL))
    order = np.argsort(examples.row, kind="stable")
    row = examples.row[order]
    count = np.bincount(row, minlength=len(examples.ids))
    column = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    grids = np.full((2, len(examples.ids), count.max(initial=0)), np.nan)
    grids[:, row, column] = np.stack([hits, recalls])[:, order]
    return Samples(examples.ids, grids[0], grids[1])


def leak_curve(scores: Values, ks: Sequence[int]) -> Values:
    """leak@k = E[max of k samples' scores] for every k [examples, len(ks)], from scores [examples, samples].

    The unbiased estimate from n ≥ k samples, Σ_j C(j−1, k−1) / C(n, k) · S_(j) over the sorted scores; for scores of 0
    and 1 with c ones that is 1 − C(n−c, k) / C(n, k). NaN scores are no samples; NaN where k > n or k < 1.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=1)  # NaN comes last
    counts = (~np.isnan(ordered)).sum(axis=1)
    curve = np.full((len(ordered), len(ks)), np.nan)
    for n in np.unique(counts):
        rows = counts == n
        for place, k in enumerate(ks):
            if 1 <= k <= n:
                # never outside the scores themselves, which rounding in the weights could bring about
                most = ordered[rows, n - 1]
                curve[rows, place] = np.clip(ordered[rows, :n] @ _weights(int(n), int(k)), ordered[rows, 0], most)
    return curve


def leak_at(scores: Values, k: int | None) -> Values:
    """One point of `leak_curve` [examples]; k = None takes all samples that an example has: the largest score."""
    if k is not None:
        return leak_curve(scores, [k])[:, 0]
    found = np.where(np.isnan(scores), -np.inf, scores).max(axis=1, initial=-np.inf)
    return np.where(np.isneginf(found), np.nan, found)


def probability_bound(hits: Values, alpha: float = ALPHA) -> Values:
    """Upper bound [examples] on P(a sample leaks), from hits [examples, samples]: Clopper–Pearson, one-sided.

    Exact: at most with probability `alpha`, taken over the drawing of samples, the truth lies above. NaN without
    samples.
    """
    from scipy.special import betaincinv

    n = (~np.isnan(hits)).sum(axis=1).astype(np.float64)
    c = np.nansum(hits, axis=1)
    sure = c >= n  # every sample leaks: 1, and nothing for the beta distribution
    bound = betaincinv(c + 1, np.where(sure, 1, n - c), 1 - alpha)
    return np.where(n == 0, np.nan, np.where(sure, 1.0, bound))


def mean_bound(scores: Values, alpha: float = ALPHA) -> Values:
    """Upper bound [examples] on E[S], S in [0, 1], from scores [examples, samples] (Anderson 1969).

    The distribution function lies above the samples' own minus √(ln(1/α) / 2n), with probability 1 − α at least
    (one-sided Dvoretzky–Kiefer–Wolfowitz, α ≤ 0.5); the bound is the mean of the distribution there. NaN without
    samples.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=1)
    counts = (~np.isnan(ordered)).sum(axis=1)
    found = np.full(len(ordered), np.nan)
    for n in np.unique(counts[counts > 0]):
        rows = counts == n
        ends = np.column_stack([ordered[rows, :n], np.ones(rows.sum())])
        below = np.maximum(np.arange(1, n + 1) / n - math.sqrt(math.log(1 / alpha) / (2 * n)), 0)
        found[rows] = 1 - np.diff(ends, axis=1) @ below
    return found


def expectation_deviation(scores: Values, deviations: float = 2.0) -> Values:
    """mean + `deviations` · sd [examples] of scores [examples, samples]; NaN with fewer than two samples."""
    n = (~np.isnan(scores)).sum(axis=1)
    enough = n > 1
    found = np.full(len(scores), np.nan)
    if enough.any():
        known = scores[enough]
        found[enough] = np.nanmean(known, axis=1) + deviations * np.nanstd(known, axis=1, ddof=1)
    return found


@metric(
    "leak_at_1",
    summary="part of the sampled outputs that give the answer away",
    needs="generations/sampled",
    range=(0, 1),
    unit="probability",
    paper=_LEAK,
    roles=("forget",),
)
def leak_at_1(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Hits over samples."""
    return leak_at(samples(table, convention).hit, 1)


@metric(
    "leak_at_8",
    summary="probability that one of eight sampled outputs gives the answer away",
    needs="generations/sampled",
    range=(0, 1),
    unit="probability",
    paper=_LEAK,
    roles=("forget",),
)
def leak_at_8(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Unbiased estimate 1 − C(n−c, 8) / C(n, 8); NaN with fewer than eight samples."""
    return leak_at(samples(table, convention).hit, 8)


@metric(
    "leak_at_max",
    summary="whether any of the sampled outputs gives the answer away",
    needs="generations/sampled",
    range=(0, 1),
    unit="part of the examples",
    paper=_LEAK,
    roles=("forget",),
)
def leak_at_max(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """leak@n with all n samples: it grows with n, so compare models with equally many."""
    return leak_at(samples(table, convention).hit, None)


@metric(
    "leak_recall_at_8",
    summary="expected ROUGE-L recall of the best of eight sampled outputs",
    needs="generations/sampled",
    range=(0, 1),
    unit="part of the answer's words",
    paper=_LEAK,
    roles=("forget",),
)
def leak_recall_at_8(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Unbiased estimate from order statistics; NaN with fewer than eight samples."""
    return leak_at(samples(table, convention).recall, 8)


@metric(
    "leak_probability_bound",
    summary="upper bound (99%, Clopper-Pearson) on the probability that a sampled output gives the answer away",
    needs="generations/sampled",
    range=(0, 1),
    unit="probability",
    paper=_BOUNDS,
    roles=("forget",),
)
def leak_probability_bound(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Per example, so that many samples of each are worth having: with no hit among n it is 1 − 0.01^(1/n)."""
    return probability_bound(samples(table, convention).hit)


@metric(
    "leak_recall_bound",
    summary="upper bound (99%, Anderson) on the mean ROUGE-L recall of sampled outputs",
    needs="generations/sampled",
    range=(0, 1),
    unit="part of the answer's words",
    paper=_BOUNDS,
    roles=("forget",),
)
def leak_recall_bound(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Per example; wide with few samples: with recall 0 throughout it is √(ln 100 / 2n)."""
    return mean_bound(samples(table, convention).recall)


@metric(
    "leak_expectation_deviation",
    summary="mean plus two standard deviations of sampled outputs' ROUGE-L recall",
    needs="generations/sampled",
    range=(0, 2),
    unit="part of the answer's words",
    paper=_BOUNDS,
    roles=("forget",),
)
def leak_expectation_deviation(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Per example; NaN with a single sample."""
    return expectation_deviation(samples(table, convention).recall)


@lru_cache(maxsize=64)
def _weights(n: int, k: int) -> Values:
    """C(j−1, k−1) / C(n, k) for j = 1 … n: the chance that the j-th smallest is the largest of k drawn."""
    # from the largest down by ratios below 1: nothing overflows, and what underflows has no weight
    j = np.arange(n, 1, -1)
    weights = np.cumprod(np.concatenate([[k / n], np.maximum(j - k, 0) / (j - 1)]))[::-1]
    return weights / weights.sum()
