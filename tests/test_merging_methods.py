"""Merge methods on single tensors: closed forms, invariants, and what PEFT and mergekit compute."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils import merge_utils

from expunge.errors import UserError
from expunge.merging.linear import linear
from expunge.merging.registry import MERGES
from expunge.merging.selection import CHUNK, cut, kept_count, kept_over_model, trimmed
from expunge.merging.ties import ties

SHAPES = [(40, 50), (10,), (2 * CHUNK + 10,), (1, 20), (5, 4, 6)]
WEIGHTS = [[1.0, 1.0], [1.0, 0.5, 2.0], [0.3, 0.3, 0.3, 0.1]]


def random_deltas(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def brute_trim(values: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` largest magnitudes by a stable sort; the first of equals win."""
    order = values.reshape(-1).abs().argsort(descending=True, stable=True)[:keep]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return values.reshape(-1) * mask


# ---------------------------------------------------------------- selection


def awkward(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(5000, generator=generator)
    return {
        "normal": normal,
        "equal": torch.full((5000,), 0.25),
        "zeros": torch.zeros(5000),
        "few values": torch.randint(-3, 4, (5000,), generator=generator).float(),
        "mostly zero": torch.where(normal.abs() > 1.5, normal, torch.zeros(())),
        "bfloat16": normal.bfloat16().float(),
        "subnormal": normal * 1e-42,
        "huge": normal * 5e37,
        "mixed scales": normal * torch.logspace(-40, 30, 5000),
        "over chunks": torch.randint(-40, 41, (2 * CHUNK + 77,), generator=generator).float(),
    }[name]


CASES = [
    "normal",
    "equal",
    "zeros",
    "few values",
    "mostly zero",
    "bfloat16",
    "subnormal",
    "huge",
    "mixed scales",
    "over chunks",
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.5, 0.8, 0.999, 1.0])
def test_cut_keeps_exactly_the_largest_and_the_first_of_equals(name, density):
    values = awkward(name)
    keep = kept_count(values.numel(), density)
    at = cut(values, keep)
    got = torch.cat(
        [
            trimmed(piece, start, at)
            for start, piece in zip(range(0, values.numel(), CHUNK), values.split(CHUNK), strict=True)
        ]
    )
    assert torch.equal(got, brute_trim(values, keep))


@pytest.mark.parametrize(
    ("numel", "density", "kept"), [(100, 0.29, 29), (10, 0.7, 7), (3, 0.5, 2), (7, 1.0, 7), (4, 0.0, 0)]
)
def test_kept_count_is_the_nearest_whole_number(numel, density, kept):
    # int(0.29 * 100) is 28, which is what truncation would keep
    assert kept_count(numel, density) == kept


@pytest.mark.parametrize("name", ["normal", "few values", "mostly zero", "zeros"])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.8, 1.0])
def test_one_threshold_over_the_model_equals_one_cut_through_the_flattened_model(name, density):
    flat = awkward(name)
    pieces = dict(zip("abcd", flat.split([1000, 1, 2999, 1000]), strict=True))
    flat = torch.cat([flat[:1000], torch.zeros(500), flat[1000:]])  # a tensor that this model does not change
    sizes = {"a": 1000, "untouched": 500, "b": 1, "c": 2999, "d": 1000}
    kept = kept_over_model(pieces.get, sizes, density)
    assert sum(kept.values()) == kept_count(5500, density)
    expected = brute_trim(flat, kept_count(5500, density)).split(list(sizes.values()))
    for (part, numel), whole in zip(sizes.items(), expected, strict=True):
        values = pieces.get(part, torch.zeros(numel))
        assert torch.equal(trimmed(values, 0, cut(values, kept[part])), whole)
        assert kept_count(numel, kept[part] / numel) == kept[part]  # a density carries the count exactly


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # rows: agree +, opposed, opposed and equal, only one, none
        ({}, [2.0, -4.0, 2.0, 5.0, 0.0]),
        ({"normalize": False}, [4.0, -4.0, 2.0, 5.0, 0.0]),
        ({"normalize": "count"}, [2.0, -4.0, 2.0, 5.0, 0.0]),
        ({"sign": "frequency"}, [2.0, 3.0, 2.0, 5.0, 0.0]),
    ],
)
def test_ties_of_two_by_hand(settings, expected):
    one, two = torch.tensor([1.0, 3.0, 2.0, 5.0, 0.0]), torch.tensor([3.0, -4.0, -2.0, 0.0, 0.0])
    assert ties([one, two], [1.0, 1.0], [1.0, 1.0], **settings).tolist() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(3 * 1 + 1 * 3) / 4, 3.0]),  # weighted votes: 3·3 against 1·4
        ({"votes": "equal"}, [1.5, -4.0]),  # 3 against 4
        ({"votes": "equal", "normalize": "count"}, [3.0, -4.0]),
        ({"normalize": False}, [6.0, 9.0]),
    ],
)
def test_ties_weights_by_hand(settings, expected):
    one, two = torch.tensor([1.0, 3.0]), torch.tensor([3.0, -4.0])
    assert ties([one, two], [3.0, 1.0], [1.0, 1.0], **settings).tolist() == expected


def test_ties_trims_before_it_votes():
    one, two = torch.tensor([1.0, -10.0, 3.0, 0.5]), torch.tensor([-2.0, 1.0, 4.0, -9.0])
    # half of each stays: one keeps −10 and 3, two keeps 4 and −9
    assert ties([one, two], [1.0, 1.0], [0.5, 0.5]).tolist() == [0.0, -10.0, 3.5, -9.0]
    assert ties([one, two], [1.0, 1.0], [0.25, 1.0]).tolist() == [-2.0, -10.0, 4.0, -9.0]


def test_a_negative_weight_turns_its_difference_round_in_every_normalisation():
    delta = torch.tensor([1.0, -2.0])
    for normalize in (True, False, "count"):
        assert ties([delta], [-1.0], [1.0], normalize=normalize).tolist() == [-1.0, 2.0]


@pytest.mark.parametrize(
    ("weights", "normalize", "expected"),
    [([1.0, 1.0], True, 2.0), ([3.0, 1.0], True, 1.5), ([2.0, -1.0], False, -1.0), ([2.0, -1.0], True, -1.0)],
)
def test_linear_by_hand(weights, normalize, expected):
    assert linear([torch.tensor(1.0), torch.tensor(3.0)], weights, [1.0, 1.0], normalize=normalize).item() == expected


def test_linear_refuses_weights_that_cancel():
    with pytest.raises(UserError, match="sum of the weights, which is 0") as caught:
        linear([torch.ones(2)] * 2, [1.0, -1.0], [1.0, 1.0])
    assert "normalize=false" in caught.value.hint


# ---------------------------------------------------------------- invariants of every method


@pytest.mark.parametrize("name", MERGES.names())
@pytest.mark.parametrize("shape", SHAPES)
def test_methods_leave_their_inputs_alone_and_treat_models_alike(name, shape):
    method = MERGES.get(name).function
    deltas = random_deltas(shape, 3)
    before = [delta.clone() for delta in deltas]
    merged = method(deltas, [1.0, 2.0, 0.5], [0.5, 0.7, 1.0])
    assert merged.shape == torch.Size(shape)
    assert merged.dtype == torch.float32
    assert all(torch.equal(one, two) for one, two in zip(deltas, before, strict=True))
    assert all(merged.data_ptr() != delta.data_ptr() for delta in deltas)
    swapped = method(deltas[::-1], [0.5, 2.0, 1.0], [1.0, 0.7, 0.5])
    torch.testing.assert_close(merged, swapped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MERGES.names())
def test_one_model_or_several_equal_ones_stay_what_they_are(name):
    method = MERGES.get(name).function
    (delta,) = random_deltas((30, 20), 1)
    torch.testing.assert_close(method([delta], [1.0], [1.0]), delta)
    torch.testing.assert_close(method([delta] * 3, [1.0, 0.4, 2.0], [1.0] * 3), delta)


@pytest.mark.parametrize("name", MERGES.names())
def test_methods_are_equivariant_under_sign_and_scale(name):
    method = MERGES.get(name).function
    deltas = random_deltas((300,), 2)
    merged = method(deltas, [1.0, 1.0], [0.8, 0.8])
    torch.testing.assert_close(method([-4 * delta for delta in deltas], [1.0, 1.0], [0.8, 0.8]), -4 * merged)


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_equals_peft_in_its_convention(shape, weights, sign):
    deltas = random_deltas(shape, len(weights), seed=1)
    theirs = merge_utils.ties(deltas, torch.tensor(weights), 0.5, majority_sign_method=sign)
    ours = ties(deltas, weights, [0.5] * len(weights), sign=sign, votes="equal", normalize="count")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_equals_pefts_weighted_sum(weights):
    deltas = random_deltas((40, 50), len(weights))
    theirs = merge_utils.task_arithmetic(deltas, torch.tensor(weights))
    ours = linear(deltas, weights, [1.0] * len(weights), normalize=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    mean = linear(deltas, weights, [1.0] * len(weights))
    torch.testing.assert_close(mean, theirs / sum(weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_ties_and_linear_equal_mergekit(weights, normalize, density):
    api = pytest.importorskip("mergekit.merge_methods.api")
    base, *deltas = random_deltas((40, 50), len(weights) + 1)
    names = [f"model{index}" for index in range(len(weights))]
    models = {name: {"x": base + delta} for name, delta in zip(names, deltas, strict=True)}
    deltas = [models[name]["x"] - base for name in names]
    shared = {"weight": dict(zip(names, weights, strict=True)), "normalize": normalize}
    theirs = api.merge_state_dicts(
        {"base": {"x": base}, **models}, "ties", base="base", parameters={**shared, "density": density, "lambda": 0.7}
    )["x"]
    ours = base + 0.7 * ties(deltas, weights, [density] * len(weights), normalize=normalize)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    theirs = api.merge_state_dicts(models, "linear", parameters=shared)["x"]
    ours = linear([models[name]["x"] for name in names], weights, [1.0] * len(weights), normalize=normalize)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("name", "given", "message", "hint"),
    [
        ("ties", {"signs": "total"}, "unknown parameter 'signs'", "did you mean 'sign'"),
        ("ties", {"sign": "majority"}, "'total' or 'frequency'", "expunge list merges ties"),
        ("ties", {"scale": math.nan}, "finite", "expunge list merges ties"),
        ("ties", {"scope": "layer"}, "scope", "expunge list merges ties"),
        ("ties", {"normalize": "sometimes"}, "normalize", "expunge list merges ties"),
        ("linear", {"scope": "model"}, "unknown parameter 'scope'", "scale"),
        ("linear", {"scale": "much"}, "scale", "expunge list merges linear"),
    ],
)
def test_parameters_are_checked_with_a_sentence_and_a_hint(name, given, message, hint):
    with pytest.raises(UserError) as caught:
        MERGES.get(name).check(given)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_defaults_and_the_other_name_of_scale():
    assert MERGES.get("ties").check({}) == {
        "sign": "total",
        "votes": "weighted",
        "normalize": True,
        "scope": "tensor",
        "scale": 1.0,
    }
    assert MERGES.get("linear").check({"lambda": 0.5}) == {"normalize": True, "scale": 0.5}


@pytest.mark.parametrize("name", MERGES.names())
def test_every_method_describes_itself(name):
    about = MERGES.get(name).describe()
    assert next(iter(about)) == "summary"
    assert about["paper"].startswith("arXiv:")
    for parameter in MERGES.get(name).check({}):
        assert len(about[f"parameter {parameter}"].partition(": ")[2]) > 10
