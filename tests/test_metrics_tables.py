"""Metrics of related probes, neighbours, divergences, options, layers and weights, in closed form."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from expunge.metrics.base import METRICS, Resampling, TableShelf, evaluate_metrics
from expunge.metrics.neighbours import difference
from expunge.models.tiny import build_tiny
from expunge.scoring.scores import score
from expunge.scoring.tables import DIVERGENCE, LAYERS, WEIGHTS
from metric_tables import generations_table, scores_table, table_of
from scoring_rows import random_rows

RELATIONS = ("paraphrase", "reverse", "one_hop", "multi_hop", "same_answer")
OF_LAYERS = ("uds", "krs", "krs_best_window", "cka_erasure")
CROSSINGS = ("bucket_crossing_int8", "bucket_crossing_int4", "bucket_crossing_nf4")


def compute(name, *tables):
    return METRICS.get(name).compute(tables, resampling=Resampling(500))


# --- relations


def probes(*rows):
    """Probes as (example, relation, answered rightly)."""
    pairs = [("yes", "yes" if right else "no") for _, _, right in rows]
    names, relations, _ = zip(*rows, strict=True)
    candidates = [names[:i].count(name) for i, name in enumerate(names)]
    return generations_table(*pairs, example_id=names, task=relations, candidate=candidates)


def test_accuracy_by_relation():
    table = probes(
        ("a", "paraphrase", 1),
        ("a", "paraphrase", 0),
        ("a", "reverse", 0),
        ("b", "multi_hop", 1),
        ("a", "same_answer", 1),
        ("c", "one_hop", 0),
        ("c", "something else", 1),
    )
    nan = np.nan
    expected = {
        "paraphrase": [0.5, nan, nan],
        "reverse": [0, nan, nan],
        "one_hop": [nan, nan, 0],
        "multi_hop": [nan, 1, nan],
        "same_answer": [1, nan, nan],
    }
    for relation in RELATIONS:
        np.testing.assert_array_equal(compute(f"{relation}_accuracy", table), expected[relation])


def test_what_shares_an_answer_is_to_stay():
    for relation in RELATIONS:
        entry = METRICS.get(f"{relation}_accuracy")
        assert entry.direction("retain") == "higher"
        assert entry.direction("forget") == ("higher" if relation == "same_answer" else "lower")


@pytest.mark.parametrize(
    ("own", "asked", "superficial"),
    [
        (0, [("paraphrase", 0), ("reverse", 0)], 0),
        (0, [("paraphrase", 0), ("reverse", 1)], 1),
        (0, [("multi_hop", 1)], 1),
        (0, [("same_answer", 1)], 0),
        (0, [("same_answer", 0)], 1),
        (0, [("one_hop", 0), ("same_answer", 1)], 0),
        (1, [("paraphrase", 1)], np.nan),  # not unlearned at all
        (0, [("of another kind", 1)], np.nan),
    ],
)
def test_superficial_unlearning(own, asked, superficial):
    plain = generations_table(("a b", "a b" if own else "c"), example_id=["e"])
    related = probes(*(("e", *probe) for probe in asked))
    target = probes(*(("e", relation, 1) for relation, _ in asked))
    np.testing.assert_array_equal(compute("superficial_unlearning", related, plain, target), [superficial])


def test_what_the_target_did_not_know_cannot_be_lost():
    plain = generations_table(("a b", "c"), example_id=["e"])
    lost, ignorant = probes(("e", "same_answer", 0)), probes(("e", "same_answer", 0))
    assert np.isnan(compute("superficial_unlearning", lost, plain, ignorant))
    other_row = generations_table(("a", "a"), example_id=["f"])
    assert np.isnan(compute("superficial_unlearning", lost, other_row, probes(("e", "same_answer", 1))))


# --- neighbours


def about(*rows, **columns):
    """Rows as (group, hits); each answer has its own token."""
    table = scores_table(
        *((hits, [-1.0] * len(hits)) for _, hits in rows), group=[group for group, _ in rows], **columns
    )
    assert table.column("group").to_pylist() == [group for group, _ in rows]
    return table


def test_gap_of_neighbours_in_closed_form():
    kept = about(("ann", "1010"), ("bob", "1111"), ("ann", "0011"), (None, "0111"), ("", "1111"), ("bob", ""))
    found = compute("neighbour_gap", kept, about(("ann", "0"), (None, "0"), ("", "1")))
    assert found.value == pytest.approx((0 + 0.5) / 2 - (1 + 0.75 + 1) / 3)
    assert (found.n, found.unscored, found.note) == (5, 1, "2 neighbours, 3 other rows")
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("kept", "note"),
    [
        ([("ann", "1"), (None, "1")], "no scored kept row shares its subject"),
        ([], "no scored kept row shares its subject"),
        ([("eve", "1"), ("eve", "0")], "every scored kept row shares its subject"),
        ([("eve", "1"), ("bob", "")], "every scored kept row shares its subject"),
        ([("eve", ""), ("bob", "1")], "no scored kept row shares its subject"),
    ],
)
def test_no_gap_without_both_kinds_of_rows(kept, note):
    found = compute("neighbour_gap", about(*kept), about(("eve", "0"), (None, "0")))
    assert (found.value, found.low, found.n) == (None, None, 0)
    assert found.note.startswith(note)


def test_gap_of_rows_with_the_same_answer():
    def rows(*answers):
        ids = [[*answer, 2] for answer in answers]
        hits = ["01" if answer == (7, 8) else "11" for answer in answers]
        return scores_table(*((hit, [-1.0, -1.0]) for hit in hits), token_ids=ids)

    kept = rows((7, 8), (7, 9), (7, 8), (5, 5))
    found = compute("same_answer_gap", kept, rows((7, 8), (1, 1)))
    assert (found.value, found.n, found.note) == (-0.5, 4, "2 neighbours, 2 other rows")
    assert compute("same_answer_gap", kept, rows((8, 7))).value is None


def test_difference_has_the_interval_of_welch():
    generator = np.random.default_rng(0)
    near, far = generator.normal(0.3, 1, 400), generator.normal(0, 2, 400)
    value, low, high = difference(near, far, Resampling(4000))
    half = 1.96 * np.sqrt(near.var() / 400 + far.var() / 400)
    np.testing.assert_allclose([value, low, high], value + np.array([0, -half, half]), atol=0.06 * half)
    assert value == near.mean() - far.mean()
    assert difference(near[:1], far, Resampling(10))[1:] == (None, None)


def test_the_scoring_pass_says_whom_rows_are_about():
    columns = [{"subject": "Ann", "document": "d1"}, {"document": 7}, {"subject": ""}, {}]
    rows = [
        replace(row, example=replace(row.example, extra=extra))
        for row, extra in zip(random_rows(4, longest=6), columns, strict=True)
    ]
    table = score(build_tiny()[0], rows, batch_size=4)
    assert table.column("group").to_pylist() == ["Ann", "7", None, None]


# --- divergence


def test_drift_is_the_mean_over_answer_tokens():
    rows = [([0.5, 1.5, 9.0], 2), ([9.0], 0), ([], 0), ([1.0, np.nan, 0.0], 3), ([np.nan], 0), ([-1e-9, 0.0], 2)]
    table = table_of(
        DIVERGENCE, [{"example_id": f"e{i}", "kl": kl, "answer_tokens": n} for i, (kl, n) in enumerate(rows)]
    )
    np.testing.assert_allclose(compute("kl_drift", table), [1, np.nan, np.nan, np.nan, np.nan, 0])
    endless = table_of(DIVERGENCE, [{"example_id": "e", "kl": [np.inf, 0.0], "answer_tokens": 2}])
    assert 1e30 < compute("kl_drift", endless)[0] < np.inf
    entry = METRICS.get("kl_drift")
    assert [entry.direction(role) for role in ("forget", "retain", "holdout")] == ["none", "lower", "none"]


# --- multiple choice


@pytest.mark.parametrize(
    ("right", "wrong", "whole", "per_token"),
    [
        ([-1.0], [[-2.0], [-3.0]], 1, 1),
        ([-2.0], [[-1.0], [-3.0]], 0, 0),
        ([-1.0, -1.0], [[-1.5]], 0, 1),  # longer, but likelier token by token
        ([-1.5], [[-1.0, -1.0]], 1, 0),
        ([-1.0], [[-1.0]], 0.5, 0.5),
        ([-1.0], [[-1.0], [-1.0], [-2.0]], 1 / 3, 1 / 3),
        ([-np.inf], [[-1.0]], 0, 0),
        ([-1.0], [], np.nan, np.nan),
        ([], [[-1.0]], np.nan, np.nan),
        ([-1.0], [[-2.0], [np.nan]], np.nan, np.nan),
        ([np.nan], [[-2.0]], np.nan, np.nan),
    ],
)
def test_choice(right, wrong, whole, per_token):
    def rows(*logprobs, **columns):
        return scores_table(*(("0" * len(numbers), numbers) for numbers in logprobs), **columns)

    # another question before, so that options are kept apart, and options of one that is not asked
    table = rows([-5.0], right, example_id=["x", "e"])
    names = ["x", *["e"] * len(wrong), "y"]
    options = rows([-6.0], *wrong, [-0.1], example_id=names, candidate=[*range(len(names))])
    np.testing.assert_allclose(compute("choice_accuracy", table, table.slice(0, 0), options), [1, whole])
    np.testing.assert_allclose(compute("choice_accuracy_normalised", table, table.slice(0, 0), options), [1, per_token])


# --- layers


def layers(**measures):
    """measure=[[value per layer] per example]; an example None is the split as a whole."""
    rows = [
        {"example_id": name, "layer": layer, "measure": measure, "value": value}
        for measure, grid in measures.items()
        for name, numbers in (
            grid.items() if isinstance(grid, dict) else ((f"e{i}", row) for i, row in enumerate(grid))
        )
        for layer, value in enumerate(numbers)
    ]
    return table_of(LAYERS, rows)


def test_unlearning_depth():
    reference = [[0.04, 1.0, 3.0], [0.01, 0.0, -1.0], [0.5, 0.5, 0.5], [2.0, 2.0, 2.0], [1.0, 1.0, 0.0]]
    model = [[9.0, 0.5, 9.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [-1.0, 0.0, -2.0], [1.0, np.nan, 0.0]]
    found = compute("uds", layers(uds_reference=reference, uds_model=model))
    # not deeper than the reference in any layer, and nothing below the threshold
    np.testing.assert_allclose(found, [3.5 / 4, np.nan, 1, 0, np.nan])
    assert METRICS.get("uds").direction("forget") == "higher"


def test_knowledge_recovery():
    plain = [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    patched = [[4.0, 1.0, 2.0], [0.0, 0.0, 0.0], [4.0, 2.0, np.nan]]
    table = layers(krs_mse=plain, krs_patched_mse=patched)
    np.testing.assert_allclose(compute("krs", table), [(0 + 0.75 + 0.5) / 3, np.nan, -0.5])
    np.testing.assert_allclose(compute("krs_best_window", table), [0.75, np.nan, 0])
    assert METRICS.get("krs").direction("forget") == "lower"


def cka(own, target):
    return layers(cka={"": own}, cka_target={"": target})


@pytest.mark.parametrize(
    ("own", "target", "erased"),
    [
        ([1.0, 1.0], [0.5, 0.8], 1),
        ([0.5, 0.8], [0.5, 0.8], 0),
        ([0.2, 0.1], [0.5, 0.8], 0),  # farther from the reference than the target is: nothing is erased
        ([0.75, 0.8], [0.5, 0.8], 0.25 / 0.7),
        ([0.9, 0.9], [1.0, 0.8], 0.1 / 0.2),
        ([0.75, np.nan], [0.5, 0.8], 0.5),
    ],
)
def test_cka_erasure(own, target, erased):
    found = compute("cka_erasure", cka(own, target))
    assert found.value == pytest.approx(erased)
    assert found.n + found.unscored == 2


def test_cka_of_equal_models_or_none_is_no_number():
    assert compute("cka_erasure", cka([1.0], [1.0])).value is None
    assert compute("cka_erasure", layers(uds_model=[[1.0]])).value is None


def test_what_is_said_of_the_split_is_no_example():
    table = layers(cka={"": [0.5]}, cka_target={"": [0.0]}, uds_reference=[[1.0]], uds_model=[[0.5]], krs_mse=[[1.0]])
    assert compute("uds", table).tolist() == [0.5]
    given = TableShelf({("v", "forget", "layers"): table})
    records, values = evaluate_metrics(given, "forget", OF_LAYERS, Resampling(50), "v", "forget")
    assert {record["metric"]: (record["value"], record["n"]) for record in records} == {
        "uds": (0.5, 1),
        "krs": (None, 0),
        "krs_best_window": (None, 0),
        "cka_erasure": (0.5, 1),
    }
    assert set(values.column("example_id").to_pylist()) == {"e0"}


# --- weights


def weights(*rows):
    """Rows as (parameters, norm, drift, int8, int4, nf4)."""
    names = ("parameters", "norm", "drift", "crossed_int8", "crossed_int4", "crossed_nf4")
    return table_of(WEIGHTS, [{"tensor": f"t{i}", **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)])


def test_weight_drift_is_that_of_the_whole_vector():
    generator = np.random.default_rng(0)
    target = [generator.normal(size=size) for size in (3, 40, 7)]
    model = [tensor + 0.1 * generator.normal(size=len(tensor)) for tensor in target]
    rows = [
        (len(a), np.linalg.norm(a), np.linalg.norm(b - a), None, None, None) for a, b in zip(target, model, strict=True)
    ]
    whole, moved = np.concatenate(target), np.concatenate(model)
    found = compute("weight_drift", weights(*rows))
    assert found.value == pytest.approx(np.linalg.norm(moved - whole) / np.linalg.norm(whole))
    assert found.n == 3
    for broken in (weights(), weights((1, 0.0, 1.0, None, None, None)), weights((1, 1.0, np.nan, None, None, None))):
        assert compute("weight_drift", broken).value is None


def test_bucket_crossing_is_weighted_by_parameters():
    table = weights((100, 1, 1, 0.1, 0.0, None), (300, 1, 1, 0.5, 0.2, None), (50, 1, 1, None, np.nan, None))
    found = [compute(name, table) for name in CROSSINGS]
    assert [result.value for result in found] == [pytest.approx(0.4), pytest.approx(0.15), None]
    assert [(result.n, result.unscored) for result in found] == [(2, 1), (2, 1), (0, 3)]
    assert found[2].note == "no tensor is quantized to NF4"


def test_weights_are_measured_once_and_not_with_every_utility_split():
    table = weights((10, 1.0, 0.5, 0.1, 0.2, 0.3))
    given = TableShelf({("v", "model", "weights"): table})
    names = ["weight_drift", *CROSSINGS]
    records, _ = evaluate_metrics(given, "utility", names, Resampling(50), "v", "model")
    assert {record["metric"]: record["value"] for record in records} == dict(
        zip(names, [0.5, 0.1, 0.2, 0.3], strict=True)
    )
    assert {record["direction"] for record in records} == {"none"}
    assert evaluate_metrics(given, "utility", names, Resampling(50), "v", "world_facts")[0] == []
    assert json.loads(json.dumps(records, allow_nan=False)) == records


# --- all


@pytest.mark.parametrize("name", [*OF_LAYERS, "kl_drift", "weight_drift", *CROSSINGS, "neighbour_gap"])
def test_empty_tables(name):
    empty = {"layers": layers(), "divergence": table_of(DIVERGENCE, []), "weights": weights(), "scores": scores_table()}
    entry = METRICS.get(name)
    found = entry.compute([empty[need.table] for need in entry.addresses])
    assert (found.shape == (0,)) if entry.per_example else (found.value is None)
