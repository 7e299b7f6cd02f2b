"""Attributions against direct computations on small models, and what their passes leave behind."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.errors import UserError
from expunge.localize import evidence as evidence_module
from expunge.localize import squares as squares_module
from expunge.localize.base import ATTRIBUTIONS, build_attribution
from expunge.localize.evidence import Evidence
from expunge.localize.locate import check_fit, locate, read_scores, scores_file, write_scores
from expunge.localize.masks import read_mask
from expunge.localize.units import FLAT, units_of
from expunge.models import storage
from merging_models import gpt2, llama
from scoring_rows import lively
from training_rows import rows

ROWS = {"forget": rows(7, 1, vocabulary=60), "retain": rows(9, 2, vocabulary=60)}
MODELS = {"llama": lambda: llama(1, attention_bias=True, mlp_bias=True), "gpt2": lambda: gpt2(1)}
UNITS = ["weight", "value_vector", "neuron", "head", "module", "layer"]
MU, EPSILON = 1e-2, 1e-6

Gradients = dict[str, torch.Tensor]


@cache
def model(name: str) -> Any:
    return lively(MODELS[name]())


def evidence(name: str, unit: str = "module", **changes: Any) -> Evidence:
    given = {"batch_size": 3, **changes}
    return Evidence(model(name), given.pop("rows", ROWS), units_of(model(name), unit), unit=unit, **given)


def gradients_of(network: Any, row: Encoded) -> Gradients:
    """One row, unpadded, through all of the model: the summed loss of its answer, and autograd."""
    ids = torch.from_numpy(row.input_ids).long()
    logits = network(input_ids=ids[None]).logits[0, row.prompt_tokens - 1 : -1]
    named = dict(network.named_parameters())
    loss = cross_entropy(logits.double(), ids[row.prompt_tokens :], reduction="sum")
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


@cache
def naive(name: str, split: str) -> tuple[Gradients, Gradients]:
    """Sum, and sum of squares, of the rows' gradients."""
    return summed(model(name), ROWS[split])


def summed(network: Any, given: list[Encoded]) -> tuple[Gradients, Gradients]:
    each = [gradients_of(network, row) for row in given]
    plain = {key: torch.stack([one[key].double() for one in each]).sum(0) for key in each[0]}
    square = {key: torch.stack([one[key].double() for one in each]).square().sum(0) for key in each[0]}
    return plain, square


def directly(attribution: str, name: str) -> Gradients:
    """What an attribution is by its formula."""
    theta = {key: value.detach().double() for key, value in model(name).named_parameters()}
    (forget, forget_squares), (retain, retain_squares) = naive(name, "forget"), naive(name, "retain")
    formulas = {
        "magnitude": lambda key: theta[key].abs(),
        "gradient": lambda key: forget[key].abs(),
        "gradient_times_weight": lambda key: (theta[key] * forget[key]).abs(),
        "del": lambda key: (theta[key] * forget[key]).abs(),
        "wagle": lambda key: ((theta[key] - retain[key] / MU) * forget[key]).abs(),
        "fisher": lambda key: forget_squares[key],
        "relative fisher": lambda key: forget_squares[key] / (retain_squares[key] + EPSILON),
    }
    return {key: formulas[attribution](key) for key in theta}


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wagle": ("wagle", {"mu": MU}),
    "relative fisher": ("fisher", {"relative": True, "epsilon": EPSILON}),
}
PER_WEIGHT = ["magnitude", "gradient", "gradient_times_weight", "del", "wagle", "fisher", "relative fisher"]


def built(attribution: str) -> Any:
    return build_attribution(*SETTINGS.get(attribution, (attribution, {})))


def assert_close(found: Any, expected: Gradients, tolerance: float = 2e-4) -> None:
    """Equal up to the rounding of sums in float32, relative to the largest entry of a parameter."""
    for key, value in found.items():
        assert value.dtype == torch.float32, key
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(value.double(), expected[key].expand(value.shape), rtol=1e-3, atol=tolerance * scale)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attribution", PER_WEIGHT)
def test_scores_are_those_of_the_formula(attribution: str, name: str) -> None:
    for unit in ("module", "layer"):
        given = evidence(name, unit)
        found = built(attribution).saliency(given)
        assert found.keys() == given.parameters.keys()
        assert all(found[key].shape == given.parameters[key].shape for key in found)
        assert_close(found, directly(attribution, name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", UNITS)
def test_squares_are_those_of_rows_for_every_unit(unit: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if unit != "layer":  # which has norms: all else must not need a pass for each row
        monkeypatch.setattr(squares_module, "_by_row", None)
    monkeypatch.setitem(squares_module.BLOCK, "cpu", 100)  # several blocks for each matrix
    assert_close(evidence(name, unit).squares("retain"), naive(name, "retain")[1])


def test_squares_of_a_layer_that_runs_twice_go_row_by_row() -> None:
    network = lively(llama(2))
    network.model.layers[1].mlp.down_proj = network.model.layers[0].mlp.down_proj
    given = Evidence(network, ROWS, units_of(network, "value_vector"), unit="value_vector", batch_size=4)
    assert list(given.parameters) == ["model.layers.0.mlp.down_proj.weight"]
    assert_close(given.squares("forget"), summed(network, ROWS["forget"])[1])


@pytest.mark.parametrize("name", MODELS)
def test_mean_gradient_is_per_answer_token(name: str) -> None:
    tokens = sum(row.supervised_tokens for row in ROWS["forget"])
    expected = {key: value / tokens for key, value in naive(name, "forget")[0].items()}
    assert_close(evidence(name).gradient("forget", mean=True), expected)


@pytest.mark.parametrize("name", MODELS)
def test_layer_gradient_norm_is_the_ratio_of_norms_per_token(name: str) -> None:
    found = locate(built("layer_gradient_norm"), evidence(name, "layer"), 0.5, "model")
    tokens = {split: sum(row.supervised_tokens for row in given) for split, given in ROWS.items()}
    for family, score in zip(found.families, found.scores, strict=True):
        norms = {
            split: sum(naive(name, split)[0][slab.parameter].square().sum() for slab in family.slabs).sqrt()
            for split in ROWS
        }
        expected = (norms["forget"] / tokens["forget"]) / (norms["retain"] / tokens["retain"])
        torch.testing.assert_close(score, expected.float()[None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_del_counts_a_value_vector_by_its_strongest_tenth(name: str) -> None:
    found = locate(built("del"), evidence(name, "value_vector"), 0.1, "model")
    expected = directly("del", name)
    for family, score in zip(found.families, found.scores, strict=True):
        (slab,) = family.slabs
        vectors = expected[slab.parameter].movedim(slab.axis, 0)
        tenth = -(-vectors.shape[1] // 10)
        torch.testing.assert_close(
            score.double(), vectors.sort(1, descending=True).values[:, :tenth].mean(1), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("attribution", ["wagle", "fisher", "gradient"])
def test_the_batch_size_does_not_matter(attribution: str) -> None:
    expected = {key: value.double() for key, value in built(attribution).saliency(evidence("llama")).items()}
    for batch_size in (1, 16):
        assert_close(built(attribution).saliency(evidence("llama", batch_size=batch_size)), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attribution", [*PER_WEIGHT, "random"])
def test_the_same_again_is_the_same(attribution: str, name: str) -> None:
    one, two = (built(attribution).saliency(evidence(name)) for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_model_comes_out_as_it_went_in() -> None:
    network = copy.deepcopy(model("llama"))
    for number, (parameter, module) in enumerate(zip(network.parameters(), network.modules(), strict=False)):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 3 == 0 else None
        module.training = number % 2 == 1

    def state() -> list[Any]:
        parameters = [(p.requires_grad, p.grad, p.clone()) for p in network.parameters()]
        gradients = [None if grad is None else grad.clone() for _, grad, _ in parameters]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
        return [parameters, gradients, hooks, [module.training for module in network.modules()]]

    def same(one: list[Any], two: list[Any]) -> bool:
        kept = all(
            a[0] == b[0] and a[1] is b[1] and torch.equal(a[2], b[2]) for a, b in zip(one[0], two[0], strict=True)
        )
        filled = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
        return kept and filled and one[2:] == two[2:]

    before = state()
    for unit in ("value_vector", "layer"):
        given = Evidence(network, ROWS, units_of(network, unit), unit=unit, batch_size=3)
        for attribution in ("wagle", "fisher"):
            built(attribution).saliency(given)
            assert same(before, state()), (unit, attribution)
        for forward in given.passes("forget"):
            assert not forward.logits.requires_grad
        assert same(before, state())

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    given = Evidence(network, ROWS, units_of(network, "layer"), unit="layer", advance=stop)
    for work in (given.gradient, given.squares):
        with pytest.raises(KeyboardInterrupt):
            work("forget")
        assert same(before, state())


def test_only_what_units_are_made_of_gets_a_gradient() -> None:
    network = copy.deepcopy(model("llama"))
    families = [family for family in units_of(network, "value_vector") if family.layer == 1]
    seen: list[bool] = []
    below = network.model.layers[0].register_forward_hook(
        lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )

    def look(_: int) -> None:
        graded = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
        assert graded == ["model.layers.1.mlp.down_proj.weight"]

    given = Evidence(network, ROWS, families, unit="value_vector", batch_size=4, advance=look)
    assert list(given.gradient("forget")) == ["model.layers.1.mlp.down_proj.weight"]
    given.advance = lambda rows: None
    given.squares("forget")
    below.remove()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("attribution", ["wagle", "relative fisher"])
def test_a_second_gradient_lies_in_a_file_that_nobody_has_to_remove(
    attribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RAM_LIMIT", 0)
    mapped: list[bool] = []

    def look(_: int) -> None:
        mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text(encoding="utf-8"))

    given = evidence("llama", folder=tmp_path / "work", advance=look)
    assert_close(built(attribution).saliency(given), directly(attribution, "llama"))
    retain, forget = mapped[:3], mapped[3:]
    assert (retain, forget) == ([False] * 3, [True] * 3), "the gradient of the first split is in the file"
    assert not list(tmp_path.rglob("*.bin"))

    monkeypatch.setattr(evidence_module, "has_room", lambda size, file: False)
    with pytest.raises(UserError, match="no room"):
        built(attribution).saliency(given)


@pytest.mark.parametrize("kind", ["gradient", "squares"])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_added_up_in_thirty_two(name: str, kind: str) -> None:
    narrow = copy.deepcopy(model(name)).bfloat16()
    row, families = ROWS["forget"][0], units_of(narrow, "value_vector")

    def found(times: int) -> Gradients:
        given = Evidence(narrow, {"forget": [row] * times}, families, unit="value_vector", batch_size=1)
        result: Gradients = getattr(given, kind)("forget")
        return result

    once, often = found(1), found(5)
    for key, value in often.items():
        assert value.dtype == torch.float32
        # five times the same needs more digits than bfloat16 has
        torch.testing.assert_close(value, 5 * once[key], rtol=1e-5, atol=0)


def test_half_precision_is_near_and_leaves_float32_sums() -> None:
    exact, rough = (evidence("llama", half=half).gradient("forget") for half in (False, True))
    for key, value in rough.items():
        assert value.dtype == torch.float32
        assert torch.cosine_similarity(value.flatten(), exact[key].flatten(), dim=0) > 0.98, key
    assert any(not torch.equal(rough[key], exact[key]) for key in exact)


def test_passes_show_every_row_once_and_hooks_see_them() -> None:
    network, seen, finished = model("gpt2"), [], []
    hook = network.transformer.h[1].mlp.c_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    given = evidence("gpt2", advance=finished.append)
    found: dict[int, torch.Tensor] = {}
    for forward in given.passes("retain", logits=False):
        assert forward.logits.shape[0] == 0
        states = seen.pop().flatten(0, 1)[forward.place]
        parts = states.split(forward.batch.attention_mask.sum(1).tolist())
        found |= dict(zip(forward.batch.index.tolist(), parts, strict=True))
    assert sorted(found) == list(range(9))
    assert sum(finished) == 9
    for number, row in enumerate(ROWS["retain"]):
        network(input_ids=torch.from_numpy(row.input_ids).long()[None])
        torch.testing.assert_close(found[number], seen.pop()[0].detach(), rtol=1e-4, atol=1e-4)
    hook.remove()


def test_passes_let_the_caller_go_back_to_what_a_hook_wants() -> None:
    network = model("llama")
    inputs: list[torch.Tensor] = []

    def want(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1],)

    hook = network.model.layers[1].mlp.down_proj.register_forward_pre_hook(want)
    for forward in evidence("llama").passes("forget", gradients=True):
        (gradient,) = torch.autograd.grad(forward.logits.sum(), inputs.pop())
        assert gradient.shape[:2] == forward.shape
        assert gradient.abs().sum() > 0
    hook.remove()


# ---- random


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", UNITS)
def test_random_gives_all_weights_of_a_unit_one_number(unit: str, name: str) -> None:
    given = evidence(name, unit, rows={})
    saliency = built("random").saliency(given)
    found = locate(built("random"), given, 0.3, "model")
    for family, score in zip(found.families, found.scores, strict=True):
        assert len(score.unique()) > 0.99 * family.count
        assert score.min() >= 0
        assert score.max() < 1
        for slab in family.slabs:
            values = saliency[slab.parameter]
            if slab.axis == FLAT:
                assert torch.equal(values.flatten(), score)
                continue
            whole = values.expand(slab.shape)
            for i in range(family.count if slab.axis is not None else 1):
                own = whole if slab.axis is None else whole.narrow(slab.axis, slab.start + i * slab.size, slab.size)
                assert own.min() == own.max()
                torch.testing.assert_close(own.flatten()[0], score[i], rtol=1e-6, atol=0)


def test_random_depends_on_the_seed_and_not_on_the_order() -> None:
    given = evidence("llama", "neuron", rows={})
    backwards = Evidence(model("llama"), {}, given.families[::-1], unit="neuron")
    other = evidence("llama", "neuron", rows={}, seed=43)
    one, two, three = (built("random").saliency(each) for each in (given, backwards, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(not torch.equal(one[key], three[key]) for key in one)
    first, second = (one[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    assert abs(float(torch.corrcoef(torch.cat([first, second]).view(2, -1))[0, 1])) < 0.5


def test_random_chooses_units_of_any_size_alike() -> None:
    chosen: dict[str, int] = {}
    given = evidence("llama", "module", rows={})
    for seed in range(100):
        given.seed = seed
        found = locate(built("random"), given, 0.25, "model")
        assert found.mask.about["chosen"] == 4  # round(0.25 · 14)
        for name in found.mask.inside:
            chosen[name] = chosen.get(name, 0) + 1
    counts = [chosen.get(f"{family.name}.weight", 0) for family in found.families]
    # 100 draws of 4 of 14: 28.6 each, with a standard deviation of 4.5
    assert all(11 < count < 47 for count in counts), counts


@pytest.mark.parametrize("strata", ["model", "layer", "tensor"])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_random_has_the_density_in_each_stratum(density: float, strata: Any) -> None:
    found = locate(built("random"), evidence("llama", "value_vector", rows={}), density, strata)
    bits = [found.mask.inside.get(family.slabs[0].parameter) for family in found.families]
    counts = [0 if inside is None else int(inside.sum()) for inside in bits]
    if strata == "model":
        assert sum(counts) == max(1, round(density * 96))
    else:
        assert counts == [max(1, round(density * 48))] * 2


# ---- from an attribution to a mask


def test_locate_chooses_the_largest_and_says_how(tmp_path: Path) -> None:
    found = locate(built("wagle"), evidence("llama", "value_vector", seed=5), 0.25, "layer", {"model": "abc"})
    assert found.mask.about == {
        "by": "wagle",
        "parameters": {"mu": MU},
        "unit": "value_vector",
        "density": 0.25,
        "strata": "layer",
        "seed": 5,
        "units": 96,
        "chosen": 24,
        "rows": {"forget": 7, "retain": 9},
        "model": "abc",
    }
    for family, score in zip(found.families, found.scores, strict=True):
        inside = found.mask.inside[family.slabs[0].parameter].flatten()
        assert int(inside.sum()) == 12
        assert score[inside].min() > score[~inside].max()
    file = tmp_path / "mask.safetensors"
    found.mask.write(file)
    write_scores(scores_file(file), found.families, found.scores)
    assert read_mask(file).digest == found.mask.digest
    assert scores_file(file).name == "mask.scores.safetensors"
    again = read_scores(scores_file(file))
    assert list(again) == sorted(family.name for family in found.families)
    assert all(torch.equal(again[f.name], s) for f, s in zip(found.families, found.scores, strict=True))
    with pytest.raises(UserError, match="no scores of units"):
        read_scores(file)
    with pytest.raises(UserError, match="no mask"):
        read_mask(scores_file(file))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        read_scores(file)
    with pytest.raises(UserError, match="no scores at"):
        read_scores(tmp_path / "none.safetensors")


def test_every_declaration_says_what_it_reads() -> None:
    for name in ("random", "magnitude", "gradient", "gradient_times_weight", "wagle", "fisher", "del"):
        about = ATTRIBUTIONS.get(name).about
        read: set[str] = set()
        for unit in about.units or ("module",):
            given = evidence("llama", unit)
            built(name).saliency(given)
            read |= given.used
        assert read == set(about.needs), name
    assert ATTRIBUTIONS.get("random").about.control


@pytest.mark.parametrize(
    ("name", "unit", "given", "says"),
    [
        ("wagle", "module", ["forget"], "retain rows"),
        ("gradient", "module", [], "forget rows"),
        ("layer_gradient_norm", "value_vector", ["forget", "retain"], "can't tell units of the kind value_vector"),
    ],
)
def test_what_an_attribution_lacks_is_said_before_it_starts(name: str, unit: Any, given: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_fit(ATTRIBUTIONS.get(name).about, unit, given)
    there = evidence("llama", unit, rows={split: ROWS[split] for split in given})
    with pytest.raises(UserError, match=says):
        locate(built(name), there, 0.1, "model")


def test_rows_that_have_no_answer_are_refused() -> None:
    bare = Encoded(Example("bare", "p", ""), np.array([5, 6, 7], np.int32), 3, 0, 0)
    for given, says in (([], "no rows"), ([bare], "no row with an answer")):
        with pytest.raises(UserError, match=says):
            evidence("llama", rows={"forget": given}).gradient("forget")
    with pytest.raises(UserError, match="the retain set"):
        built("relative fisher").saliency(evidence("llama", rows={"forget": ROWS["forget"]}))
    mixed = evidence("llama", rows={"forget": [*ROWS["forget"], bare]})
    assert_close(mixed.squares("forget"), naive("llama", "forget")[1])
