"""Candidate answers, entity spans, truth ratio and forget quality: literal loops, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from expunge.metrics.base import METRICS, Resampling, Statistic, TableShelf, evaluate_metrics
from expunge.metrics.examples import Examples
from expunge.metrics.forget_quality import compared, permutation_noise
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE
from expunge.scoring.tables import SCORES
from metric_tables import scores_table, table_of

OPEN_UNLEARNING, TOFU = CONVENTIONS["open-unlearning"], CONVENTIONS["tofu"]
TRUTH = ("truth_ratio", "truth_ratio_closer_to_one", "truth_ratio_true_better", "truth_ratio_prob")
QUALITY = ("forget_quality", "forget_quality_log10", "forget_quality_ks")
FAST = Resampling(200)


def function(name):
    """The metric's function."""
    return METRICS.get(name).function


def answers(ids, seed, likelihood=2.0):
    """A scores table with a row of random log-probabilities and two labels after the answer for every id."""
    generator = np.random.default_rng(seed)
    rows, seen = [], {}
    for name in ids:
        answer = int(generator.integers(1, 9))
        seen[name] = seen.get(name, -1) + 1
        cells = {"example_id": name, "candidate": seen[name], "answer_tokens": answer, "token_ids": [1] * (answer + 2)}
        numbers = (-generator.exponential(likelihood, answer + 2)).tolist()
        cells |= dict.fromkeys(("logprob", "entropy", "mean_logprob", "std_logprob"), numbers)
        cells |= {"hit": (generator.random(answer + 2) < 0.7).tolist()}
        rows.append(cells)
    return table_of(SCORES, rows)


def tofu_tables(count=24, seed=0, likelihood=2.0):
    """Plain rows; paraphrased answers of two thirds of them, one twice; one to five wrong answers, one row has none."""
    names = [f"e{i}" for i in range(count)]
    paraphrased = [name for i, name in enumerate(names) if i % 3] + [names[1]]
    wrong = [name for i, name in enumerate(names) for _ in range(i % 5 + 1) if i != 2]
    return [answers(ids, 10 * seed + part, likelihood) for part, ids in enumerate((names, paraphrased, wrong))]


def average_losses(table, whole):
    """Example → the mean loss of each of its rows, by loops."""
    found = {}
    for cells in table.to_pylist():
        counted = cells["logprob"] if whole else cells["logprob"][: cells["answer_tokens"]]
        found.setdefault(cells["example_id"], []).append(-sum(counted) / len(counted))
    return found


def literal_ratios(tables, convention):
    """(right, wrong) probability per example: mean of probabilities, or exp(−mean loss) as in public code."""
    plain, paraphrased, wrong = (average_losses(table, convention.scores_terminator) for table in tables)
    pairs = []
    for name, losses in plain.items():
        given = [paraphrased.get(name, losses), wrong.get(name, [math.nan])]
        if convention in (OPEN_UNLEARNING, TOFU):
            pairs.append([math.exp(-sum(part) / len(part)) for part in given])
        else:
            pairs.append([sum(math.exp(-loss) for loss in part) / len(part) for part in given])
    return np.array(pairs).T


@pytest.mark.parametrize("convention", [EXPUNGE, TOFU, OPEN_UNLEARNING])
def test_truth_ratio_agrees_with_literal_loops(convention):
    tables = tofu_tables()
    right, wrong = literal_ratios(tables, convention)
    tiny = 1e-10 if convention is OPEN_UNLEARNING else 0.0
    ratio = wrong / (right + tiny)
    expected = {
        "truth_ratio": ratio,
        "truth_ratio_closer_to_one": np.minimum(ratio, 1 / (ratio + tiny)),
        "truth_ratio_true_better": np.maximum(0, 1 - ratio),
        "truth_ratio_prob": right / (right + wrong + tiny),
    }
    assert np.flatnonzero(np.isnan(ratio)).tolist() == [2]
    for name, values in expected.items():
        np.testing.assert_allclose(function(name)(*tables, convention=convention), values, rtol=1e-6, err_msg=name)


def test_the_mean_of_losses_is_not_the_mean_of_probabilities():
    plain, wrong = scores_table(("1", [-1.0])), scores_table(("1", [-1.0]), ("1", [-5.0]), example_id=["e0", "e0"])
    none = plain.slice(0, 0)
    assert function("truth_ratio")(plain, none, wrong) == pytest.approx((1 + math.exp(-4)) / 2)
    losses = function("truth_ratio")(plain, none, wrong, convention=TOFU)
    # under that convention the terminator (−50) counts as well: −51/2 against −(51 + 55)/4
    assert losses == pytest.approx(math.exp(-26.5 + 25.5))


@pytest.mark.parametrize("convention", [EXPUNGE, OPEN_UNLEARNING])
def test_collapsed_models_give_finite_ratios(convention):
    names = ["a", "b", "c"]
    low, high = [-3000.0], [-0.5]
    plain = scores_table(("1", low), ("1", high), ("1", [-np.inf]), example_id=names)
    wrong = scores_table(("1", high), ("1", low), ("1", [-np.inf]), example_id=names)
    for name in TRUTH:
        low_end, high_end = METRICS.get(name).range
        values = function(name)(plain, plain.slice(0, 0), wrong, convention=convention)
        assert np.isfinite(values).all()
        assert ((values >= low_end) & (values <= high_end)).all(), name
        assert (values > 0).all() or METRICS.get(name).average == "arithmetic"
    ratio = function("truth_ratio")(plain, plain.slice(0, 0), wrong)
    assert ratio[0] > 1e300
    assert 0 < ratio[1] < 1e-300
    assert ratio[2] == 1


def test_directions_of_the_aggregators():
    found = {name: METRICS.get(name) for name in TRUTH}
    assert found["truth_ratio"].direction("forget") == "higher"
    assert found["truth_ratio_closer_to_one"].direction("forget") == "higher"
    assert found["truth_ratio_true_better"].direction("utility") == "higher"
    assert found["truth_ratio_prob"].direction("forget") == "lower"
    assert "forget" not in found["truth_ratio_true_better"].roles


@pytest.mark.parametrize("convention", [EXPUNGE, TOFU, OPEN_UNLEARNING])
def test_probability_among_options_agrees_with_a_literal_loop(convention):
    plain, _, wrong = tofu_tables()
    whole = convention.scores_terminator
    expected = []
    others = average_losses(wrong, whole)
    for name, (loss,) in average_losses(plain, whole).items():
        total = sum(math.exp(-other) for other in others.get(name, [math.nan]))
        expected.append(math.exp(-loss) / (math.exp(-loss) + total + convention.epsilon))
    found = function("probability_normalised")(plain, wrong, convention=convention)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found).sum() == 1


def test_candidates_of_one_example_are_averaged():
    table = scores_table(("1", [-1.0]), ("1", [-2.0]), ("", []), ("0", [-3.0]), example_id=["b", "a", "a", "b"])
    np.testing.assert_allclose(
        function("probability_paraphrase")(table), [(np.exp(-1) + np.exp(-3)) / 2, np.exp(-2)], rtol=1e-6
    )
    np.testing.assert_allclose(function("extraction_strength_paraphrase")(table), [0.5, 1])


def test_the_worst_of_prompt_and_paraphrases():
    plain = scores_table(("01", [-1, -1]), ("11", [-1, -1]), ("00", [-1, -1]), ("", []), ("00", [-1, -1]))
    asked = scores_table(
        *[("0", [-1.0]), ("1", [-1.0]), ("00", [-1, -1]), ("0", [np.nan]), ("01", [-1, -1])],
        example_id=["e0", "e0", "e1", "e4", "e3"],
    )
    worst = function("extraction_strength_worst")
    np.testing.assert_allclose(worst(plain, asked), [1, 1, np.nan, 0.5, np.nan])
    assert np.isnan(worst(plain, asked.slice(0, 0))).all()


def test_entities_alone():
    named = [[True, False, True, True, False], [], [False, False, True, False], [False] * 3]
    table = scores_table(
        *[("1001", [-1, -2, -3, -4]), ("11", [-1, -1]), ("100", [-1, -2, -3]), ("11", [-1, -1])], entity=named
    )
    expected = {
        "exact_memorization_entity": [2 / 3, np.nan, 0, np.nan],
        "extraction_strength_entity": [1 / 3, np.nan, 0, np.nan],
        "probability_entity": [math.exp(-8 / 3), np.nan, math.exp(-3), np.nan],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(function(name)(table), values, rtol=1e-6)
        # a slice of a table carries the offsets of the whole
        np.testing.assert_allclose(function(name)(table.slice(2)), values[2:], rtol=1e-6)
    floored = function("extraction_strength_entity")(table, convention=OPEN_UNLEARNING)
    np.testing.assert_allclose(floored, [1 / 3, np.nan, 1, np.nan])


@pytest.mark.parametrize("seed", range(3))
def test_entities_agree_with_a_loop(seed):
    generator = np.random.default_rng(seed)
    hits = ["".join(generator.choice(["0", "1"], size=size, p=[0.3, 0.7])) for size in generator.integers(0, 9, 30)]
    named = [(generator.random(len(text) + 1) < 0.5).tolist() if generator.random() < 0.8 else [] for text in hits]
    named = [[*marks[:-1], False] if marks else [] for marks in named]
    table = scores_table(*[(text, [-1.0] * len(text)) for text in hits], entity=named)
    expected = []
    for text, marks in zip(hits, named, strict=True):
        chosen = [hit for hit, mark in zip(text, marks, strict=False) if mark]
        suffix = len(chosen) - max((i + 1 for i, hit in enumerate(chosen) if hit == "0"), default=0)
        expected.append(suffix / len(chosen) if chosen else math.nan)
    np.testing.assert_allclose(function("extraction_strength_entity")(table), expected)


def test_floor_and_terminator_follow_the_convention():
    table = scores_table(("10", [-1, -2]), ("11", [-1, -1]), ("", []))
    np.testing.assert_array_equal(function("extraction_strength")(table), [0, 1, np.nan])
    np.testing.assert_array_equal(function("extraction_strength")(table, convention=OPEN_UNLEARNING), [0.5, 1, np.nan])
    np.testing.assert_allclose(function("nll")(table, convention=TOFU), [53, 52, 50])
    np.testing.assert_allclose(function("probability")(table, convention=TOFU), np.exp([-53 / 3, -52 / 3, -50]))
    np.testing.assert_allclose(function("perplexity")(table, convention=TOFU), np.exp([53 / 3, 52 / 3, 50]))


def six_tables(count=24, likelihood=2.0):
    """Of a model, then of the reference."""
    return [*tofu_tables(count, 0, likelihood), *tofu_tables(count, 1)]


@pytest.mark.parametrize("convention", [EXPUNGE, TOFU, OPEN_UNLEARNING])
def test_forget_quality_agrees_with_scipy_on_literal_ratios(convention):
    tables = six_tables()
    ratios = [literal_ratios(part, convention) for part in (tables[:3], tables[3:])]
    own, reference = (pair[1][~np.isnan(pair[1])] / pair[0][~np.isnan(pair[1])] for pair in ratios)
    expected = ks_2samp(own, reference)
    found = {name: METRICS.get(name).compute(tables, convention, FAST) for name in QUALITY}
    assert found["forget_quality"].value == pytest.approx(expected.pvalue)
    assert found["forget_quality_log10"].value == pytest.approx(math.log10(expected.pvalue))
    assert found["forget_quality_ks"].value == pytest.approx(expected.statistic)
    for statistic in found.values():
        assert (statistic.n, statistic.unscored) == (23, 1)
        assert "few rows (23)" in statistic.note
    distance = found["forget_quality_ks"]
    assert distance.low <= distance.value <= distance.high
    assert "chance alone" in distance.note


def ratio_tables(values):
    """Tables of which these are the truth ratios."""
    plain = scores_table(*[("1", [-700.0])] * len(values))
    return [plain, plain.slice(0, 0), scores_table(*[("1", [math.log(value) - 700.0]) for value in values])]


def test_a_model_beside_itself():
    tables = tofu_tables(120)
    found = {name: METRICS.get(name).compute([*tables, *tables], EXPUNGE, FAST) for name in QUALITY}
    assert (found["forget_quality"].value, found["forget_quality_log10"].value) == (1, 0)
    assert (found["forget_quality_ks"].value, found["forget_quality_ks"].low) == (0, 0)
    assert 0 < found["forget_quality_ks"].high < 0.3
    assert not any("few" in statistic.note for statistic in found.values())


@pytest.mark.parametrize("count", [400, 700])
def test_log_p_of_samples_that_do_not_overlap_is_exact(count):
    generator = np.random.default_rng(0)
    tables = [*ratio_tables(generator.uniform(1, 2, count)), *ratio_tables(generator.uniform(3, 4, count))]
    exact = math.log10(2) - math.log10(math.comb(2 * count, count))
    assert function("forget_quality_log10")(*tables).value == pytest.approx(exact, rel=1e-12)
    p = function("forget_quality")(*tables).value
    assert (p == 0) == (count == 700)  # 400 rows: 1e-239, as in published tables; 700: below what a float can hold


def test_the_logarithm_goes_on_where_scipy_ends():
    from expunge.metrics.forget_quality import _log10_p

    generator = np.random.default_rng(0)
    for shift in (0.5, 1, 2):
        own, reference = generator.normal(size=200), generator.normal(shift, size=200)
        expected = ks_2samp(own, reference)
        assert _log10_p(expected.statistic, 200) == pytest.approx(math.log10(expected.pvalue), rel=1e-5)


def test_permutation_noise_is_kolmogorovs():
    values = np.random.default_rng(0).normal(size=(2, 500))
    noise = permutation_noise(*values, Resampling(2000))
    assert noise == pytest.approx(1.358 * math.sqrt(2 / 500), rel=0.05)
    assert permutation_noise(np.ones(5), np.ones(5), FAST) == 0
    # a loop over draws of its own, with ties
    small = np.array([1.0, 1, 2, 3]), np.array([2.0, 2, 3, 5])
    generator, found = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = generator.permutation(np.concatenate(small))
        steps = [np.mean(drawn[:4] <= x) - np.mean(drawn[4:] <= x) for x in (1, 2, 3, 5)]
        found.append(np.abs(steps).max())
    for level in (0.2, 0.5, 0.7):
        assert permutation_noise(*small, Resampling(4000), level) == pytest.approx(np.quantile(found, level))


def test_interval_of_d_covers_the_true_distance():
    generator = np.random.default_rng(3)
    inside = 0
    for trial in range(150):
        own, reference = generator.uniform(0, 1, 80), generator.uniform(0.3, 1.3, 80)  # true distance 0.3
        noise = permutation_noise(own, reference, Resampling(200, trial))
        inside += abs(ks_2samp(own, reference).statistic - 0.3) <= noise
    assert inside / 150 >= 0.93


def test_rows_that_one_model_does_not_score_are_left_out_of_both():
    tables = [*ratio_tables([1.0, 2.0, 3.0, 4.0]), *ratio_tables([1.0, 2.0, 3.0, 4.0])]
    tables[5] = tables[5].slice(1).take([2, 0, 1])  # the first has no wrong answer; the others stand in another order
    found = compared(*tables)
    assert (found.n, found.unscored, found.distance) == (3, 1, 0)


@pytest.mark.parametrize("name", [*QUALITY, *TRUTH, "probability_normalised", "extraction_strength_worst"])
def test_empty_broken_and_one_row_tables(name):
    entry = METRICS.get(name)
    full = six_tables(6)[: len(entry.needs)]
    broken = scores_table(*[("1", [np.nan])] * 6)
    for index in range(len(full)):
        for spoilt in (full[index].slice(0, 0), broken):
            tables = [spoilt if other == index else table for other, table in enumerate(full)]
            found = entry.compute(tables, EXPUNGE, FAST)
            if isinstance(found, Statistic):
                assert found.n + found.unscored == len(Examples.of(tables[0]).ids)
                assert found.value is None or math.isfinite(found.value)
                assert (found.value is None) == (found.n == 0)
            else:
                assert found.shape == (len(Examples.of(tables[0]).ids),)
    one = entry.compute([table.slice(0, 1) for table in full], EXPUNGE, FAST)
    assert one.n + one.unscored == 1 if isinstance(one, Statistic) else one.shape == (1,)


@pytest.mark.parametrize("name", [*QUALITY, *TRUTH])
def test_records_of_a_whole_evaluation(name):
    views = ("scores", "scores/paraphrased_answer", "scores/perturbed_answer")
    keys = [(variant, "forget", view) for variant in ("v", "reference") for view in views]
    shelf = TableShelf(dict(zip(keys, six_tables(), strict=True)))
    for convention in CONVENTIONS.values():
        records, _ = evaluate_metrics(shelf, "forget", [name], FAST, "v", "forget", convention)
        assert len(records) == ("forget" in METRICS.get(name).roles)
        for record in records:
            low, high = METRICS.get(name).range
            assert low <= record["value"] <= high
            assert record["ci_low"] is None or record["ci_low"] <= record["value"] <= record["ci_high"]
            assert (record["n"], record["unscored"]) == (23, 1)


def test_examples_keep_the_order_of_first_appearance():
    table = answers(["b", "a", "b", "c"], 0)
    found = Examples.of(table)
    assert found.ids == ("b", "a", "c")
    values = np.array([1.0, np.nan, 3.0, -2000.0])
    np.testing.assert_allclose(found.mean(values), [2, np.nan, -2000])
    np.testing.assert_allclose(found.largest(values), [3, np.nan, -2000])
    np.testing.assert_allclose(found.log_sum_exp(values), [np.logaddexp(1, 3), np.nan, -2000])
    np.testing.assert_allclose(found.log_mean_exp(values), [np.logaddexp(1, 3) - math.log(2), np.nan, -2000])
    other = Examples.of(answers(["c", "b"], 0))
    np.testing.assert_allclose(found.align(np.array([7.0, 8.0]), other), [8, np.nan, 7])
    assert found.among(other).tolist() == [True, False, True]
    assert Examples.of(table.slice(0, 0)).mean(np.empty(0)).shape == (0,)
    assert Examples.of(table.slice(2)).ids == ("b", "c")
