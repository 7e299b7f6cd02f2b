"""Attacks that change a model in memory: what they do to it, and that nothing of it stays."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attack_world import attack, everything, logits, same, shallow, tiny, world
from expunge.attacks.base import ATTACKS, ModelAttack, World, build_attack
from expunge.errors import UserError
from expunge.models.quantization import SCHEMES, fake_quantized, linear_weights
from scoring_rows import END, random_rows, row
from test_scoring_architectures import KINDS, build

MODEL_ATTACKS = [name for name, cls in ATTACKS.items() if issubclass(cls, ModelAttack)]
CASES = [
    *((name, {}) for name in MODEL_ATTACKS),
    *(("prune", {"variant": variant}) for variant in ("magnitude-global", "wanda", "set-difference")),
    ("quantize", {"schemes": list(SCHEMES)}),
    ("direction_ablation", {"tokens": "last", "to": "zero"}),
]


@pytest.mark.parametrize("name", [name for name in MODEL_ATTACKS if name != "extrapolate"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_are_attacked_and_restored(kind, name):
    model, made = build(kind), attack(name, {})
    around = world(open_reference=None)
    before, plain = everything(model), logits(model)
    with made.applied(model, made.points()[0], around):
        attacked = logits(model)
    assert torch.isfinite(attacked).all()
    assert not torch.equal(attacked, plain)
    assert same(before, everything(model))


def test_the_cases_are_all_model_attacks():
    assert {"quantize", "prune", "extrapolate", "direction_ablation", "logit_lens", "trained_lens"} <= {*MODEL_ATTACKS}


@pytest.mark.parametrize("failing", [False, True], ids=["well", "exception"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_a_model_is_bit_by_bit_what_it_was(name, settings, failing):
    model, made, around = tiny(), attack(name, settings), world()
    before, plain = everything(model), logits(model)
    changed = False
    for point in made.points():
        with pytest.raises(KeyError) if failing else nullcontext(), made.applied(model, point, around) as attacked:
            changed = changed or not torch.equal(logits(attacked), plain)
            if failing:
                raise KeyError("within")
        assert same(before, everything(model)), point.label
        assert torch.equal(logits(model), plain)
    assert changed


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_points_have_names_for_files_and_the_same_attack_is_the_same_again(name, settings):
    made, around = attack(name, settings), world()
    points = made.points()
    assert len({point.label for point in points}) == len(points)
    assert all(set(point.label) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for point in points)
    found = []
    for model in (tiny(), tiny()):
        with torch.inference_mode(), made.applied(model, points[0], around):
            found.append(logits(model))
    assert torch.equal(*found)


def test_quantize_rounds_linear_weights_alone():
    model, made = tiny(), attack("quantize", {"schemes": ["int4-g64"]})
    expected = {
        name: fake_quantized(found.weight, SCHEMES["int4-g64"]) for name, found in linear_weights(model).items()
    }
    before = copy.deepcopy(model.state_dict())
    with made.applied(model, made.points()[0], world()):
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected.get(name, before[name])), name
    with pytest.raises(UserError, match="unknown quantization scheme"):
        attack("quantize", {"schemes": ["int3"]}).points()


def test_quantize_hurts_more_with_fewer_bits():
    model, made = tiny(), attack("quantize", {})
    plain, errors = logits(model), {}
    for point in made.points():
        with made.applied(model, point, world()):
            errors[point.label] = float((logits(model) - plain).norm())
    assert errors["int8"] * 4 < min(errors["nf4"], errors["int4-g128"])


def pruned(model: Any, variant: str, fraction: float, around: World) -> dict[str, torch.Tensor]:
    """Which weights are zero within the attack."""
    made = attack("prune", {"variant": variant, "fractions": [fraction]})
    with made.applied(model, made.points()[0], around):
        return {name: (found.weight == 0).clone() for name, found in linear_weights(model).items()}


def test_magnitude_pruning_removes_the_smallest_of_each_tensor_or_of_all():
    model = tiny()
    sizes = {name: found.weight.detach().abs() for name, found in linear_weights(model).items()}
    for name, zero in pruned(model, "magnitude", 0.3, world()).items():
        assert int(zero.sum()) == round(0.3 * zero.numel())
        assert sizes[name][zero].max() <= sizes[name][~zero].min()
    flat = torch.cat([zero.flatten() for zero in pruned(model, "magnitude-global", 0.3, world()).values()])
    ordered = torch.cat([size.flatten() for size in sizes.values()])
    assert float(flat.double().mean()) == pytest.approx(0.3, abs=1e-4)
    assert ordered[flat].max() <= ordered[~flat].min()


def test_equal_weights_are_pruned_in_the_number_asked_for():
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(0.5)
    zero = pruned(model, "magnitude", 0.5, world())["model.layers.0.mlp.up_proj.weight"]
    assert float(zero.double().mean()) == 0.5


def inputs_of_first_layer(model: Any, rows: list[np.ndarray]) -> torch.Tensor:
    """‖x_j‖ of what enters the first q_proj: normed embeddings of all tokens."""
    first = model.model.layers[0]
    ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    with torch.no_grad():
        return first.input_layernorm(model.model.embed_tokens(ids)).norm(dim=0)


def test_wanda_removes_what_retain_rows_use_least():
    model, around = tiny(), world()
    norms = inputs_of_first_layer(model, [r.input_ids for r in around.rows["retain"]])
    name = "model.layers.0.self_attn.q_proj.weight"
    used = model.get_parameter(name).detach().abs() * norms
    zero = pruned(model, "wanda", 0.25, around)[name]
    assert (zero.sum(1) == 32).all()
    for scores, gone in zip(used, zero, strict=True):
        assert scores[gone].max() <= scores[~gone].min() * (1 + 1e-5)


def test_set_difference_removes_what_forget_prompts_alone_use_and_sees_no_answer():
    model, around = tiny(), world()
    forget = inputs_of_first_layer(model, [r.input_ids[: r.prompt_tokens] for r in around.rows["forget"]])
    retain = inputs_of_first_layer(model, [r.input_ids for r in around.rows["retain"]])
    name = "model.layers.0.self_attn.q_proj.weight"
    size = model.get_parameter(name).detach().abs()
    top = [(size * norms).argsort(1, descending=True)[:, :13] for norms in (forget, retain)]
    zero = pruned(model, "set-difference", 0.1, around)[name]
    for gone, ours, theirs in zip(zero, *top, strict=True):
        assert {*gone.nonzero()[:, 0].tolist()} == {*ours.tolist()} - {*theirs.tolist()}
    assert 0 < float(zero.double().mean()) < 0.1
    others = [row(r.example.id, r.input_ids[: r.prompt_tokens].tolist(), [7], [END]) for r in around.rows["forget"]]
    again = pruned(model, "set-difference", 0.1, replace(around, rows={**around.rows, "forget": others}))
    assert torch.equal(again[name], zero)


def test_extrapolation_is_the_line_through_both_models():
    model, target = tiny(), tiny(1)
    made = attack("extrapolate", {"gammas": [0.5, 0.1, 1.0, 1.5]})
    assert [point.budget for point in made.points()] == [0.1, 0.5, 1.0, 1.5]
    before = copy.deepcopy(dict(model.named_parameters()))
    for point in made.points():
        with made.applied(model, point, world()):
            for name, value in model.named_parameters():
                line = (1 - point.budget) * before[name] + point.budget * target.get_parameter(name)
                torch.testing.assert_close(value, line, atol=1e-6, rtol=1e-5)


def test_extrapolation_in_few_bits_is_rounded_once():
    model, target = tiny().bfloat16(), tiny(1).bfloat16()
    made = attack("extrapolate", {"gammas": [0.1]})
    before = {name: value.detach().float().clone() for name, value in model.named_parameters()}
    with made.applied(model, made.points()[0], world(target=lambda name: target.get_parameter(name).detach())):
        for name, value in model.named_parameters():
            line = before[name] + 0.1 * (target.get_parameter(name).detach().float() - before[name])
            assert torch.equal(value, line.bfloat16()), name


@pytest.mark.parametrize(
    ("name", "settings", "given", "message"),
    [
        ("extrapolate", {}, {"target": None}, "needs the target"),
        ("extrapolate", {}, {"target": lambda name: torch.zeros(3)}, r"is \(3,\) in the target"),
        ("trained_lens", {}, {"rows": {}}, "needs retain rows"),
        ("prune", {"variant": "wanda"}, {"rows": {}}, "needs retain rows"),
        ("prune", {"variant": "set-difference"}, {"rows": {"retain": random_rows(2)}}, "needs forget rows"),
        ("direction_ablation", {}, {"rows": {}}, "no row with an answer"),
        ("direction_ablation", {}, {"open_reference": lambda: nullcontext(shallow())}, "number of layers"),
    ],
)
def test_what_is_missing_is_said_and_nothing_changed(name, settings, given, message):
    model, made = tiny(), attack(name, settings)
    before = everything(model)
    with pytest.raises(UserError, match=message), made.applied(model, made.points()[0], world(**given)):
        pass
    assert same(before, everything(model))


@pytest.mark.parametrize("name", ["logit_lens", "trained_lens", "direction_ablation"])
def test_architectures_without_a_list_of_layers_are_refused(name):
    model, made = tiny(), attack(name, {})
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="decoder layers"), made.applied(model, made.points()[0], world()):
        pass


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quantize", {"schemes": []}),
        ("prune", {"fractions": [1.0]}),
        ("prune", {"variant": "small"}),
        ("extrapolate", {"gammas": [0.0]}),
        ("logit_lens", {"depths": [1.1]}),
        ("trained_lens", {"steps": -1}),
        ("direction_ablation", {"tokens": "all"}),
    ],
)
def test_settings_out_of_bounds_are_refused(name, settings):
    with pytest.raises(UserError, match=f"attack {name}"):
        build_attack(name, settings)


@pytest.mark.parametrize(("beside", "rows"), [("nothing", 7), ("retain", 19)])
def test_relearning_trains_on_the_retain_rows_too_where_it_is_asked_to(beside, rows):
    given = world()
    lesson = build_attack("relearn", {"beside": beside}).lesson(given)
    assert len(lesson.rows) == rows
    assert lesson.measured is None
    trained = {row.example.id for row in lesson.rows}
    assert {row.example.id for row in given.rows["forget"]} <= trained
