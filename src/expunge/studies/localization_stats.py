"""What `localization` computes from its looks: AUES, MU95, and what n paired differences can and can't tell. No torch.

A mean difference that is not significant is no equality. Beside the p of Student's paired test stand the smallest
difference that so many seeds could have found, and two one-sided tests for equivalence (TOST, Schuirmann 1987).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expunge.metrics.base import Resampling, bootstrap_interval
from expunge.report.calibration_record import TIE, envelope_area
from expunge.studies.localization_record import Look
from expunge.studies.rules import spread

#: Level of every test, and the power by which a difference counts as one that could have been found.
LEVEL, POWER = 0.05, 0.8
#: Part of the start's retain strength at which forget quality is read.
SHARE = 0.95

#: better, worse: the 95% interval lies to one side of 0; slight: it does, and inside the margin all the same; alike:
#: inside the margin by TOST; open: nothing is shown; none: a test needs two pairs that differ.
State = Literal["better", "worse", "slight", "alike", "open", "none"]

#: What is read off a look as retain strength.
Kept = Callable[[Look], float | None]


# ------------------------------------------------------------ one run


def run_aues(looks: Sequence[Look], kept: Kept = lambda look: look.retain) -> float | None:
    """∫₀¹ max{FS : RS ≥ τ} dτ over the looks, FS = 1 − forget (arXiv:2505.16252, as the area of the envelope).

    None without a look that has both strengths.
    """
    return envelope_area(_traced(looks, kept))


def envelope(looks: Sequence[Look], taus: Sequence[float], kept: Kept = lambda look: look.retain) -> list[float]:
    """The curve whose area `run_aues` is: max{FS : RS ≥ τ} at each τ, 0 beyond every look; empty without looks."""
    pairs = _traced(looks, kept)
    return [max((value for reach, value in pairs if reach >= tau - TIE), default=0.0) for tau in taus if pairs]


def _traced(looks: Sequence[Look], kept: Kept) -> list[tuple[float, float]]:
    """(RS, FS) of the looks that have both."""
    pairs = [(reach, 1 - look.forget) for look in looks if (reach := kept(look)) is not None]
    return [(min(1.0, reach), value) for reach, value in pairs if math.isfinite(reach + value)]


def matched_quality(looks: Sequence[Look], share: float = SHARE) -> float | None:
    """MU95: log10 p of forget quality where retain strength first falls to `share` of the first look's.

    Linear in retain strength between the two looks around that place. None if it is never reached, or has no quality.
    """
    ordered = sorted(looks, key=lambda look: look.step)
    if not ordered or not ordered[0].retain > 0:
        return None
    level = share * ordered[0].retain
    for before, after in itertools.pairwise(ordered):
        if after.retain <= level + TIE:
            fallen = before.retain - after.retain
            part = (before.retain - level) / fallen if fallen > TIE else 1.0
            found = before.forget_quality + part * (after.forget_quality - before.forget_quality)
            return found if math.isfinite(found) else None
    return None


# ------------------------------------------------------------ differences of pairs


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, one per seed, and what they tell of their mean. What can't be had is None.

    `low`, `high`: Student's 95% interval, by which everything is judged. `boot_low`, `boot_high`: percentile interval
    of the means of pairs drawn anew, which is too narrow for a handful of seeds. `p`: two-sided paired t-test.
    `detectable`: the smallest true difference that a test of so many pairs with this deviation finds with 80% power.
    `bound`: the smallest margin inside which TOST would have put the difference; `tost`: its p for `margin`.
    """

    differences: Mapping[int, float]
    margin: float | None = None
    mean: float | None = None
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    boot_low: float | None = None
    boot_high: float | None = None
    p: float | None = None
    detectable: float | None = None
    bound: float | None = None
    tost: float | None = None

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.differences)

    @property
    def tied(self) -> bool:
        """Whether several pairs have one and the same difference, which no test can be made of."""
        return self.n > 1 and self.p is None

    @property
    def equivalent(self) -> bool:
        """Whether both one-sided tests put the difference inside the margin."""
        return self.tost is not None and self.tost < LEVEL

    @property
    def state(self) -> State:
        """What is shown, where a difference above 0 is for the better."""
        if self.low is None or self.high is None:
            return "none"
        if self.low > 0 or self.high < 0:
            return "slight" if self.equivalent else "better" if self.low > 0 else "worse"
        return "alike" if self.equivalent else "open"


def paired(
    differences: Mapping[int, float], margin: float | None = None, resampling: Resampling = Resampling()
) -> Paired:
    """Everything about the mean of differences, seed → difference; those that are not finite are left out."""
    from scipy import stats  # imported on use: a list of studies needs none of it

    known = {seed: value for seed, value in differences.items() if math.isfinite(value)}
    if not known:
        return Paired(known, margin)
    values, n = np.array(list(known.values()), dtype=np.float64), len(known)
    mean, deviation = spread(values.tolist())
    if deviation is None or deviation <= TIE * max(1.0, abs(mean)):
        return Paired(known, margin, mean, deviation)
    error, free = deviation / math.sqrt(n), n - 1
    half, narrow = (float(stats.t.ppf(1 - level, free)) * error for level in (LEVEL / 2, LEVEL))
    boot_low, boot_high = bootstrap_interval(values, resampling.count, resampling.seed)
    tost = None
    if margin is not None:
        tost = float(max(stats.t.sf((mean + margin) / error, free), stats.t.cdf((mean - margin) / error, free)))
    return Paired(
        known,
        margin,
        mean,
        deviation,
        mean - half,
        mean + half,
        boot_low,
        boot_high,
        p=float(2 * stats.t.sf(abs(mean) / error, free)),
        detectable=detectable_difference(deviation, n),
        bound=abs(mean) + narrow,
        tost=tost,
    )


def power(difference: float, deviation: float, n: int) -> float:
    """Probability that the two-sided paired t-test at 5% finds a true difference in n pairs of that deviation."""
    from scipy import integrate, special, stats

    free, shift = n - 1, difference * math.sqrt(n) / deviation
    edge = float(stats.t.ppf(1 - LEVEL / 2, free))

    def found(ratio: float) -> float:
        """Density of the ratio of the pairs' own deviation to the true one, times the chance to be found with it."""
        density = 2 * free * ratio * stats.chi2.pdf(free * ratio * ratio, free)
        return float(density * (special.ndtr(shift - edge * ratio) + special.ndtr(-shift - edge * ratio)))

    # scipy's non-central t is NaN for two pairs and a large shift
    width = 1 / math.sqrt(free)
    return float(integrate.quad(found, 0, 1 + 12 * width, points=[min(1.0, shift / edge)], limit=200)[0])


def detectable_difference(deviation: float, n: int) -> float | None:
    """The smallest true mean difference that n pairs of that deviation find with 80% power; None below two pairs."""
    return _needed_shift(n) * deviation / math.sqrt(n) if n > 1 and deviation > 0 else None


@functools.cache
def _needed_shift(n: int) -> float:
    """The same in standard errors of the mean: 16 for two pairs, 3.8 for five; it tends to 2.8."""
    from scipy import optimize

    return float(optimize.brentq(lambda shift: power(shift / math.sqrt(n), 1.0, n) - POWER, 0.5, 40.0))


def holm(ps: Mapping[str, float | None]) -> dict[str, float | None]:
    """p values corrected for there being several of them (Holm 1979); None stays None and counts for nothing."""
    known = sorted((p, name) for name, p in ps.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(ps)
    largest = 0.0
    for place, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        corrected[name] = largest
    return corrected
