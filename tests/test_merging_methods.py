"""Merge methods on single tensors: closed forms, and the chance of the random ones."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.errors import UserError
from expunge.merging.breadcrumbs import breadcrumbs
from expunge.merging.dare import dare_linear
from expunge.merging.della import della
from expunge.merging.draw import Draw
from expunge.merging.linear import linear
from expunge.merging.magnitude_prune import magnitude_prune
from expunge.merging.model_stock import model_stock
from expunge.merging.negmerge import negmerge
from expunge.merging.plan import plan_merge
from expunge.merging.registry import MERGES
from expunge.merging.sce import sce
from expunge.merging.selection import CHUNK
from expunge.merging.slerp import slerp
from expunge.merging.task_arithmetic import task_arithmetic
from expunge.merging.ties import ties
from expunge.merging.uwc_mix import uwc_mix
from expunge.methods.base import OBJECTIVES
from merging_deltas import DRAW, random_deltas

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
    assert ties([delta], [-0.5], [1.0]).tolist() == [-1.0, 2.0]
    assert ties([delta, -2 * delta], [1.0, -0.5], [1.0, 1.0]).tolist() == pytest.approx([4 / 3, -8 / 3])


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


def test_task_arithmetic_adds_and_takes_away():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -8.0])
    assert task_arithmetic([one, two], [1.0, -0.5], [1.0, 1.0]).tolist() == [-1.0, 6.0]
    assert task_arithmetic([one, two], [3.0, 1.0], [1.0, 1.0], normalize=True).tolist() == [1.75, -0.5]
    assert task_arithmetic([one], [-1.0], [1.0]).tolist() == [-1.0, -2.0]


def test_slerp_of_a_right_angle_goes_through_its_middle():
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    root = math.sqrt(0.5)
    torch.testing.assert_close(slerp([one, two], [1.0, 1.0], [1.0] * 2), torch.tensor([3 * root, 3 * root]))
    third = torch.tensor([3 * math.cos(math.pi / 6), 3 * math.sin(math.pi / 6)])
    torch.testing.assert_close(slerp([one, two], [2.0, 1.0], [1.0] * 2), third)
    torch.testing.assert_close(slerp([one, two], [5.0, 1.0], [1.0] * 2, t=1 / 3), third)
    assert slerp([one, two], [1.0, 1.0], [1.0] * 2, t=0.0).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0])
def test_slerp_goes_straight_between_parallel_opposite_and_unchanged(factor):
    one = torch.tensor([1.0, -3.0, 0.5])
    torch.testing.assert_close(slerp([one, factor * one], [0.75, 0.25], [1.0] * 2), (0.75 + 0.25 * factor) * one)


@pytest.mark.parametrize("angle", [1e-5, 9e-4, 1.1e-3, 0.01, 1.0, 3.0])
def test_slerp_keeps_the_norm_and_divides_the_angle(angle):
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    two = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    merged = slerp([one.float(), two.float()], [1.0, 1.0], [1.0] * 2, t=0.25).double()
    assert merged.norm() == pytest.approx(1, abs=1e-5)
    assert math.atan2(merged[1], merged[0]) == pytest.approx(angle / 4, rel=2e-3 if angle > 1.5 else 1e-5)


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.6, 0.2, [0.0, 4.0, -3.0, 2.0, 0.0]),
        (0.6, 0.0, [-5.0, 4.0, -3.0, 0.0, 0.0]),
        (0.6, 0.4, [0.0, 0.0, -3.0, 2.0, 1.0]),
        (0.8, 0.4, [0.0, 4.0, -3.0, 2.0, 1.0]),  # no more outliers than density leaves room for
        (1.0, 0.4, [-5.0, 4.0, -3.0, 2.0, 1.0]),
    ],
)
def test_breadcrumbs_leaves_out_the_smallest_and_the_largest(density, gamma, expected):
    delta = torch.tensor([-5.0, 4.0, -3.0, 2.0, 1.0])
    assert breadcrumbs([delta], [1.0], [density], gamma=gamma).tolist() == expected
    assert breadcrumbs([delta, delta], [2.0, -1.0], [density] * 2, gamma=gamma).tolist() == expected


@pytest.mark.parametrize(("normalize", "divisor"), [(False, 1.0), (True, 4.0), ("count", 2.0)])
def test_a_sum_without_election_is_divided_as_asked(normalize, divisor):
    one, two = torch.tensor([4.0, 8.0]), torch.tensor([-4.0, 16.0])
    merged = breadcrumbs([one, two], [1.0, 3.0], [1.0, 1.0], normalize=normalize)
    torch.testing.assert_close(merged, torch.tensor([-8.0, 56.0]) / divisor)


def test_magnitude_prune_adds_what_is_large():
    one, two = torch.tensor([1.0, -10.0, 3.0, 0.5]), torch.tensor([-2.0, 1.0, 4.0, -9.0])
    assert magnitude_prune([one, two], [1.0, 2.0], [0.5, 0.25]).tolist() == [0.0, -10.0, 3.0, -18.0]
    restored = magnitude_prune([one], [1.0], [0.5], rescale="l1")
    assert restored.abs().sum().item() == pytest.approx(14.5)


def test_model_stock_by_the_angle():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])  # 60 degrees
    torch.testing.assert_close(model_stock([one, 5 * two], [1.0] * 2, [1.0] * 2), (one + 5 * two) / 2 * (2 / 3))
    three = torch.eye(3)
    assert model_stock([*three], [1.0] * 3, [1.0] * 3).tolist() == [0.0, 0.0, 0.0]
    assert model_stock([one, -one], [1.0] * 2, [1.0] * 2).tolist() == [0.0, 0.0]  # not 0 / 0
    assert model_stock([one, torch.zeros(2)], [1.0] * 2, [1.0] * 2).tolist() == [0.0, 0.0]


def test_sce_selects_weighs_and_erases_by_hand():
    one, two = torch.tensor([2.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 2.5, -4.0, 0.0])
    # variances 1, 1/16, 25/4, 0
    energies = (2.0**2 + 1.0**2, 4.0**2)
    share = energies[0] / sum(energies)
    merged = sce([one, two], [1.0] * 2, [1.0] * 2, select_topk=0.5)
    torch.testing.assert_close(merged, torch.tensor([2.0, 0.0, -4.0, 0.0]))
    energies = (2.0**2 + 2.0**2 + 1.0**2, 2.5**2 + 4.0**2)
    share = energies[0] / sum(energies)
    torch.testing.assert_close(
        sce([one, two], [1.0] * 2, [1.0] * 2), torch.tensor([2.0, share * 2 + (1 - share) * 2.5, -4.0, 0.0])
    )


def test_sce_keeps_exactly_its_part_of_equal_variances():
    one, two = torch.zeros(10), torch.ones(10)
    assert sce([one, two], [1.0] * 2, [1.0] * 2, select_topk=0.3).tolist() == [1.0] * 3 + [0.0] * 7
    assert sce([two, two], [1.0] * 2, [1.0] * 2, select_topk=0.3).tolist() == [1.0] * 3 + [0.0] * 7


def test_negmerge_takes_away_what_all_agree_on():
    deltas = [torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([3.0, -4.0, -3.0, 1.0])]
    assert negmerge(deltas, [1.0] * 2, [1.0] * 2).tolist() == [-2.0, 3.0, 0.0, 0.0]


def test_the_merge_and_the_objective_negmerge_are_one_formula():
    start, *deltas = random_deltas((50, 7), 4)
    objective = OBJECTIVES.get("negmerge")(alpha=0.7)
    by_objective = objective.combine(start, [start + delta for delta in deltas])
    exact = [(start + delta) - start for delta in deltas]
    torch.testing.assert_close(start + 0.7 * negmerge(exact, [1.0] * 3, [1.0] * 3), by_objective)


def test_uwc_mix_goes_part_of_the_way():
    assert uwc_mix([torch.tensor([1.0, -2.0])], [1.0], [1.0], alpha=0.25).tolist() == [0.25, -0.5]


# ---------------------------------------------------------------- chance

BIG = (5 * CHUNK // 1000, 1000)
RANDOM = [name for name, entry in MERGES.items() if entry.random]


def test_what_dare_keeps_is_rescaled_to_the_same_mean():
    (delta,) = random_deltas(BIG, 1)
    merged = dare_linear([delta], [1.0], [0.3], draw=DRAW)
    kept = merged != 0
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.003)
    torch.testing.assert_close(merged[kept], delta[kept] / 0.3)
    assert torch.equal(dare_linear([delta], [1.0], [0.3], draw=DRAW, rescale=False)[kept], delta[kept])
    restored = dare_linear([delta], [1.0], [0.3], draw=DRAW, rescale="l1")
    assert restored.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)


def test_della_keeps_the_large_ones_of_a_row_more_often():
    (delta,) = random_deltas(BIG, 1)
    merged = della([delta], [1.0], [0.5], draw=DRAW, epsilon=0.3, rescale=False)
    order = delta.abs().argsort(dim=1, stable=True)
    rates = (merged != 0).float().gather(1, order).mean(0)  # per rank, over 655 rows
    expected = torch.linspace(0.2, 0.8, 1000)
    assert (rates.view(10, 100).mean(1) - expected.view(10, 100).mean(1)).abs().max() < 0.01
    unbiased = della([delta], [1.0], [0.5], draw=DRAW, epsilon=0.3)
    sizes = torch.where(merged != 0, unbiased / delta, torch.zeros(())).gather(1, order)
    torch.testing.assert_close(sizes[sizes != 0], (1 / expected).expand_as(sizes)[sizes != 0])


@pytest.mark.parametrize("name", RANDOM)
def test_chance_is_that_of_seed_parameter_and_model(name):
    method = MERGES.get(name).function
    deltas = random_deltas((30, 40), 2)

    def merged(draw, models=deltas):
        return method(models, [1.0] * len(models), [0.5] * len(models), draw=draw)

    assert torch.equal(merged(Draw(1, "a")), merged(Draw(1, "a")))
    assert not torch.equal(merged(Draw(1, "a")), merged(Draw(2, "a")))
    assert not torch.equal(merged(Draw(1, "a")), merged(Draw(1, "b")))
    twins = [deltas[0], deltas[0]]
    # one mask for both would leave half of the elements without any; each its own leaves a quarter
    assert (merged(Draw(1, "a"), twins) == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_every_piece_has_its_own_chance():
    pieces = [DRAW.uniform(0, start, start + 100) for start in (0, 100, 200)]
    assert torch.equal(pieces[1], DRAW.uniform(0, 100, 200))
    assert len({number for piece in pieces for number in piece.tolist()}) == 300
    ones = torch.ones(2 * CHUNK)
    first, second = dare_linear([ones], [1.0], [0.5], draw=DRAW).split(CHUNK)
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [(0.8, 0.15, True), (0.8, 0.2, False), (0.15, 0.15, False), (1.0, 0.3, True), (0.5, 0.0, True)],
)
def test_della_probabilities_lie_between_0_and_1(density, epsilon, fits):
    settings = {"density": density, "parameters": {"epsilon": epsilon}}
    if fits:
        plan_merge("della", 2, **settings)
        return
    with pytest.raises(UserError, match=f"epsilon {epsilon:g} around density {density:g}") as caught:
        plan_merge("della", 2, **settings)
    assert f"below {min(density, 1 - density):g}" in caught.value.hint


# ---------------------------------------------------------------- declarations


def test_defaults_and_the_other_name_of_scale():
    assert MERGES.get("ties").check({}) == {
        "sign": "total",
        "votes": "weighted",
        "normalize": True,
        "rescale": False,
        "scope": "tensor",
        "scale": 1.0,
        "scale_match": "none",
    }
    common = {"scope": "tensor", "scale_match": "none"}
    assert MERGES.get("linear").check({"lambda": 0.5}) == {"normalize": True, "scale": 0.5, **common}
    assert MERGES.get("uwc_mix").check({}) == {"alpha": 1.0, "scale": 1.0, **common}
    assert MERGES.get("slerp").check({})["t"] is None
