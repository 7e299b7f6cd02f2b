"""Every metric: closed forms, invariants over the registry, records and intervals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from expunge.errors import UserError
from expunge.metrics.base import (
    METRICS,
    Need,
    Resampling,
    bootstrap_interval,
    chosen_metrics,
    evaluate_metrics,
    left_out,
    needed_tables,
    summarise,
)
from expunge.scoring.tables import RECORD_KEYS, SCORES, SUITES, TABLES, VALUES
from metric_tables import generations_table, is_plain, random_tables, scores_table, shelf

OF_SCORES = ("exact_memorization", "extraction_strength", "nll", "perplexity", "probability")
OF_GENERATIONS = ("exact_match", "rouge_l_f1", "rouge_l_recall")
PLAIN = [name for name, entry in METRICS.items() if is_plain(entry)]


def plain_table(name):
    """A random table of the kind that a metric needs."""
    return random_tables()[METRICS.get(name).needs[0]]


@pytest.mark.parametrize(
    ("hits", "strength", "memorization"),
    [
        ("", np.nan, np.nan),
        ("1", 1, 1),
        ("0", 0, 0),
        ("1111", 1, 1),
        ("0000", 0, 0),
        ("1110", 0, 3 / 4),
        ("0111", 3 / 4, 3 / 4),
        ("1011", 2 / 4, 3 / 4),
        ("0001", 1 / 4, 1 / 4),
        ("1010101", 1 / 7, 4 / 7),
    ],
)
def test_extraction_strength_and_exact_memorization(hits, strength, memorization):
    # neighbours with other lengths, so that rows are kept apart
    table = scores_table(("11", [-1, -1]), (hits, [-1.0] * len(hits)), ("000", [-1, -1, -1]))
    np.testing.assert_allclose(METRICS.get("extraction_strength").function(table), [1, strength, 0])
    np.testing.assert_allclose(METRICS.get("exact_memorization").function(table), [1, memorization, 0])


def test_likelihood_family_in_closed_form():
    half, quarter = np.log(0.5), np.log(0.25)
    table = scores_table(("11", [half, half]), ("11", [half, quarter]), ("", []), ("1", [0.0]))
    np.testing.assert_allclose(METRICS.get("nll").function(table), [-2 * half, -half - quarter, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(METRICS.get("probability").function(table), [0.5, 8**-0.5, np.nan, 1], rtol=1e-6)
    np.testing.assert_allclose(METRICS.get("perplexity").function(table), [2, 8**0.5, np.nan, 1], rtol=1e-6)


def test_exact_match():
    table = generations_table(
        ("Paris", "  paris\n"), ("Paris", "Paris."), ("STRASSE", "strasse"), ("  ", "x"), ("東京", "東京")
    )
    np.testing.assert_array_equal(METRICS.get("exact_match").function(table), [1, 0, 1, np.nan, 1])


def test_a_model_that_gives_nan_is_unscored_and_not_forgetful():
    table = scores_table(("000", [-1, np.nan, -1]), ("000", [-1, -1, -1]))
    for name in OF_SCORES:
        values = METRICS.get(name).function(table)
        assert np.isnan(values).tolist() == [True, False], name


def test_collapsed_models_give_finite_numbers():
    table = scores_table(("00", [-5000.0, -5000.0]), ("0", [-np.inf]), ("1", [-1e-3]))
    records, _ = evaluate_metrics(shelf(scores=table), "forget", PLAIN, Resampling(100), "v", "s")
    for record in [record for record in records if record["n"]]:
        assert all(np.isfinite(record[key]) for key in ("value", "ci_low", "ci_high")), record
    assert json.loads(json.dumps(records, allow_nan=False)) == records


@pytest.mark.parametrize("name", PLAIN)
class TestEveryPlainMetric:
    def test_gives_one_value_per_example_in_its_range(self, name):
        entry = METRICS.get(name)
        table = plain_table(name)
        values = entry.function(table)
        assert values.shape == (len(table),)
        assert values.dtype == np.float64
        scored = values[~np.isnan(values)]
        assert len(scored) > 0
        assert (scored >= entry.range[0]).all()
        assert (scored <= entry.range[1]).all()

    def test_looks_at_each_row_alone(self, name):
        entry = METRICS.get(name)
        table = plain_table(name)
        order = np.random.default_rng(0).permutation(len(table))
        alone = np.concatenate([entry.function(table.slice(int(i), 1)) for i in order])
        np.testing.assert_array_equal(alone, entry.function(table)[order])
        chunked = pa.concat_tables([table.slice(0, 3), table.slice(3)])
        np.testing.assert_array_equal(entry.function(chunked), entry.function(table))

    def test_reads_what_parquet_keeps(self, name, tmp_path):
        entry = METRICS.get(name)
        table = plain_table(name)
        pq.write_table(table, tmp_path / "table.parquet", row_group_size=7)
        again = pq.read_table(tmp_path / "table.parquet")
        np.testing.assert_array_equal(entry.function(again), entry.function(table))

    def test_takes_an_empty_table(self, name):
        entry = METRICS.get(name)
        assert entry.function(plain_table(name).slice(0, 0)).shape == (0,)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_declares_itself(name):
    entry = METRICS.get(name)
    for role in entry.roles:
        assert entry.direction(role) in ("lower", "higher", "none")
    assert entry.direction("holdout") == "none"
    assert entry.suite in SUITES
    assert all(need.table in TABLES for need in entry.addresses)
    text = entry.describe()
    assert next(iter(text)) == "summary"
    assert all(isinstance(value, str) and value and "\n" not in value for value in text.values())


@pytest.mark.parametrize("name", OF_SCORES + OF_GENERATIONS)
def test_directions(name):
    entry = METRICS.get(name)
    learnt_high = name not in ("nll", "perplexity")
    assert entry.direction("forget") == ("lower" if learnt_high else "higher")
    assert entry.direction("retain") == entry.direction("utility") == ("higher" if learnt_high else "lower")
    assert entry.needs == ("scores" if name in OF_SCORES else "generations",)


@pytest.mark.parametrize("name", OF_SCORES)
def test_the_terminator_is_left_out(name):
    table = random_tables()["scores"]
    rows = table.to_pylist()
    for row in rows:
        for column in ("token_ids", "logprob", "hit", "entropy", "mean_logprob", "std_logprob"):
            row[column] = row[column][: row["answer_tokens"]]
    bare = pa.Table.from_pylist(rows, schema=SCORES)
    function = METRICS.get(name).function
    np.testing.assert_array_equal(function(bare), function(table))


def test_learning_moves_every_metric_towards_its_learnt_end():
    nothing = {"scores": scores_table(("000", [-9.0] * 3)), "generations": generations_table(("a b", "c"))}
    by_heart = {"scores": scores_table(("111", [-0.1] * 3)), "generations": generations_table(("a b", "a b"))}
    for name in OF_SCORES + OF_GENERATIONS:
        entry = METRICS.get(name)
        before, after = (float(entry.function(tables[entry.needs[0]])[0]) for tables in (nothing, by_heart))
        assert (after > before) == (entry.learnt == "high"), name
        assert after != before, name


def test_records_and_values():
    tables = random_tables()
    given = shelf("merged", "forget", **tables)
    records, values = evaluate_metrics(given, "forget", PLAIN, Resampling(200, 7), "merged", "forget")
    assert [record["metric"] for record in records] == PLAIN
    assert values.schema == VALUES
    for record in records:
        assert tuple(record) == RECORD_KEYS
        assert (record["variant"], record["split"]) == ("merged", "forget")
        entry = METRICS.get(record["metric"])
        assert record["n"] + record["unscored"] == len(tables[entry.needs[0]])
        assert record["ci_low"] <= record["value"] <= record["ci_high"]
        rows = values.filter(pc.equal(values.column("metric"), record["metric"]))
        assert rows.column("example_id").to_pylist() == tables[entry.needs[0]].column("example_id").to_pylist()
        kept = np.array([v for v in rows.column("value").to_pylist() if v is not None])
        assert len(kept) == record["n"]
        mean = np.exp(np.log(kept).mean()) if entry.average == "geometric" else kept.mean()
        assert record["value"] == pytest.approx(mean)
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_same_seed_same_intervals():
    first, again, other = (
        evaluate_metrics(shelf(**random_tables()), "retain", ["probability"], Resampling(200, seed), "v", "s")[0]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_missing_table_leaves_its_metrics_out_and_says_so():
    given, names = shelf(scores=random_tables()["scores"]), ["rouge_l_f1", "extraction_strength"]
    records, values = evaluate_metrics(given, "forget", names, Resampling(100), "v", "s")
    assert [record["metric"] for record in records] == ["extraction_strength"]
    assert set(values.column("metric").to_pylist()) == {"extraction_strength"}
    assert left_out(given, names, "v", "s", "forget") == {"rouge_l_f1": "generations"}
    assert evaluate_metrics(shelf(), "forget", PLAIN, Resampling(100), "v", "s")[1].schema == VALUES


def test_addresses():
    assert Need.parse("scores") == Need("scores")
    assert Need.parse("reference@holdout:scores/paraphrase") == Need("scores/paraphrase", "reference", "holdout")
    assert Need.parse("target@generations") == Need("generations", "target", None)
    with pytest.raises(ValueError, match="no table 'score'"):
        Need.parse("holdout:score")


def test_a_larger_suite_contains_the_smaller():
    quick, standard, full = (chosen_metrics(None, suite) for suite in SUITES)
    assert set(quick) < set(standard) < set(full) == set(METRICS.names())
    assert {*OF_SCORES, *OF_GENERATIONS} <= set(quick)
    assert needed_tables(quick) == {"scores", "generations"}
    assert chosen_metrics(["nll", "nll"], "quick") == ["nll"]


def test_needed_tables():
    assert needed_tables(["extraction_strength", "nll"]) == {"scores"}
    assert needed_tables(["exact_match"]) == {"generations"}
    with pytest.raises(UserError, match="unknown metric 'extraction_strenght'") as caught:
        needed_tables(["extraction_strenght"])
    assert "extraction_strength" in caught.value.hint


@pytest.mark.parametrize(
    ("rows", "n", "unscored", "interval"),
    [([], 0, 0, False), ([("", [])], 0, 1, False), ([("1", [-1.0])], 1, 0, False), ([("1", [-1.0])] * 2, 2, 0, True)],
)
def test_few_examples(rows, n, unscored, interval):
    given = shelf(scores=scores_table(*rows))
    records, _ = evaluate_metrics(given, "forget", OF_SCORES, Resampling(100), "v", "s")
    for record in records:
        assert (record["n"], record["unscored"]) == (n, unscored)
        assert (record["value"] is not None) == (n > 0)
        assert (record["ci_low"] is not None) == (record["ci_high"] is not None) == interval


def test_geometric_mean_of_perplexities_of_one():
    assert summarise(np.ones(4), "geometric", 100, 0) == (1.0, 1.0, 1.0)


def test_interval_of_two_values_is_known():
    # means of two draws from {0, 1}: 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval(np.array([0.0, 1.0]), 2000, 0) == (0.0, 1.0)
    low, high = bootstrap_interval(np.array([0.0, 1.0]), 20000, 0, level=0.4)
    assert (low, high) == (0.5, 0.5)


def test_interval_agrees_with_the_normal_one_on_many_examples():
    values = np.random.default_rng(3).normal(size=5000)
    low, high = bootstrap_interval(values, 2000, 0)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_chunks_of_resamples_cover_all_of_them(monkeypatch):
    import expunge.metrics.base as base

    values = np.random.default_rng(0).random(100)
    whole = bootstrap_interval(values, 501, 5)
    monkeypatch.setattr(base, "_CHUNK", 700)
    assert bootstrap_interval(values, 501, 5) == whole


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(11)
    inside = 0
    for trial in range(400):
        low, high = bootstrap_interval(generator.beta(2, 5, size=50), 400, trial)
        inside += low <= 2 / 7 <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_paired_variants_are_resampled_alike():
    values = np.random.default_rng(0).random(60)
    low, high = bootstrap_interval(values, 300, 0)
    shifted = bootstrap_interval(values + 1, 300, 0)
    np.testing.assert_allclose(shifted, (low + 1, high + 1))


def test_metrics_need_no_torch():
    code = (
        "import sys, expunge.metrics.base as base; base.METRICS.names();"
        "assert not {'torch', 'transformers', 'nltk'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
