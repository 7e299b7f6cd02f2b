"""Membership inference and privacy: scikit-learn, naive loops and closed forms; tokens as conventions count them."""

from __future__ import annotations

import math
import statistics
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from expunge.metrics import membership
from expunge.metrics.auc import auc_statistic, interval, placements, resampled_aucs
from expunge.metrics.base import METRICS, Resampling, TableShelf, evaluate_metrics
from expunge.metrics.privacy import _closeness, _privleak
from expunge.models.tiny import build_tiny
from expunge.numbers import harmonic_mean
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE
from expunge.scoring.scores import score
from expunge.scoring.tables import SCORES
from metric_tables import scores_table, table_of
from scoring_rows import END, lively, row

OPEN_UNLEARNING = CONVENTIONS["open-unlearning"]
AUCS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
RELATIVE = ("privleak", "privacy", *(f"s_mia_{name}" for name in membership.SCORES))
FAST = Resampling(200)


def random_scores(count, seed=0, shift=0.0, longest=20):
    """Rows with one to three labels after the answer, one of no tokens, and every column of its own."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        answer = int(generator.integers(0 if index == 3 else 1, 1 if index == 3 else longest))
        size = answer + int(generator.integers(1, 4))
        row = {
            "example_id": f"e{index}",
            "answer_tokens": answer,
            "answer_zlib": int(generator.integers(10, 60)),
            "token_ids": generator.integers(0, 9, size).tolist(),
            "logprob": (-generator.exponential(2, size) + shift).tolist(),
            "hit": (generator.random(size) < 0.6).tolist(),
            "entropy": generator.random(size).tolist(),
            "mean_logprob": (-3 * generator.random(size)).tolist(),
            "std_logprob": np.where(generator.random(size) < 0.1, 0.0, generator.random(size)).tolist(),
        }
        rows.append(row)
    return table_of(SCORES, rows)


def four_tables(count=30):
    """Forget and holdout of a model, and of a reference."""
    return [random_scores(count, seed, shift) for seed, shift in ((0, 0.0), (1, -0.5), (2, -0.4), (3, -0.5))]


@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (40, 25), (300, 500)])
def test_auc_agrees_with_scikit_learn_ties_included(n, m, levels):
    generator = np.random.default_rng(n + m)
    members, others = generator.integers(0, levels, n).astype(float), generator.integers(0, levels, m).astype(float)
    labels = np.repeat([1, 0], [n, m])
    expected = roc_auc_score(labels, -np.concatenate([members, others]))
    assert placements(members, others).mean() == pytest.approx(expected, abs=1e-12)
    assert auc_statistic(members, others, FAST).value == pytest.approx(expected, abs=1e-12)


def test_placements_hold_the_roc_curve():
    generator = np.random.default_rng(0)
    members, others = generator.normal(size=60), generator.normal(1, size=40)
    false, true, _ = roc_curve(np.repeat([1, 0], [60, 40]), -np.concatenate([members, others]), drop_intermediate=False)
    placed = placements(members, others)
    for rate in np.unique(false):
        assert np.mean(placed >= 1 - rate - 1e-9) == pytest.approx(true[false == rate].max())


def test_draws_agree_with_a_naive_loop():
    generator = np.random.default_rng(5)
    members, others = generator.integers(0, 6, 13).astype(float), generator.integers(0, 6, 9).astype(float)
    drawn = resampled_aucs([(members, others), (others[:1].repeat(13), others)], Resampling(50, 3))
    again = np.random.default_rng(3)
    picked, against = again.integers(0, 13, size=(50, 13)), again.integers(0, 9, size=(50, 9))
    for index in range(50):
        for pair, sample in enumerate((members, others[:1].repeat(13))):
            pairs = [(a < b) + (a == b) / 2 for a in sample[picked[index]] for b in others[against[index]]]
            assert drawn[pair, index] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_draws_do_not_depend_on_how_many_are_held(monkeypatch):
    generator = np.random.default_rng(5)
    pair = generator.normal(size=200), generator.normal(size=150)
    whole = resampled_aucs([pair], Resampling(2000))[0]
    monkeypatch.setattr("expunge.metrics.auc._CHUNK", 4000)
    parts = resampled_aucs([pair], Resampling(2000))[0]
    assert whole.shape == parts.shape == (2000,)
    assert abs(whole.std() - parts.std()) < 0.1 * whole.std()


def test_interval_covers_the_true_auc_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    truth = statistics.NormalDist().cdf(1 / math.sqrt(2))
    inside = 0
    for trial in range(300):
        found = auc_statistic(generator.normal(size=40), generator.normal(1, size=60), Resampling(300, trial))
        inside += found.low <= truth <= found.high
    assert 0.9 <= inside / 300 <= 0.98


def test_chance_is_stated_where_rows_are_few():
    generator = np.random.default_rng(1)
    aucs = [placements(generator.normal(size=150), generator.normal(size=150)).mean() for _ in range(2000)]
    assert np.std(aucs) == pytest.approx(0.033, abs=0.002)
    few = auc_statistic(generator.normal(size=150), generator.normal(size=150), FAST)
    assert few.note == "150 + 150 rows: standard error 0.033 even if nothing is known"
    assert auc_statistic(generator.normal(size=200), generator.normal(size=200), FAST).note == ""


def literal_scores(table, *, labels_in_loss, labels_but_last, k):
    """Every attack's score by one loop over rows, as public code has it (no vectors, no shared helpers)."""
    found = {name: [] for name in membership.SCORES}
    for cells in table.to_pylist():
        labels = len(cells["logprob"])
        counted = cells["logprob"][: labels if labels_in_loss else cells["answer_tokens"]]
        matched = slice(0, labels - 1 if labels_but_last else cells["answer_tokens"])
        losses = [math.nan] if not counted else [-sum(counted) / len(counted)]
        found["loss"].append(losses[0])
        found["zlib"].append(losses[0] / cells["answer_zlib"])
        plain = cells["logprob"][matched]
        rows = zip(plain, cells["mean_logprob"][matched], cells["std_logprob"][matched], strict=True)
        standard = [(p - mu) / math.sqrt(max(sigma**2, 1e-6)) for p, mu, sigma in rows]
        for name, values in (("min_k", plain), ("min_k_plus_plus", standard)):
            lowest = sorted(values)[: max(1, int(len(values) * k))]
            found[name].append(-sum(lowest) / len(lowest) if lowest else math.nan)
    return found


@pytest.mark.parametrize("convention", [EXPUNGE, OPEN_UNLEARNING, CONVENTIONS["tofu"], CONVENTIONS["muse"]])
def test_attacks_agree_with_literal_loops(convention):
    table = random_scores(60)
    public = convention is OPEN_UNLEARNING
    options = {"labels_in_loss": convention.scores_terminator, "labels_but_last": public, "k": convention.min_k}
    expected = literal_scores(table, **options)
    for name, attack in membership.SCORES.items():
        np.testing.assert_allclose(attack(table, convention), expected[name], rtol=1e-5, err_msg=name)


def learnt_row(model, name, length, generator):
    """A row of which the model's own first choice gives most tokens, with three labels after the answer."""
    ids = generator.integers(3, 500, size=5).tolist()
    for _ in range(length):
        with torch.no_grad():
            said = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(said if generator.random() < 0.8 else int(generator.integers(3, 500)))
    return row(name, ids[:5], ids[5:], [END, 7, END])


def open_unlearning(model, encoded, k=0.4):
    """Its per-row numbers from raw logits, after the formulas of its evaluator (all labels; or all but the last)."""
    ids = torch.tensor(encoded.input_ids[None].astype(np.int64))
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, encoded.prompt_tokens - 1 : -1].log_softmax(-1)
    labels = ids[0, encoded.prompt_tokens :]
    nll = -logprobs.gather(-1, labels[:, None])[:, 0]
    loss = float(nll.sum() / len(labels))
    vocabulary, matched = logprobs[:-1], labels[:-1]
    token = vocabulary.gather(-1, matched[:, None])[:, 0]
    mu = (vocabulary.exp() * vocabulary).sum(-1)
    sigma = ((vocabulary.exp() * vocabulary.square()).sum(-1) - mu.square()).clamp(min=1e-6)
    lowest = max(1, int(len(matched) * k))
    hits = (vocabulary.argmax(-1) == matched).tolist()
    extracted = next((i for i in range(len(hits)) if all(hits[i:])), len(hits) - 1)
    return {
        "probability": math.exp(-loss),
        "exact_memorization": sum(hits) / len(hits),
        "extraction_strength": 1 - extracted / len(hits),
        "loss": loss,
        "zlib": loss / len(zlib.compress(encoded.example.answer.encode())),
        "min_k": -np.mean(sorted(token.tolist())[:lowest]),
        "min_k_plus_plus": -np.mean(sorted(((token - mu) / sigma.sqrt()).tolist())[:lowest]),
    }


def test_rows_agree_with_open_unlearning_from_logits():
    model = lively(build_tiny()[0])
    generator = np.random.default_rng(0)
    rows = [learnt_row(model, f"r{i}", length, generator) for i, length in enumerate([1, 2, 5, 11, 12, 13])]
    table = score(model, rows, batch_size=3)
    expected = [open_unlearning(model, encoded) for encoded in rows]
    for name in expected[0]:
        function = membership.SCORES.get(name) or METRICS.get(name).function
        wanted = [numbers[name] for numbers in expected]
        np.testing.assert_allclose(function(table, convention=OPEN_UNLEARNING), wanted, atol=1e-3, err_msg=name)
    # the floor: its loop ends at the last token even if that is wrong
    assert min(numbers["extraction_strength"] for numbers in expected) > 0
    assert METRICS.get("extraction_strength").function(table).max() > 0.1


def test_what_is_better_known_is_nearer_to_one():
    known = scores_table(*[("11", [-0.1, -0.2])] * 5)
    unknown = scores_table(*[("00", [-4.0, -5.0])] * 4)
    for name in ("mia_loss", "mia_zlib", "mia_min_k"):
        function = METRICS.get(name).function
        assert function(known, unknown).value == 1
        assert function(unknown, known).value == 0
        assert function(known, known).value == 0.5
    # whatever is easy for the reference too is no sign
    beyond = METRICS.get("mia_reference").function
    assert beyond(known, unknown, known, unknown).value == 0.5
    assert beyond(known, unknown, unknown.slice(0, 0), unknown).value is None
    more = scores_table(*[("00", [-6.0, -6.0])] * 5)
    assert beyond(known, unknown, more, unknown).value == 1


def test_a_reference_with_other_tokens_is_named():
    tables = four_tables(6)
    beyond = METRICS.get("mia_reference").function
    assert "other tokens" in beyond(*tables).note
    assert "other tokens" not in beyond(tables[0], tables[1], tables[0], tables[1]).note


@pytest.mark.parametrize("name", AUCS)
def test_unscored_rows_are_counted_and_values_are_placements(name):
    forget, holdout = random_scores(20, 0), random_scores(25, 1)
    found = METRICS.get(name).compute([forget, holdout], EXPUNGE, FAST)
    assert (found.n, found.unscored) == (19, 1)
    assert np.flatnonzero(np.isnan(found.values)).tolist() == [3]
    assert np.nanmean(found.values) == pytest.approx(found.value)
    assert found.low <= found.value <= found.high
    assert found.note.startswith("19 + 24 rows")


def with_nan(table):
    """The table of a model that computes nothing."""
    rows = table.to_pylist()
    for cells in rows:
        cells["logprob"] = [math.nan] * len(cells["logprob"])
    return table_of(SCORES, rows)


@pytest.mark.parametrize("name", [*AUCS, "mia_reference", *RELATIVE])
def test_broken_models_empty_and_tiny_tables(name):
    entry = METRICS.get(name)
    full = four_tables(8)[: len(entry.needs)]
    for broken in range(len(full)):
        for spoilt in (with_nan(full[broken]), full[broken].slice(0, 0)):
            tables = [spoilt if index == broken else table for index, table in enumerate(full)]
            found = entry.compute(tables, EXPUNGE, FAST)
            assert found.value is found.low is found.high is None
            assert found.note
            assert found.n + found.unscored == len(tables[0])
    one = entry.compute([table.slice(0, 1) for table in full], EXPUNGE, FAST)
    assert one.low is one.high is None
    assert one.n == 1


@pytest.mark.parametrize("name", [*AUCS, "mia_reference", *RELATIVE])
def test_records_of_a_whole_evaluation(name):
    tables = four_tables(12)
    keys = [(variant, split) for variant in ("merged", "reference") for split in ("forget", "holdout")]
    shelf = TableShelf({(*key, "scores"): table for key, table in zip(keys, tables, strict=True)})
    for convention in (EXPUNGE, OPEN_UNLEARNING):
        records, _ = evaluate_metrics(shelf, "forget", [name], FAST, "merged", "forget", convention)
        (record,) = records
        low, high = METRICS.get(name).range
        assert low <= record["ci_low"] <= record["value"] <= record["ci_high"] <= high
        assert record["direction"] == ("higher" if name.startswith(("s_mia", "privacy")) else "none")
    assert evaluate_metrics(shelf, "retain", [name], FAST, "merged", "forget")[0] == []


def test_a_model_beside_itself():
    forget, holdout, *_ = four_tables()
    for name, good in {"privleak": 0.0, "privacy": 1.0, "s_mia_loss": 1.0}.items():
        found = METRICS.get(name).function(forget, holdout, forget, holdout)
        assert (found.value, found.low, found.high) == (good, good, good)


def test_relative_numbers_in_closed_form():
    model, reference = np.array([1.0, 0.5, 0.75, 0.0]), np.full(4, 0.5)
    np.testing.assert_allclose(_privleak(model, reference), [-100, 0, -50, 100])
    np.testing.assert_allclose(_closeness(model, reference), [0, 1, 0.5, 0])
    assert np.isnan(_privleak(np.array([0.5]), np.array([1.0]))).all()
    assert np.isnan(_closeness(np.array([0.5]), np.array([0.0]))).all()


def test_relative_numbers_come_from_the_same_aucs():
    forget, holdout, reference_forget, reference_holdout = tables = four_tables()
    found = []
    for name in membership.SCORES:
        function = METRICS.get(f"mia_{name}").function
        own, other = function(forget, holdout).value, function(reference_forget, reference_holdout).value
        found.append(max(0, 1 - abs(own - other) / other))
        assert METRICS.get(f"s_mia_{name}").function(*tables).value == pytest.approx(found[-1])
    assert min(found) > 0
    assert METRICS.get("privacy").function(*tables).value == pytest.approx(statistics.harmonic_mean(found))
    min_k = METRICS.get("mia_min_k").function
    forty = replace(EXPUNGE, min_k=0.4)  # MUSE's, whatever the convention's own
    own, other = (min_k(*pair, convention=forty).value for pair in (tables[:2], tables[2:]))
    expected = ((1 - own) - (1 - other)) / (1 - other) * 100
    assert METRICS.get("privleak").function(*tables).value == pytest.approx(expected)


def test_rows_meet_their_own_reference():
    forget, holdout, *reference = four_tables()
    turned = [table.take(list(range(len(table)))[::-1]) for table in reference]
    for name in ("mia_reference", "s_mia_zlib"):
        function = METRICS.get(name).function
        assert function(forget, holdout, *turned).value == pytest.approx(function(forget, holdout, *reference).value)


def test_intervals_hold_their_value():
    assert interval(1.0, np.array([0.5, 0.6])) == (pytest.approx(0.5, abs=0.01), 1.0)
    assert interval(1.0, np.array([])) == (None, None)
    assert interval(1.0, np.array([np.nan])) == (None, None)


@pytest.mark.parametrize("values", [[0.5], [0.2, 0.9, 1.0], [1e-9, 1.0], [0.0, 0.3]])
def test_harmonic_mean(values):
    assert harmonic_mean(values) == pytest.approx(statistics.harmonic_mean(values))
    assert harmonic_mean([*values, None]) is harmonic_mean([*values, math.nan]) is None


def test_harmonic_mean_of_nothing_and_of_what_is_negative():
    assert harmonic_mean([]) is None
    with pytest.raises(ValueError, match=r"-0\.5"):
        harmonic_mean([1, -0.5])
