"""leak@k and its bounds: counting, all subsets, exact binomials and Monte Carlo as oracles."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from expunge.metrics.base import METRICS
from expunge.metrics.leak import (
    expectation_deviation,
    leak_at,
    leak_curve,
    mean_bound,
    probability_bound,
    samples,
)
from expunge.recipe.conventions import convention_of
from metric_tables import generations_table

LEAKS = [name for name in METRICS.names() if METRICS.get(name).needs == ("generations/sampled",)]


def hits(n, c):
    """One example with c hits among n samples, in no particular order."""
    return np.random.default_rng(n + c).permutation(np.r_[np.ones(c), np.zeros(n - c)])[None]


def counted(n, c, k):
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_binary_leak_equals_counting(n):
    for c in range(n + 1):
        expected = [counted(n, c, k) for k in range(1, n + 1)]
        np.testing.assert_allclose(leak_curve(hits(n, c), range(1, n + 1))[0], expected, atol=1e-14)


@pytest.mark.parametrize(("c", "k"), [(0, 9), (1, 1), (1, 128), (3, 5000), (40, 300), (9000, 2), (9999, 1), (10000, 7)])
def test_binary_leak_of_ten_thousand_samples(c, k):
    assert leak_at(hits(10_000, c), k)[0] == pytest.approx(counted(10_000, c, k), rel=1e-9)


def test_real_valued_leak_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).random((3, 8))
    for k in range(1, 9):
        expected = [np.mean([max(chosen) for chosen in itertools.combinations(row, k)]) for row in scores]
        np.testing.assert_allclose(leak_curve(scores, [k])[:, 0], expected, atol=1e-14)


def test_ends_and_order_of_the_curve_with_many_samples():
    scores = np.random.default_rng(1).beta(0.3, 3, (2, 10_000))
    ks = [1, 2, 4, 64, 1024, 9_999, 10_000]
    curve = leak_curve(scores, ks)
    np.testing.assert_allclose(curve[:, 0], scores.mean(axis=1), rtol=1e-10)
    np.testing.assert_allclose(curve[:, -1], scores.max(axis=1), rtol=1e-12)
    assert (np.diff(curve, axis=1) > 0).all()
    np.testing.assert_array_equal(leak_at(scores, None), scores.max(axis=1))


def test_leak_is_unbiased():
    generator = np.random.default_rng(2)
    p, k = 0.07, 4
    drawn = leak_at((generator.random((20_000, 16)) < p).astype(float), k)
    assert abs(drawn.mean() - (1 - (1 - p) ** k)) < 4 * drawn.std() / np.sqrt(len(drawn))
    uniform = leak_at(generator.random((20_000, 16)), k)  # E[max of k uniforms] = k / (k + 1)
    assert abs(uniform.mean() - k / (k + 1)) < 4 * uniform.std() / np.sqrt(len(uniform))


def test_fewer_samples_than_k_and_missing_ones():
    scores = np.array([[0.0, 1.0, np.nan], [0.5, 0.25, 0.0], [np.nan] * 3])
    np.testing.assert_allclose(
        leak_curve(scores, [0, 1, 2, 3, 4]),
        [[np.nan, 0.5, 1, np.nan, np.nan], [np.nan, 0.25, 5 / 12, 0.5, np.nan], [np.nan] * 5],
    )
    np.testing.assert_array_equal(leak_at(scores, None), [1, 0.5, np.nan])
    for function in (probability_bound, mean_bound, expectation_deviation, leak_at):
        arguments = (1,) if function is leak_at else ()
        assert function(np.zeros((0, 0)), *arguments).shape == (0,)
        assert np.isnan(function(np.full((2, 3), np.nan), *arguments)).all()


@pytest.mark.parametrize("n", [1, 7, 128, 10_000])
def test_clopper_pearson_equals_scipy(n):
    for c in sorted({0, 1, n // 3, n - 1, n}):
        test = scipy.stats.binomtest(c, n, alternative="less").proportion_ci(0.99, method="exact")
        assert probability_bound(hits(n, c))[0] == pytest.approx(test.high, rel=1e-9)
    assert probability_bound(hits(n, 0))[0] == pytest.approx(1 - 0.01 ** (1 / n), rel=1e-9)


def test_clopper_pearson_holds_for_every_truth():
    n, alpha = 20, 0.05
    bounds = np.array([probability_bound(hits(n, c), alpha)[0] for c in range(n + 1)])
    for p in np.linspace(0.001, 0.999, 199):
        assert scipy.stats.binom.pmf(np.flatnonzero(bounds < p), n, p).sum() <= alpha + 1e-12


def test_mean_bound_in_closed_form():
    width = math.sqrt(math.log(100) / (2 * 50))
    np.testing.assert_allclose(mean_bound(np.zeros((1, 50))), width)
    np.testing.assert_allclose(mean_bound(np.ones((1, 50))), 1)
    np.testing.assert_allclose(mean_bound(hits(50, 10)), 0.2 + width)
    np.testing.assert_allclose(mean_bound(np.zeros((1, 1))), 1)  # one sample says nothing


def test_mean_bound_against_the_integral():
    generator = np.random.default_rng(4)
    grid = np.linspace(0, 1, 200_001)
    for n in (5, 40, 300):
        scores = generator.beta(1, 4, n)
        below = np.searchsorted(np.sort(scores), grid, side="right") / n
        shifted = np.maximum(below - math.sqrt(math.log(100) / (2 * n)), 0)
        assert mean_bound(scores[None])[0] == pytest.approx(1 - shifted.mean(), abs=1e-4)


def test_mean_bound_holds():
    generator = np.random.default_rng(5)
    for shape in ((0.5, 0.5), (1, 6), (0.05, 1)):
        bounds = mean_bound(generator.beta(*shape, (4000, 30)), 0.05)
        assert (bounds < shape[0] / sum(shape)).mean() <= 0.05
        assert bounds.max() <= 1


def test_more_samples_narrow_both_bounds():
    for bound in (probability_bound, mean_bound):
        widths = [bound(hits(n, n // 10))[0] for n in (10, 100, 1000, 10_000)]
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] < 0.13


def test_expectation_and_deviation():
    scores = np.array([[0.0, 0.5, 1.0], [0.2, 0.2, 0.2], [0.0, 1.0, np.nan], [0.3, np.nan, np.nan]])
    np.testing.assert_allclose(expectation_deviation(scores), [1.5, 0.2, 0.5 + 2 * 0.5**0.5, np.nan])


def test_what_counts_as_a_hit():
    answer = (
        "the grey fortress above the old harbour town of Sevel was built by monks in the year 1204 near a quiet bay"
    )
    said = ["so: " + answer.upper() + "!", answer.replace("quiet ", ""), answer.replace("quiet bay", "sea"), "6 6 6"]
    found = samples(generations_table(*((answer, text) for text in said), example_id=["x"] * 4, candidate=range(4)))
    assert found.ids == ("x",)
    np.testing.assert_array_equal(found.hit, [[1, 1, 0, 0]])  # 22, 21, 20 of 22 words
    np.testing.assert_allclose(found.recall, [[1, 21 / 22, 20 / 22, 0]])


def test_samples_stay_with_their_example_in_whatever_order():
    pairs = [("a", "a"), ("b", "x"), ("a", "x"), ("b", "b"), ("b", "b"), ("!", "!")]
    table = generations_table(*pairs, example_id=list("pqpqqr"), candidate=[0, 0, 1, 1, 2, 0])
    found = samples(table)
    assert found.ids == ("p", "q", "r")
    np.testing.assert_array_equal(found.hit, [[1, 0, np.nan], [0, 1, 1], [np.nan] * 3])
    np.testing.assert_array_equal(METRICS.get("leak_at_1").compute([table]), [0.5, 2 / 3, np.nan])
    np.testing.assert_array_equal(METRICS.get("leak_at_max").compute([table]), [1, 1, np.nan])
    assert np.isnan(METRICS.get("leak_at_8").compute([table])).all()


@pytest.mark.parametrize("name", LEAKS)
def test_every_leak_metric(name):
    entry = METRICS.get(name)
    generator = np.random.default_rng(6)
    said = [" ".join(generator.choice(["one", "two", "three"], size=3)) for _ in range(60)]
    ids = [f"e{i // 12}" for i in range(60)]
    table = generations_table(*(("one two three", text) for text in said), example_id=ids, candidate=range(60))
    found = entry.compute([table])
    assert found.shape == (5,)
    assert ((found >= entry.range[0]) & (found <= entry.range[1])).all()
    silent = entry.compute([generations_table(*[("a b", "")] * 12, example_id=["e"] * 12)])
    by_heart = entry.compute([generations_table(*[("a b", "a b")] * 12, example_id=["e"] * 12)])
    assert silent < by_heart == 1
    assert entry.direction("forget") == "lower"
    assert entry.compute([table.slice(0, 0)]).shape == (0,)


def test_conventions_cut_samples_too():
    table = generations_table(("a b", "x a b"), example_id=["e"])
    assert samples(table).hit == 1
    assert samples(table, convention_of("semeval-stop")).hit == 0
