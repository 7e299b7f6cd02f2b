"""What holds for every merge method: invariants, refusals, and what it declares."""

from __future__ import annotations

import math
import re

import pytest
import torch

from expunge.cli.list_ import described
from expunge.errors import UserError
from expunge.merging.plan import plan_merge
from expunge.merging.registry import MERGES
from expunge.merging.run import merge_models
from merging_deltas import DRAW, SHAPES, random_deltas
from merging_models import assert_equal, weights

# ---------------------------------------------------------------- invariants of every method

#: What equal differences Δ become with the weights w, as a factor on Δ, where it is not 1.
FACTORS = {
    "task_arithmetic": sum,
    "dare_linear": sum,
    "magnitude_prune": sum,
    "breadcrumbs": sum,
    "negmerge": lambda factors: -1,
}


def call(name, deltas, factors=None, density=None, **settings):
    """The method on as many of the deltas as it takes, with 1 for weights that it has no use for."""
    entry = MERGES.get(name)
    most = entry.models[1] or len(deltas)
    deltas = deltas[:most]
    factors = (factors if entry.weighs and factors else [1.0] * most)[:most]
    if entry.random:
        settings.setdefault("draw", DRAW)
    return entry.function(deltas, factors, (density or [1.0] * most)[:most], **settings)


@pytest.mark.parametrize("name", MERGES.names())
@pytest.mark.parametrize("shape", SHAPES)
def test_methods_leave_their_inputs_alone_and_treat_models_alike(name, shape):
    count = MERGES.get(name).models[1] or 3
    deltas = random_deltas(shape, count)
    before = [delta.clone() for delta in deltas]
    factors, density = [1.0, 2.0, 0.5][:count], [0.5, 0.7, 1.0][:count]
    merged = call(name, deltas, factors, density)
    assert merged.shape == torch.Size(shape)
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()
    assert all(torch.equal(one, two) for one, two in zip(deltas, before, strict=True))
    assert all(merged.data_ptr() != delta.data_ptr() for delta in deltas)
    if not MERGES.get(name).random:  # there each model has its own chance
        swapped = call(name, deltas[::-1], factors[::-1], density[::-1])
        torch.testing.assert_close(merged, swapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MERGES.names())
def test_equal_models_stay_what_they_are(name):
    (delta,) = random_deltas((30, 20), 1)
    least, most = MERGES.get(name).models
    for count in {least, most or 3}:
        factors = [1.0, 0.4, 2.0][:count]
        whole = FACTORS.get(name, lambda factors: 1)(factors)
        torch.testing.assert_close(call(name, [delta] * count, factors), whole * delta)


@pytest.mark.parametrize("name", MERGES.names())
def test_methods_are_equivariant_under_sign_and_scale(name):
    deltas = random_deltas((15, 20), 2)
    merged = call(name, deltas, density=[0.8, 0.8])
    torch.testing.assert_close(call(name, [-4 * delta for delta in deltas], density=[0.8, 0.8]), -4 * merged)


@pytest.mark.parametrize("name", MERGES.names())
def test_where_nothing_changes_nothing_is_merged(name):
    count = MERGES.get(name).models[1] or 2
    assert not call(name, [torch.zeros(6, 4)] * count, density=[0.5] * count).any()


@pytest.mark.parametrize("name", [name for name, entry in MERGES.items() if entry.models[0] < 2])
def test_a_model_without_weight_has_no_say(name):
    one, two = random_deltas((15, 20), 2)
    if MERGES.get(name).models[1] == 1:
        pytest.skip("takes one model")
    torch.testing.assert_close(
        call(name, [one, two], [1.5, 0.0], [0.7, 0.7]), call(name, [one], [1.5], [0.7]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", MERGES.names())
def test_merged_checkpoints_are_what_the_method_gives(name, three, quick_disk):
    entry = MERGES.get(name)
    inputs = [three / part for part in "ab"[: entry.models[1] or 2]]
    settings = {"weights": [1.0, 0.5], "density": [0.8, 0.6]} if entry.weighs else {"density": 0.8}
    merge_models(inputs, three / "out", base=three / "base", method=name, parameters={"scale": 0.5}, **settings)
    plan = plan_merge(name, len(inputs), **settings)
    base, merged = weights(three / "base"), weights(three / "out")
    models = [weights(folder) for folder in inputs]
    expected = {}
    for tensor, start in base.items():
        given = [[*values.at(tensor, 2)] for values in (plan.weights, plan.density)]
        expected[tensor] = start + 0.5 * plan.merged([model[tensor] - start for model in models], *given, tensor)
    assert_equal(merged, expected, 1e-6)


# ---------------------------------------------------------------- wrong numbers of models, weights without use


@pytest.mark.parametrize(
    ("name", "models", "message"),
    [
        ("slerp", 1, "slerp merges 2 models, not 1"),
        ("slerp", 3, "slerp merges 2 models, not 3"),
        ("model_stock", 1, "model_stock merges at least 2 models, not 1"),
        ("sce", 1, "sce merges at least 2 models, not 1"),
        ("negmerge", 1, "negmerge merges at least 2 models, not 1"),
        ("uwc_mix", 2, "uwc_mix merges 1 model, not 2"),
    ],
)
def test_the_number_of_models_must_fit(name, models, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_merge(name, models)
    assert "expunge list merges" in caught.value.hint


@pytest.mark.parametrize("name", [name for name, entry in MERGES.items() if not entry.weighs])
def test_weights_without_use_are_refused(name):
    models = MERGES.get(name).models[0]
    plan_merge(name, models, [1.0] * models)
    with pytest.raises(UserError, match=f"{name} uses no weights"):
        plan_merge(name, models, [0.5] * models)


@pytest.mark.parametrize(
    ("name", "factors", "parameters"),
    [
        ("linear", [1.0, -1.0], {}),
        ("task_arithmetic", [1.0, -1.0], {"normalize": True}),
        ("dare_linear", [0.0, 0.0], {"normalize": True}),
        ("magnitude_prune", [2.0, -2.0], {"normalize": True}),
        ("breadcrumbs", [2.0, -2.0], {"normalize": True}),
        ("della", [2.0, -2.0], {"sign": "none"}),
        ("slerp", [0.0, 0.0], {}),
        ("linear", [[1.0, 1.0], [0.0, -1.0]], {}),
    ],
)
def test_weights_that_cancel_are_refused_where_they_divide(name, factors, parameters):
    with pytest.raises(UserError, match="sum of the weights, which is 0"):
        plan_merge(name, 2, factors, 0.8, parameters)
    if parameters:
        plan_merge(name, 2, factors, 0.8)


def test_slerp_refuses_negative_weights():
    with pytest.raises(UserError, match="weight -1 is negative"):
        plan_merge("slerp", 2, [2.0, -1.0])


def test_weights_in_a_map_are_checked_when_the_parameters_are_known():
    plan = plan_merge("linear", 2, [{"mlp": 1.0, "default": 1.0}, {"mlp": -1.0, "default": 1.0}])
    plan.check(["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(UserError, match="sum of the weights, which is 0"):
        plan.check(["model.layers.0.mlp.up_proj.weight"])


# ---------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("name", "given", "message", "hint"),
    [
        ("ties", {"signs": "total"}, "unknown parameter 'signs'", "did you mean 'sign'"),
        ("ties", {"sign": "majority"}, "sign is majority, which is not: total | frequency", "expunge list merges ties"),
        ("ties", {"scale": math.nan}, "finite", "expunge list merges ties"),
        ("ties", {"scope": "layer"}, "scope", "expunge list merges ties"),
        ("ties", {"normalize": "sometimes"}, "normalize", "expunge list merges ties"),
        ("linear", {"scope": "model"}, "scope is model, which is not: tensor | factor", "expunge list merges"),
        ("dare_ties", {"scope": "model"}, "scope is model, which is not: tensor | factor", "expunge list merges"),
        ("slerp", {"t": 1.5}, "t is 1.5, which is not: number ≥ 0 ≤ 1", "expunge list merges slerp"),
        ("della", {"epsilon": 0.5}, "epsilon", "expunge list merges della"),
        ("breadcrumbs", {"gamma": -0.1}, "gamma", "expunge list merges breadcrumbs"),
        ("sce", {"select_topk": 0}, "select_topk", "expunge list merges sce"),
        ("uwc_mix", {"alpha": 2}, "alpha", "expunge list merges uwc_mix"),
        ("ties", {"seed": 1}, "unknown parameter 'seed'", "valid: normalize"),
        ("linear", {"scale": "much"}, "scale", "expunge list merges linear"),
    ],
)
def test_parameters_are_checked_with_a_sentence_and_a_hint(name, given, message, hint):
    with pytest.raises(UserError) as caught:
        MERGES.get(name).check(given)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", MERGES.names())
def test_every_method_describes_itself(name):
    about = MERGES.get(name).describe()
    assert next(iter(about)) == "summary"
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|doi:10\.\S+", about["paper"])
    for parameter in MERGES.get(name).check({}):
        assert len(about[f"parameter {parameter}"].partition(": ")[2]) > 10


def test_all_methods_that_were_promised_are_there():
    promised = (
        "linear slerp task_arithmetic ties dare_linear dare_ties della breadcrumbs magnitude_prune model_stock sce "
        "negmerge uwc_mix"
    )
    assert set(promised.split()) <= set(MERGES.names())


def test_the_list_shows_methods_with_their_parameters(capsys):
    table = described("merges")
    assert table["della"]["parameters"] == "epsilon=0.15, sign=total, votes=weighted, normalize=true, rescale=true"
    assert table["slerp"]["parameters"] == "t=none"
    assert table["slerp"]["parameter t"].startswith("number ≥ 0 ≤ 1 | none, default none: ")
    assert table["model_stock"]["parameters"] == "none"
    assert "alpha" in table["uwc_mix"]["summary"]
    assert "expunge calibrate" in table["uwc_mix"]["summary"]
