"""Calibration as functions: the search, the τ-curve, and strength per example."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from expunge.data.example import Example
from expunge.errors import UserError
from expunge.metrics.base import Resampling
from expunge.pipeline.calibrate import (
    Settings,
    calibrated,
    search,
)
from expunge.pipeline.calibration_passes import CalibrationRows, Passes, strengths
from expunge.report.calibration_record import (
    CalibrationPoint,
    area_under,
    aues,
    tau_curve,
)
from metric_tables import scores_table

# ---------------------------------------------------------------- the search


class Counted:
    """A strength as a function of α, and how often it was asked."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function, self.asked = function, []

    def __call__(self, alpha: float) -> float:
        self.asked.append(alpha)
        return self.function(alpha)


def test_any_monotone_strength_is_searched_in_eight_passes():
    draw = random.Random(0)
    edges = [number / 1000 for number in range(1001)] + [draw.random() for _ in range(2000)]
    for edge in edges:  # a step of any place is the hardest monotone function of a threshold
        strength = Counted(lambda alpha, edge=edge: float(alpha <= edge))
        found = search(strength, 0.5, 0.01)
        assert len(strength.asked) <= 8
        assert len(set(strength.asked)) == len(strength.asked)
        assert strength.asked[0] == 1
        assert found <= edge < found + 0.01 + 1e-9 or found == 1 == edge


@pytest.mark.parametrize(
    ("strength", "edge"),
    [
        (lambda alpha: 1 - alpha, lambda least: 1 - least),
        (lambda alpha: 1 - alpha**2, lambda least: (1 - least) ** 0.5),
        (lambda alpha: (1 - alpha) ** 3, lambda least: 1 - least ** (1 / 3)),
        (lambda alpha: np.exp(-5 * alpha), lambda least: min(1.0, -np.log(least) / 5)),
    ],
)
@pytest.mark.parametrize("least", [0.05, 0.4, 0.6, 0.9, 0.95])
@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.001])
def test_closed_forms(strength, edge, least, epsilon):
    found = search(strength, least, epsilon)
    assert edge(least) - epsilon <= found <= edge(least) + 1e-9


def test_ends():
    everything, nothing = Counted(lambda alpha: 1.0), Counted(lambda alpha: 0.0)
    assert search(everything, 0.95, 0.01) == 1
    assert everything.asked == [1]
    assert search(nothing, 0.95, 0.01) == 0
    # a threshold that the numbers just reach is reached, whatever their last digits
    assert search(lambda alpha: 0.1 + 0.2 if alpha <= 0.32 else 0.0, 0.3, 0.01) == pytest.approx(0.32, abs=0.011)


def test_an_island_above_is_found_by_the_scan():
    assert search(lambda alpha: float(alpha < 0.1 or 0.6 < alpha < 0.7), 0.5, 0.01) == pytest.approx(0.7, abs=0.011)


# ---------------------------------------------------------------- the calibration, over functions


class Functions(Passes):
    """Passes of a model whose strengths are functions of α, the same for each of four rows."""

    def __init__(self, retain: Callable[[float], float], forget: Callable[[float], float]) -> None:
        examples = [Example(str(number), "p", "a") for number in range(4)]
        rows: Any = [type("Row", (), {"example": example})() for example in examples]
        super().__init__(lambda: pytest.fail("no model"), CalibrationRows(rows, rows))
        self.functions = {"retain": retain, "forget": forget}

    def values(self, alpha, kind):
        self.known[alpha, kind] = np.full(4, self.functions[kind](alpha))
        return super().values(alpha, kind)


def over(retain, forget=lambda alpha: 1 - alpha, **settings):
    return calibrated(Functions(retain, forget), Settings(**settings), Resampling(100, 0), "target", "unlearned")


def test_what_is_found_is_said():
    found = over(lambda alpha: 0.8 * (1 - alpha), keep=0.9)
    assert found.alpha == pytest.approx(0.1, abs=0.011)
    assert found.threshold == pytest.approx(0.72)
    assert found.passes.search == 8
    assert found.calibrated.forget == pytest.approx(1 - found.alpha)
    assert {entry["variant"] for entry in found.records} == {"target", "calibrated", "unlearned"}
    assert [point.alpha for point in found.points] == sorted(point.alpha for point in found.points)
    assert "keeps 9" in found.answer
    assert found.notes == []
    # retain = 0.8 (1 − α), forget = 1 − α: at τ all mixtures with α ≤ 1 − τ keep enough, and the largest forgets most
    for point in found.curve:
        reached = [one.alpha for one in found.points if one.forget is not None and 1 - one.alpha >= point.tau - 1e-9]
        assert point.alpha == max(reached)
    assert over(lambda alpha: 1.0).answer.endswith("nothing is mixed")
    assert "removes nothing" in over(lambda alpha: float(alpha == 0)).answer


def test_the_curve_finds_what_the_search_does_not_see():
    def island(alpha):
        return float(alpha < 0.2 or 0.45 < alpha < 0.55)

    blind, seeing = over(island, curve=False), over(island)
    assert blind.alpha == pytest.approx(0.2, abs=0.011)
    assert seeing.alpha == pytest.approx(0.55, abs=0.011)
    assert seeing.alpha < 0.55
    assert any("searched again above" in note for note in seeing.notes)
    assert any("below α* it is too low" in note for note in seeing.notes)
    assert seeing.passes.search == blind.passes.search == 8
    assert blind.curve == []
    assert blind.area is None


def test_the_curve_takes_over_passes_that_are_near():
    found = over(lambda alpha: 1 - alpha / 2, keep=0.5)
    assert found.passes.retain == 1 + 7  # α = 1 keeps enough: one pass of the search, seven of the grid
    assert found.passes.forget == 8
    assert found.passes.target == 2


def test_a_target_that_knows_nothing_is_refused():
    with pytest.raises(UserError, match="nothing to keep"):
        over(lambda alpha: 0.0)


@pytest.mark.parametrize("settings", [{"keep": 0}, {"keep": 1.1}, {"epsilon": 0}, {"epsilon": 0.7}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError):
        Settings(**settings).check()


# ---------------------------------------------------------------- the curve


def random_points(seed: int) -> list[CalibrationPoint]:
    draw = np.random.default_rng(seed)
    alphas = [0.0, *sorted(draw.random(6)), 1.0]
    return [
        CalibrationPoint(alpha=alpha, retain=0.9 if alpha == 0 else draw.random(), forget=draw.random())
        for alpha in alphas
    ]


@pytest.mark.parametrize("seed", range(20))
def test_areas_are_those_of_the_curves(seed):
    points = random_points(seed)
    taus = (np.arange(4000) + 0.5) / 4000
    curve = tau_curve(points, taus)
    assert len(curve) == len(taus)  # the target keeps all of itself
    assert area_under(points) == pytest.approx(np.mean([point.forget for point in curve]), abs=2e-3)
    assert [point.forget for point in curve] == sorted(point.forget for point in curve)
    fronts = [max((1 - one.forget for one in points if one.retain >= tau), default=0.0) for tau in taus]
    assert aues(points) == pytest.approx(np.mean(fronts), abs=2e-3)


def test_area_of_one_step():
    points = [CalibrationPoint(alpha=0, retain=0.8, forget=1), CalibrationPoint(alpha=1, retain=0.6, forget=0.2)]
    assert area_under(points) == pytest.approx(0.75 * 0.2 + 0.25 * 1)
    assert aues(points) == pytest.approx(0.6 * 0.8)
    assert area_under([*points[1:], CalibrationPoint(alpha=0, retain=0.8)]) is None


# ---------------------------------------------------------------- strength per example


def test_candidates_are_averaged_and_nan_is_what_it_means():
    sure, nan = [-0.1, -0.1], float("nan")
    table = scores_table(
        ("11", sure), ("10", sure), ("01", sure), ("", []), ("1", [nan]), example_id=["a", "b", "a", "c", "d"]
    )
    np.testing.assert_allclose(strengths(table), [0.75, 0, np.nan, np.nan])
    np.testing.assert_allclose(strengths(table, broken=0.0), [0.75, 0, np.nan, 0])
