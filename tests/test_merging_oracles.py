"""Every merge method against PEFT (merge_utils) and mergekit (merge_state_dicts), as the design page pairs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from expunge.merging.draw import Draw
from expunge.merging.plan import plan_merge
from expunge.merging.selection import CHUNK
from expunge.merging.sparse import row_step
from merging_deltas import SHAPES, random_deltas

api = pytest.importorskip("mergekit.merge_methods.api")

WEIGHTS = [[1.0, 1.0], [1.0, 0.5, 2.0], [0.3, 0.3, 0.3, 0.1], [1.0, -0.4]]
NAME, SEED = "model.layers.1.mlp.down_proj.weight", 7
TOLERANCE = {"rtol": 0, "atol": 1e-6}


def ours(method: str, deltas: list[torch.Tensor], weights: Any, density: Any, scale: float = 1.0, **parameters: Any):
    """The merged difference as a merge makes it: through the plan, with its checks and its chance."""
    plan = plan_merge(method, len(deltas), weights, density, parameters)
    return scale * plan.merged(deltas, weights, [density] * len(deltas), NAME)


def mergekit(method: str, deltas: list[torch.Tensor], weights: Any, *, base: bool = True, **parameters: Any):
    """The merged difference by mergekit, from a base of 0: then its inputs are exactly these differences."""
    models = {f"model{index}": {"x": delta} for index, delta in enumerate(deltas)}
    if weights is not None:
        parameters["weight"] = dict(zip(models, weights, strict=True))
    start = {"base": {"x": torch.zeros_like(deltas[0])}} if base else {}
    return api.merge_state_dicts(start | models, method, base="base" if base else None, parameters=parameters)["x"]


class Chance:
    """The masks of our merge as torch.bernoulli for the peer: what is below the peer's probability stays."""

    def __init__(self) -> None:
        self.step = CHUNK  # our merge draws in pieces of so many elements
        self.calls = 0

    def bernoulli(self, probability: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """One call per model, in their order."""
        numel, source = probability.numel(), Draw(SEED, NAME)
        starts = range(0, numel, self.step)
        pieces = [source.uniform(self.calls, start, min(start + self.step, numel)) for start in starts]
        self.calls += 1
        return (torch.cat(pieces).view(probability.shape) < probability).to(probability.dtype)


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> Chance:
    """The peer draws what we draw."""
    made = Chance()
    monkeypatch.setattr(torch, "bernoulli", made.bernoulli)
    return made


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_equals_peft(shape, weights, sign):
    deltas = random_deltas(shape, len(weights), seed=1)
    theirs = merge_utils.ties(deltas, torch.tensor(weights), 0.5, majority_sign_method=sign)
    mine = ours("ties", deltas, weights, 0.5, sign=sign, votes="equal", normalize="count")
    torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_sums_equal_peft(shape, weights):
    deltas = random_deltas(shape, len(weights))
    theirs = merge_utils.task_arithmetic(deltas, torch.tensor(weights))
    torch.testing.assert_close(ours("task_arithmetic", deltas, weights, 1.0), theirs, **TOLERANCE)
    torch.testing.assert_close(ours("linear", deltas, weights, 1.0, normalize=False), theirs, **TOLERANCE)
    torch.testing.assert_close(ours("linear", deltas, weights, 1.0), theirs / sum(weights), **TOLERANCE)
    theirs = merge_utils.magnitude_prune(deltas, torch.tensor(weights), 0.5)
    torch.testing.assert_close(ours("magnitude_prune", deltas, weights, 0.5), theirs, **TOLERANCE)


@pytest.mark.parametrize("shape", [(40, 50), (2 * CHUNK + 10,)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dare_linear_equals_peft_with_the_same_masks(shape, weights, chance):
    deltas = random_deltas(shape, len(weights))
    theirs = merge_utils.dare_linear(deltas, torch.tensor(weights), 0.75)
    mine = ours("dare_linear", deltas, weights, 0.75, seed=SEED)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert chance.calls == len(weights)


@pytest.mark.parametrize("shape", [(40, 50), (2 * CHUNK + 10,)])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_dare_ties_equals_peft_with_the_same_masks(shape, weights, sign, chance):
    deltas = random_deltas(shape, len(weights))
    theirs = merge_utils.dare_ties(deltas, torch.tensor(weights), 0.75, majority_sign_method=sign)
    mine = ours("dare_ties", deltas, weights, 0.75, seed=SEED, sign=sign, votes="equal", normalize="count")
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert chance.calls == len(weights)


# ---------------------------------------------------------------- mergekit: what is not random

#: Our method and settings → mergekit's method and settings. Weights and density are given to both.
PAIRS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ties": ("ties", {}, "ties", {}),
    "ties, sum": ("ties", {"normalize": False}, "ties", {"normalize": False}),
    "ties, l1": ("ties", {"rescale": "l1"}, "ties", {"rescale": True}),
    "task_arithmetic": ("task_arithmetic", {}, "task_arithmetic", {}),
    "task_arithmetic, mean": ("task_arithmetic", {"normalize": True}, "task_arithmetic", {"normalize": True}),
    "linear": ("linear", {}, "task_arithmetic", {"normalize": True}),
    "breadcrumbs": ("breadcrumbs", {}, "breadcrumbs", {}),
    "breadcrumbs, gamma": ("breadcrumbs", {"gamma": 0.2}, "breadcrumbs", {"gamma": 0.2}),
    "breadcrumbs, outliers alone": ("breadcrumbs", {"gamma": 0.9}, "breadcrumbs", {"gamma": 0.9}),
    "breadcrumbs, l1 mean": (
        "breadcrumbs",
        {"rescale": "l1", "normalize": True, "gamma": 0.1},
        "breadcrumbs",
        {"rescale": True, "normalize": True, "gamma": 0.1},
    ),
    "breadcrumbs_ties": ("breadcrumbs", {"sign": "total", "gamma": 0.1}, "breadcrumbs_ties", {"gamma": 0.1}),
    "magnitude_prune": ("magnitude_prune", {}, "breadcrumbs", {"gamma": 0.0}),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
def test_methods_equal_mergekit(pair, weights, density):
    name, settings, their_name, their_settings = PAIRS[pair]
    if min(weights) < 0 and their_name == "ties" and their_settings.get("normalize", True):
        pytest.skip("mergekit divides by signed weights: the design page says why we do not")
    deltas = random_deltas((40, 50), len(weights))
    theirs = mergekit(their_name, deltas, weights, density=density, **{"lambda": 0.7}, **their_settings)
    torch.testing.assert_close(ours(name, deltas, weights, density, 0.7, **settings), theirs, **TOLERANCE)


def test_a_negative_weight_turns_round_once_here_and_twice_in_mergekit():
    deltas = random_deltas((40, 50), 1)
    torch.testing.assert_close(mergekit("ties", deltas, [-1.0], density=1.0), deltas[0])
    torch.testing.assert_close(ours("ties", deltas, [-1.0], 1.0), -deltas[0])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_of_checkpoints_equals_mergekit(weights, normalize):
    deltas = random_deltas((40, 50), len(weights))
    theirs = mergekit("linear", deltas, weights, base=False, normalize=normalize)
    torch.testing.assert_close(ours("linear", deltas, weights, 1.0, normalize=normalize), theirs, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.9, 1.0])
def test_slerp_equals_mergekits_two(shape, t):
    one, two = random_deltas(shape, 2)
    whole = api.merge_state_dicts({"a": {"x": one}, "b": {"x": two}}, "slerp", base="a", parameters={"t": t})["x"]
    torch.testing.assert_close(ours("slerp", [one, two], [1.0, 1.0], 1.0, t=t), whole, **TOLERANCE)
    for base in (True, False):
        theirs = mergekit("nuslerp", [one, two], [1 - t, t], base=base)
        torch.testing.assert_close(ours("slerp", [one, two], [1 - t, t], 1.0), theirs, **TOLERANCE)


@pytest.mark.parametrize("size", [0.001, 0.01, 0.1])
def test_slerp_of_nearly_parallel_models_stays_on_the_arc(size):
    one, noise = random_deltas((40, 50), 2)
    models = [one, one + size * noise]
    theirs = mergekit("nuslerp", models, [0.6, 0.4], base=False)
    torch.testing.assert_close(ours("slerp", models, [0.6, 0.4], 1.0), theirs, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_equals_mergekit(shape, count):
    shared, *own = random_deltas(shape, count + 1)
    deltas = [shared + delta for delta in own]
    theirs = mergekit("model_stock", deltas, None)
    # over 262,154 numbers their float32 sums are off by 1e-6 of the value themselves
    torch.testing.assert_close(ours("model_stock", deltas, [1.0] * count, 1.0), theirs, rtol=2e-6, atol=1e-6)


def test_model_stock_stays_at_the_base_where_mergekit_goes_backwards():
    one, noise = random_deltas((40, 50), 2)
    deltas = [one + noise, noise - 2 * one]  # they point away from each other
    theirs = mergekit("model_stock", deltas, None)
    assert float((theirs * (deltas[0] + deltas[1])).sum()) < 0
    assert not ours("model_stock", deltas, [1.0] * 2, 1.0).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_sce_equals_mergekit(shape, count, part):
    deltas = random_deltas(shape, count)
    mine = ours("sce", deltas, [1.0] * count, 1.0, select_topk=part)
    torch.testing.assert_close(mine, mergekit("sce", deltas, None, select_topk=part), **TOLERANCE)


# ---------------------------------------------------------------- mergekit: what is random

RANDOM: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "dare_linear": ("dare_linear", {"rescale": "l1"}, "dare_linear", {}),
    "dare_linear, as it is": ("dare_linear", {"rescale": False}, "dare_linear", {"rescale": False}),
    "dare_linear, mean": (
        "dare_linear",
        {"rescale": "l1", "normalize": True},
        "dare_linear",
        {"normalize": True},
    ),
    "dare_ties": ("dare_ties", {"rescale": "l1", "normalize": False}, "dare_ties", {}),
    "dare_ties, mean": ("dare_ties", {"rescale": "l1"}, "dare_ties", {"normalize": True}),
    "della": ("della", {"rescale": "l1"}, "della", {}),
    "della, sum": (
        "della",
        {"rescale": "l1", "normalize": False, "epsilon": 0.05},
        "della",
        {"normalize": False, "epsilon": 0.05},
    ),
    "della, as it is": ("della", {"rescale": False}, "della", {"rescale": False}),
    "della_linear": ("della", {"rescale": "l1", "sign": "none", "normalize": False}, "della_linear", {}),
}


@pytest.mark.parametrize("pair", RANDOM)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.5, 2.0]])
@pytest.mark.parametrize("shape", [(40, 50), (300,), (5, 4, 6), (70, 2000)])
def test_random_methods_equal_mergekit_with_the_same_masks(pair, weights, shape, chance):
    name, settings, their_name, their_settings = RANDOM[pair]
    if name == "della" and len(shape) == 3:
        shape = (24, 5)  # there mergekit ranks along another dimension
    deltas = random_deltas(shape, len(weights))
    chance.step = row_step(deltas[0]) if name == "della" else CHUNK
    theirs = mergekit(their_name, deltas, weights, density=0.7, **{"lambda": 0.7}, **their_settings)
    mine = ours(name, deltas, weights, 0.7, 0.7, seed=SEED, **settings)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert chance.calls == len(weights)


@pytest.mark.parametrize("pair", RANDOM)
def test_random_methods_equal_mergekit_where_nothing_is_dropped(pair):
    name, settings, their_name, their_settings = RANDOM[pair]
    deltas = random_deltas((40, 50), 3)
    theirs = mergekit(their_name, deltas, [1.0, 0.5, 2.0], density=1.0, **their_settings)
    torch.testing.assert_close(ours(name, deltas, [1.0, 0.5, 2.0], 1.0, **settings), theirs, **TOLERANCE)


@pytest.mark.parametrize("pair", RANDOM)
def test_random_methods_agree_with_mergekit_on_average(pair):
    name, settings, their_name, their_settings = RANDOM[pair]
    deltas = [torch.full((200, 500), value) for value in (1.0, 0.6)]
    if name == "della":  # it goes by rank
        deltas = [delta * torch.linspace(0.5, 1.5, 500) for delta in deltas]
    theirs = mergekit(their_name, deltas, [1.0, 0.5], density=0.7, **their_settings)
    mine = ours(name, deltas, [1.0, 0.5], 0.7, seed=SEED, **settings)
    assert not torch.equal(mine, theirs)
    assert mine.mean().item() == pytest.approx(theirs.mean().item(), rel=0.01)
    assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
