"""Weights and densities that differ from parameter to parameter: numbers, lists over the layers, maps of patterns."""

from __future__ import annotations

import json

import pytest
import torch

from expunge.errors import UserError
from expunge.merging.plan import plan_merge
from expunge.merging.run import merge_models
from expunge.merging.values import Values
from expunge.models.names import layer_of, layers_in
from merging_models import assert_equal, weights

pytestmark = pytest.mark.usefixtures("quick_disk")

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", 11),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("gpt_neox.layers.0.attention.dense.weight", 0),
        ("model.decoder.layers.7.fc1.weight", 7),
        ("transformer.blocks.2.ffn.weight", 2),
        ("model.layers.4.block_sparse_moe.experts.6.w1.weight", 4),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_layer_stands_in_the_name(name, layer):
    assert layer_of(name) == layer


def test_layers_are_counted_by_the_highest():
    assert layers_in(LLAMA) == 3
    assert layers_in(["lm_head.weight"]) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [0.5] * 8),
        ([1.0, 2.0, 3.0], [1, 1, 1, 2, 2, 3, 3, 3]),
        ({"mlp": 0.3, "default": 1}, [1, 1, 0.3, 1, 0.3, 0.3, 1, 1]),
        ({"mlp": [1, 2, 3], "default": 0.0}, [0, 0, 1, 0, 2, 3, 0, 0]),
        ({r"layers\.1\.": 0.1, "mlp": 0.3, "default": [7, 8, 9]}, [7, 7, 0.3, 0.1, 0.1, 0.3, 9, 9]),
        ({"mlp": 0.3, r"layers\.1\.": 0.1, "default": 1.0}, [1, 1, 0.3, 0.1, 0.3, 0.3, 1, 1]),
    ],
)
def test_a_number_a_list_or_a_map_for_each_model(value, expected):
    values = Values.of("weights", [value, 4.0], 2, 1.0)
    assert [values.at(name, 3) for name in LLAMA] == [[number, 4.0] for number in expected]
    values.check(LLAMA)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("transformer.word_embeddings.weight", True),
        ("transformer.word_embeddings_layernorm.weight", True),
        ("model.decoder.embed_positions.weight", True),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("lm_head.weight", False),
        ("gpt_neox.embed_out.weight", False),
        ("output.weight", False),
    ],
)
def test_outside_the_layers_the_first_or_the_last_number_counts(name, first):
    assert Values.of("density", [[0.1, 0.5, 0.9]], 1, 1.0).at(name, 3) == [0.1 if first else 0.9]


@pytest.mark.parametrize(
    ("given", "models", "expected"),
    [
        (None, 2, [1.0, 1.0]),
        (0.5, 3, [0.5, 0.5, 0.5]),
        ([0.5, 0.25], 2, [0.5, 0.25]),
        ({"default": 0.5}, 2, [0.5, 0.5]),
        ((1, 2), 2, [1.0, 2.0]),
        ([[0.5, 0.5, 0.75], 0.1], 2, [0.5, 0.1]),
    ],
)
def test_one_value_for_all_models_or_one_each(given, models, expected):
    assert Values.of("density", given, models, 1.0).at(LLAMA[1], 3) == expected


BAD = {
    "too few": ([1.0], 2, "1 densities for 2 models"),
    "too many": ([0.5] * 3, 2, "3 densities for 2 models"),
    "text": ("0.5", 1, "'0.5' is neither a number, a list nor a map"),
    "text inside": (["0.5"], 1, "'0.5' is neither a number"),
    "truth": ([True], 1, "True is neither a number"),
    "nothing inside": ([None], 1, "None is neither a number"),
    "NaN": ([float("nan")], 1, "density must be finite, not nan"),
    "infinite in a list": ([[0.5, float("inf")]], 1, r"must be finite, not \[0.5, inf\]"),
    "words in a list": ([[0.5, "much"]], 1, "no list of numbers"),
    "truth in a list": ([[0.5, True]], 1, "no list of numbers"),
    "map in a list": ([[0.5, {"default": 1}]], 1, "no list of numbers"),
    "empty list": ([[]], 1, "list over the layers is empty"),
    "map without default": ({"mlp": 0.5}, 1, "a map needs a number for all other parameters"),
    "broken pattern": ({"mlp(": 0.5, "default": 1}, 1, r"'mlp\(' is not a regular expression"),
    "map in a map": ({"default": {"default": 1}}, 1, "no number and no list of numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_values_are_refused_with_a_sentence(what):
    given, models, sentence = BAD[what]
    with pytest.raises(UserError, match=sentence) as caught:
        Values.of("density", given, models, 1.0)
    assert caught.value.hint


@pytest.mark.parametrize("value", [[0.5, 0.5], [0.5] * 4, {"mlp": [0.5, 0.5], "default": 1.0}])
def test_a_list_has_as_many_numbers_as_the_model_has_layers(value):
    with pytest.raises(UserError, match=f"density: {4 if len(value) == 4 else 2} numbers for a model of 3") as caught:
        Values.of("density", [value], 1, 1.0).check(LLAMA)
    assert "the embedding takes the first, norm and head the last" in caught.value.hint


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="density: no parameter matches experts"):
        Values.of("density", {"experts": 0.5, "default": 1.0}, 1, 1.0).check(LLAMA)


@pytest.mark.parametrize(
    "density", [0.0, -0.5, 1.5, [[0.5, 0.0], 0.5], {"mlp": 1.01, "default": 1.0}, {"mlp": [1.0, 2.0], "default": 1.0}]
)
def test_every_density_must_be_a_part_of_the_whole(density):
    with pytest.raises(UserError, match="is not a part of the whole"):
        plan_merge("ties", 2, density=density)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": [[1.0, 1.0, 1.0], 1.0]}, "weights: 3 numbers for a model of 2 layers"),
        ({"density": {"experts": 0.5, "default": 1.0}}, "density: no parameter matches experts"),
        ({"method": "della", "density": [{"mlp": 0.9, "default": 0.5}] * 2}, "epsilon 0.15 around density 0.9"),
        ({"method": "linear", "weights": [[1.0, 1.0], [0.0, -1.0]]}, "sum of the weights, which is 0"),
        ({"density": [[0.5, 0.6], 0.5], "parameters": {"scope": "model"}}, "scope=model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(three, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        merge_models([three / "a", three / "b"], three / "out", base=three / "base", **settings)
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]


def test_lists_and_maps_merge_each_parameter_with_its_own_numbers(three):
    factors = [[1.0, 0.5], {r"mlp\..*weight": -0.25, "lm_head": [0.0, 2.0], "default": 0.75}]
    merge_models(
        [three / "a", three / "b"], three / "out", base=three / "base", method="task_arithmetic", weights=factors
    )
    base, one, two = (weights(three / name) for name in ("base", "a", "b"))
    expected = {}
    for name, start in base.items():
        first = 1.0 if "layers.0." in name or "embed" in name else 0.5
        second = -0.25 if ".mlp." in name else 2.0 if name == "lm_head.weight" else 0.75
        expected[name] = start + first * (one[name] - start) + second * (two[name] - start)
    assert_equal(weights(three / "out"), expected, 1e-6)
    recorded = json.loads((three / "out" / "merge.json").read_text())
    assert [model["weight"] for model in recorded["models"]] == factors


def test_densities_along_the_layers_trim_each_layer_by_its_own(three):
    settings = {"method": "magnitude_prune", "density": [[1.0, 0.25]]}
    merge_models([three / "a"], three / "out", base=three / "base", **settings)
    base, merged = weights(three / "base"), weights(three / "out")
    for name, start in base.items():
        kept = (merged[name] != start).float().mean().item()
        part = 1.0 if "layers.0." in name or "embed" in name else 0.25
        assert kept == pytest.approx(part, abs=0.03), name
        assert torch.isfinite(merged[name]).all()
