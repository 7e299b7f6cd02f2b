"""The numbers of `localization`: areas and matched quality in closed form, tests against scipy, power by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from expunge.metrics.base import Resampling
from expunge.report.calibration_record import CalibrationPoint, aues
from expunge.studies.localization_record import Look
from expunge.studies.localization_stats import (
    LEVEL,
    POWER,
    detectable_difference,
    envelope,
    holm,
    matched_quality,
    paired,
    power,
    run_aues,
)


def looks(*points: tuple[float, float], quality: tuple[float, ...] = ()) -> list[Look]:
    """Looks of (forget, retain), one step apart."""
    return [
        Look(step, forget, retain, None, quality[step] if quality else 0.0)
        for step, (forget, retain) in enumerate(points)
    ]


# ------------------------------------------------------------ areas


@pytest.mark.parametrize(
    ("given", "area"),
    [
        ([], None),
        ([(1.0, 0.9)], 0.0),  # nothing forgotten
        ([(0.0, 1.0)], 1.0),  # ideal
        ([(1.0, 0.8), (0.2, 0.6)], 0.6 * 0.8),
        ([(1.0, 0.8), (0.5, 0.7), (0.2, 0.6)], 0.1 * 0.5 + 0.6 * 0.8),
        ([(1.0, 0.8), (0.2, 0.6), (0.5, 0.4)], 0.6 * 0.8),  # worse on both sides: inside the envelope
        ([(0.2, 0.6), (1.0, 0.8)], 0.6 * 0.8),  # in whatever order
        ([(0.2, 0.6), (0.2, 0.6)], 0.6 * 0.8),
        ([(0.2, 0.6), (math.nan, 0.9)], 0.6 * 0.8),
        ([(math.nan, math.nan)], None),
        ([(0.5, 1.2)], 0.5),  # τ ends at 1
    ],
)
def test_aues_in_closed_form(given: list[tuple[float, float]], area: float | None) -> None:
    assert run_aues(looks(*given)) == (None if area is None else pytest.approx(area))


@pytest.mark.parametrize("seed", range(10))
def test_aues_is_the_area_below_the_envelope_and_the_one_of_calibrations(seed: int) -> None:
    chance = np.random.default_rng(seed)
    points = [(float(forget), float(retain)) for forget, retain in chance.random((6, 2))]
    taus = (np.arange(4000) + 0.5) / 4000
    curve = envelope(looks(*points), taus)
    assert curve == sorted(curve, reverse=True)
    assert run_aues(looks(*points)) == pytest.approx(np.mean(curve), abs=1e-3)
    calibrated = [CalibrationPoint(alpha=place / 5, retain=r, forget=f) for place, (f, r) in enumerate(points)]
    assert run_aues(looks(*points)) == pytest.approx(aues(calibrated))


def test_aues_on_other_rows_leaves_out_looks_without_them() -> None:
    given = [Look(0, 1.0, 0.9, 0.5, 0.0), Look(1, 0.5, 0.9, None, 0.0), Look(2, 0.4, 0.9, 0.4, 0.0)]
    assert run_aues(given, lambda look: look.unseen) == pytest.approx(0.4 * 0.6)
    assert run_aues(given[1:2], lambda look: look.unseen) is None


# ------------------------------------------------------------ matched quality


@pytest.mark.parametrize(
    ("retain", "quality", "found"),
    [
        ((1.0, 0.9), (-8.0, -4.0), -6.0),  # halfway
        ((0.8, 0.78, 0.74), (-9.0, -5.0, -1.0), -3.0),  # 0.76 is halfway between the last two
        ((0.8, 0.76), (-9.0, -5.0), -5.0),  # just reached
        ((0.8, 0.79, 0.79), (-9.0, -5.0, -1.0), None),  # never
        ((0.8, 0.9, 0.7), (-9.0, -5.0, -1.0), -5.0 + 4 * 0.14 / 0.2),  # retain rises first
        ((0.8, 0.7, 0.9), (-9.0, -5.0, -1.0), -9.0 + 4 * 0.04 / 0.1),  # the first fall counts
        ((0.0, 0.0), (-9.0, -5.0), None),  # there was nothing to keep
        ((1.0, 0.9), (-8.0, math.nan), None),
        ((1.0, 0.9), (-math.inf, -4.0), None),
        ((1.0,), (-8.0,), None),
        ((), (), None),
        ((math.nan, 0.5), (-1.0, -2.0), None),
    ],
)
def test_quality_is_read_where_retain_has_fallen(retain: tuple, quality: tuple, found: float | None) -> None:
    given = looks(*((0.5, value) for value in retain), quality=quality)
    wanted = None if found is None else pytest.approx(found)
    assert matched_quality(given) == wanted
    assert matched_quality(given[::-1]) == wanted  # steps order them


# ------------------------------------------------------------ pairs


def pairs_of(n: int, seed: int = 0, mean: float = 0.01, deviation: float = 0.015) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    one = chance.normal(0.5, 0.05, n)
    return one, one - chance.normal(mean, deviation, n)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_as_scipy_has_them(n: int, seed: int) -> None:
    one, two = pairs_of(n, seed)
    found = paired(dict(enumerate(one - two)), 0.03, Resampling(20_000, seed))
    oracle = stats.ttest_rel(one, two)
    interval = oracle.confidence_interval(0.95)
    assert found.n == n
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    sides = [
        stats.ttest_1samp(one - two, -0.03, alternative="greater").pvalue,
        stats.ttest_1samp(one - two, 0.03, alternative="less").pvalue,
    ]
    assert found.tost == pytest.approx(max(sides))
    inner = oracle.confidence_interval(0.90)
    assert found.bound == pytest.approx(max(abs(inner.low), abs(inner.high)))
    drawn = stats.bootstrap((one - two,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    spread = float(np.std(one - two))
    assert found.boot_low == pytest.approx(drawn.confidence_interval.low, abs=0.1 * spread)
    assert found.boot_high == pytest.approx(drawn.confidence_interval.high, abs=0.1 * spread)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_the_smallest_margin_that_holds(seed: int) -> None:
    one, two = pairs_of(5, seed)
    differences = dict(enumerate(one - two))
    bound = paired(differences).bound
    assert bound is not None
    assert paired(differences, bound * 1.001).equivalent
    assert not paired(differences, bound * 0.999).equivalent
    assert not paired(differences).equivalent


@pytest.mark.parametrize(
    ("differences", "n", "mean", "tied"),
    [
        ({}, 0, None, False),
        ({1: math.nan}, 0, None, False),
        ({1: 0.02}, 1, 0.02, False),
        ({1: 0.02, 2: math.inf}, 1, 0.02, False),
        ({1: 0.0, 2: 0.0, 3: 0.0}, 3, 0.0, True),
        ({1: 0.3 - 0.1, 2: 0.4 - 0.2, 3: 0.2}, 3, 0.2, True),  # alike but for rounding
    ],
)
def test_what_can_not_be_tested_is_none_and_never_equal(
    differences: dict[int, float], n: int, mean: float | None, tied: bool
) -> None:
    found = paired(differences, 0.03)
    assert (found.n, found.tied) == (n, tied)
    assert found.mean == (None if mean is None else pytest.approx(mean))
    tests = (found.low, found.high, found.boot_low, found.boot_high, found.p, found.tost, found.detectable, found.bound)
    assert tests == (None,) * 8
    assert found.state == "none"
    assert not found.equivalent


@pytest.mark.parametrize(
    ("mean", "deviation", "margin", "state"),
    [
        (0.1, 0.01, 0.03, "better"),
        (-0.1, 0.01, 0.03, "worse"),
        (0.01, 0.002, 0.03, "slight"),
        (-0.01, 0.002, 0.03, "slight"),
        (0.001, 0.01, 0.03, "alike"),
        (0.001, 0.01, None, "open"),  # without a margin there is no equality
        (0.01, 0.05, 0.03, "open"),
    ],
)
def test_states(mean: float, deviation: float, margin: float | None, state: str) -> None:
    shape = np.array([-1.2, -0.4, 0.0, 0.4, 1.2])
    shape /= shape.std(ddof=1)
    assert paired(dict(enumerate(mean + deviation * shape)), margin).state == state


# ------------------------------------------------------------ what could have been found


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_four_in_five_tests_find_the_detectable_difference(n: int) -> None:
    deviation = 0.015
    difference = detectable_difference(deviation, n)
    assert difference is not None
    drawn = np.random.default_rng(n).normal(difference, deviation, (20_000, n))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < LEVEL
    assert found.mean() == pytest.approx(POWER, abs=0.01)
    none = stats.ttest_1samp(drawn - difference, 0.0, axis=1).pvalue < LEVEL
    assert power(0.0, deviation, n) == pytest.approx(LEVEL)
    assert none.mean() == pytest.approx(LEVEL, abs=0.006)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_power_is_that_of_the_non_central_t(n: int, shift: float) -> None:
    edge = stats.t.ppf(1 - LEVEL / 2, n - 1)
    oracle = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
    assert power(shift / math.sqrt(n), 1.0, n) == pytest.approx(oracle, abs=1e-6)


def test_detectable_differences_scale_and_shrink() -> None:
    assert detectable_difference(0.015, 1) is None
    assert detectable_difference(0.0, 5) is None
    sizes = [detectable_difference(0.015, n) or 0.0 for n in (2, 3, 5, 10, 100)]
    assert sizes == sorted(sizes, reverse=True)
    assert detectable_difference(0.03, 5) == pytest.approx(2 * sizes[2])
    assert sizes[2] == pytest.approx(0.025, abs=0.001)  # five seeds of the paper's deviation
    assert sizes[4] == pytest.approx(2.8 * 0.015 / 10, rel=0.02)


def test_equality_is_rarely_said_of_what_differs_by_the_margin() -> None:
    drawn = np.random.default_rng(0).normal(0.03, 0.015, (600, 5))
    said = np.mean([paired(dict(enumerate(row)), 0.03, Resampling(1)).equivalent for row in drawn])
    assert said < LEVEL + 0.03


# ------------------------------------------------------------ several tests


def test_holm() -> None:
    assert holm({}) == {}
    assert holm({"a": 0.04}) == {"a": 0.04}
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": None}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
