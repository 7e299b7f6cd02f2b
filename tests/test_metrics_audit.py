"""The audit's arithmetic: closed forms, oracles of scipy and scikit-learn, and the cases that one-sided scores miss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from expunge.metrics.audit import (
    correlation,
    faithfulness,
    identity_distance,
    oriented,
    pearson,
    quantization_robustness,
    ranks,
    relearning_robustness,
    slope,
    spearman,
    threshold,
)
from expunge.metrics.base import METRICS, Resampling


@pytest.mark.parametrize("seed", range(5))
def test_correlations_agree_with_scipy(seed):
    generator = np.random.default_rng(seed)
    before = np.round(generator.random(17), 1)  # with ties
    after = before + np.round(generator.normal(0, 0.3, 17), 1)
    assert pearson(before, after) == pytest.approx(stats.pearsonr(before, after)[0])
    assert spearman(before, after) == pytest.approx(stats.spearmanr(before, after)[0])
    np.testing.assert_array_equal(ranks(before), stats.rankdata(before))
    assert slope(before, after) == pytest.approx(stats.linregress(before, after).slope)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),  # too few
        ([0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),  # no spread
        ([0.1, 0.2, 0.3, np.nan, np.inf], [0.1, 0.2, 0.3, 0.4, 0.5]),  # too few after what is undefined
    ],
)
def test_no_correlation_is_made_up(before, after):
    for measure in (pearson, spearman, slope):
        assert measure(np.array(before), np.array(after)) is None
    assert correlation(np.array(before), np.array(after), Resampling(50)).value is None


def test_a_constant_shift_keeps_the_order_but_not_the_values():
    before = np.linspace(0, 1, 9)
    assert pearson(before, before + 0.25) == pytest.approx(1)
    assert identity_distance(before, before + 0.25, span=0.5) == pytest.approx(0.5)
    assert identity_distance(before, before, span=0.5) == 0
    assert identity_distance(before, before, span=0) is None


def test_the_interval_of_a_correlation_holds_its_value_and_narrows():
    generator = np.random.default_rng(0)
    widths = []
    for n in (10, 200):
        before = generator.random(n)
        found = correlation(before, before + generator.normal(0, 0.2, n), Resampling(400))
        assert found.low <= found.value <= found.high
        assert found.n == n
        widths.append(found.high - found.low)
    assert widths[1] < widths[0]


@pytest.mark.parametrize("seed", range(4))
def test_faithfulness_agrees_with_sklearn(seed):
    generator = np.random.default_rng(seed)
    knowing, lacking = np.round(generator.random(12) + 0.2, 1), np.round(generator.random(9), 1)
    expected = roc_auc_score([1] * 12 + [0] * 9, np.concatenate([knowing, lacking]))
    assert faithfulness(knowing, lacking) == pytest.approx(expected)
    cut = threshold(knowing, lacking)
    best = max(((knowing > c).mean() + (lacking <= c).mean()) / 2 for c in np.linspace(-0.1, 1.4, 1501))
    assert ((knowing > cut).mean() + (lacking <= cut).mean()) / 2 == pytest.approx(best)
    assert faithfulness(knowing, np.full(3, np.nan)) is None


def test_a_metric_that_breaks_passes_one_side_only():
    before, after = np.array([0.4, 0.4, 0.4, 0.1]), np.array([0.4, 0.0, 0.8, 0.3])
    one = relearning_robustness(before, after, reference=(0.1, 0.3))
    both = relearning_robustness(before, after, reference=(0.1, 0.3), symmetric=True)
    np.testing.assert_allclose(one, [1, 1, 0.5, 1])
    np.testing.assert_allclose(both, [0, 0, 1 - 0.2 / 0.6, 1], atol=1e-12)
    np.testing.assert_allclose(quantization_robustness(before, after), [1, 1, 0.5, 1 / 3])
    np.testing.assert_allclose(quantization_robustness(before, after, symmetric=True), [1, 0, 1 - 0.4 / 1.2, 0.5])


def test_orientation():
    assert oriented([0.2, None], METRICS.get("extraction_strength")).tolist()[0] == 0.2
    assert np.isnan(oriented([0.2, None], METRICS.get("extraction_strength"))[1])
    np.testing.assert_allclose(oriented([np.e], METRICS.get("perplexity")), [-1])
    np.testing.assert_allclose(oriented([3.0], METRICS.get("nll")), [-3])


def test_a_metric_without_a_learnt_end_is_turned_by_the_yardsticks():
    entry = METRICS.get("privleak")
    assert oriented([-100.0, 0.0], entry, (-100.0, 0.0)).tolist() == [100.0, 0.0]
    assert oriented([-100.0, 0.0], entry, (0.0, -100.0)).tolist() == [-100.0, 0.0]
    assert oriented([1.0], entry).tolist() == [1.0]
