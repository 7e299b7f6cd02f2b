"""The search of a merge: the line, the trials and the choice over functions; and in memory."""

from __future__ import annotations

import builtins
import random
import re
from typing import Any

import pytest
import torch

from expunge.errors import UserError
from expunge.merging.in_memory import InMemory
from expunge.merging.inputs import open_inputs
from expunge.merging.plan import plan_merge
from expunge.merging.run import merge_models
from expunge.pipeline.merge_search import Measured, Searching, order
from expunge.pipeline.merge_search_rows import SearchRows
from expunge.pipeline.merge_search_space import Setting, Space, shares_of, weights_of
from expunge.recipe import Aim, EvaluateConfig, Keep, MergeConfig, load_recipe
from expunge.recipe.conventions import EXPUNGE
from expunge.report.search_record import Estimate
from merging_models import adapter, llama, moved, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")

AUC, KEPT = "forget:mia_loss", "retain:extraction_strength"

# ---------------------------------------------------------------- what is chosen among


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_and_weights_are_each_others_inverse(count):
    draw = random.Random(count)
    for _ in range(50):
        found = weights_of([draw.random() for _ in range(count - 1)])
        assert sum(found) == pytest.approx(1, abs=1e-9)
        assert all(weight >= 0 for weight in found)
        assert weights_of(shares_of(found)) == pytest.approx(found, abs=2e-4)
    assert weights_of(shares_of([1 / count] * count)) == pytest.approx([1 / count] * count, abs=2e-4)


def test_weights_are_drawn_evenly():
    draw = random.Random(0)
    drawn = [weights_of([draw.random(), draw.random()]) for _ in range(4000)]
    for place in range(3):  # of three numbers with sum 1, drawn evenly, each has mean 1/3 and variance 1/18
        column = [weights[place] for weights in drawn]
        mean = sum(column) / len(column)
        assert mean == pytest.approx(1 / 3, abs=0.015)
        assert sum((value - mean) ** 2 for value in column) / len(column) == pytest.approx(1 / 18, abs=0.005)


def space(models=2, merge=None, **search) -> Space:
    return Space(MergeConfig(**(merge or {}), search=search), models)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"merge": {"method": "tie"}}, "unknown merge method 'tie'"),
        ({"methods": ["ties", "lin"]}, "unknown merge method 'lin'"),
        ({"merge": {"weights": [1, 1]}}, "the search chooses weights, and weights is given"),
        ({"merge": {"density": 0.5}}, "the search chooses density"),
        ({"merge": {"parameters": {"lambda": 0.5}}}, "the search chooses scale"),
        ({"merge": {"parameters": {"sgin": "total"}}}, "sgin"),
        ({"models": 3, "trials": 0}, "lies between two models, not 3"),
        ({"models": 1, "trials": 0}, "lies between two models, not 1"),
        ({"trials": 0, "merge": {"parameters": {"normalize": False}}, "over": ["weights"]}, "the line is linear"),
        ({"models": 1, "over": ["weights"]}, "with one model there are no weights"),
    ],
)
def test_searches_that_make_no_sense(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        space(**arguments)


@pytest.mark.parametrize(
    "search",
    [
        {"trials": 0, "line": False},
        {"over": []},
        {"density": [0.9, 0.1]},
        {"scale": [1, 1]},
        {"density": [0, 1]},
        {"aims": ["forget:mia_loss"]},
        {"aims": ["forget:mia_loss=low"]},
        {"aims": ["forget:mia_loss=0.5", "forget:mia_loss<=0.6"]},
        {"keep": ["retain:extraction_strength=0"]},
    ],
)
def test_fields_out_of_range(search):
    recipe = {"model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [{}], "merge": {"search": search}}
    with pytest.raises(UserError, match=r"merge\.search"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "found", "distance"),
    [("f:m=0.5", 0.7, 0.2), ("f:m<=0.5", 0.7, 0.2), ("f:m<=0.5", 0.3, 0), ("f:m >= 0.5", 0.3, 0.2), ("2*f:m>=1", 2, 0)],
)
def test_aims_are_read_and_measured(text, found, distance):
    recipe = {
        "model": "tiny",
        "data": {"benchmark": "fictitious"},
        "unlearn": [{}],
        "merge": {"search": {"aims": [text]}},
    }
    merge = load_recipe(recipe).merge
    assert merge is not None
    assert merge.search is not None
    aim = merge.search.aims[0]
    assert aim.distance(found, aim.value) == pytest.approx(distance)
    assert str(aim) == text.replace(" ", "")
    assert aim.weight == (2 if text.startswith("2") else 1)


# ---------------------------------------------------------------- the search, over functions


class World:
    """Metrics of a merge as functions of t, the part of the over-forgetter, and of the scale; each pass is counted."""

    def __init__(self, auc, kept, over=1):
        self.auc, self.kept, self.over, self.asked = auc, kept, over, []

    def __call__(self, setting: Setting | None) -> Measured:
        self.asked.append(setting)
        if setting is None:
            return measured(1.0, 0.8)
        part = float(setting.weights[self.over])
        scale = setting.parameters.get("scale", 1.0)
        return measured(self.auc(part * scale), self.kept(part * scale))


def measured(auc, kept, unscored=0):
    return Measured({AUC: Estimate(value=auc, n=4, unscored=unscored), KEPT: Estimate(value=kept, n=4)}, 1.0)


def asking(aim=0.5, part=0.95) -> SearchRows:
    aims = (Aim(split="forget", metric="mia_loss", value=aim),)
    keep = (Keep(split="retain", metric="extraction_strength", part=part),)
    roles: Any = {"forget": "forget", "retain": "retain"}
    return SearchRows(aims, keep, {}, roles, "holdout", False, (), EXPUNGE, EvaluateConfig())


def run(world, aim=0.5, merge=None, **search):
    return Searching(space(merge=merge, **search), asking(aim), world).run()


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("root", [0.1, 0.37, 0.5, 0.93])
def test_the_line_finds_the_crossing_in_eight_passes(root, over):
    world = World(lambda t: 0.5 + 0.4 * (root - t), lambda t: 0.8, over)
    found = run(world, trials=0)
    assert len(world.asked) == 1 + 8  # the target, both ends, six halvings
    assert found.line.over == over
    assert found.line.bracketed
    assert found.line.at == pytest.approx(root, abs=1 / 64)
    best = found.tried[found.chosen]
    assert best.met
    assert best.weights[over] == found.line.at
    assert best.distance == pytest.approx(0.4 * abs(root - found.line.at))
    assert best.method == "linear"


def test_the_line_stops_where_too_little_would_be_kept():
    world = World(lambda t: 0.9 - 0.5 * t, lambda t: 0.8 if t <= 0.3 else 0.4)  # the aim is met at 0.8
    found = run(world, trials=0)
    best = found.tried[found.chosen]
    assert best.met
    assert best.at == pytest.approx(0.3, abs=1 / 64)
    assert len(world.asked) <= 1 + 8 + 6


@pytest.mark.parametrize(("auc", "end"), [(lambda t: 0.9 - 0.2 * t, 1.0), (lambda t: 0.4 - 0.2 * t, 0.0)])
def test_an_aim_that_is_not_bracketed_is_said_and_the_better_end_taken(auc, end):
    world = World(auc, lambda t: 0.8)
    found = run(world, trials=0)
    assert not found.line.bracketed
    assert found.line.at == end
    assert len(world.asked) == 3
    assert any("not bracketed" in note for note in found.notes)


def test_an_end_that_meets_the_aim_brackets_it():
    world = World(lambda t: max(0.5, 1 - t / 0.6 * 0.5), lambda t: 1 - 0.5 * t)  # met from 0.6 on; keeping costs
    found = Searching(space(trials=0), asking(part=0.5), world).run()
    assert found.line.bracketed
    assert found.tried[found.chosen].at == pytest.approx(0.6, abs=1 / 64)


def test_a_point_that_computes_nan_counts_as_too_far():
    def world(setting):
        if setting is None:
            return measured(1.0, 0.8)
        t = setting.weights[1]
        return measured(0.9 - 0.5 * t, 0.8, unscored=int(0.4 < t < 1))

    found = Searching(space(trials=0), asking(), world).run()
    assert found.tried[found.chosen].met
    assert 0.38 < found.tried[found.chosen].at <= 0.4 or found.tried[found.chosen].at == 1.0
    assert sum("could not be scored" in one.failed for one in found.tried) >= 1


def test_trials_go_beyond_the_line():
    def auc(t):
        return 0.9 - 0.5 * t

    world = World(auc, lambda t: 0.8)
    lined, searched = run(world, trials=0, aim=0.1), run(world, trials=40, aim=0.1)  # 0.1 wants t · scale = 1.6
    first, second = lined.tried[lined.chosen], searched.tried[searched.chosen]
    assert first.distance == pytest.approx(0.3)
    assert second.distance < 0.1
    assert sum(one.kind == "trial" for one in searched.tried) > 20
    assert {one.method for one in searched.tried if one.kind == "trial"} == {"ties", "linear"}
    ties = [one for one in searched.tried if one.method == "ties"]
    assert all(0.1 <= one.density <= 1 for one in ties)
    assert all(sum(one.weights) == pytest.approx(1) for one in ties)
    assert searched.line is not None
    assert any(one.weights == searched.tried[searched.line.tried].weights for one in ties)  # a start from the line


@pytest.mark.parametrize("search", [{}, {"methods": ["ties"]}, {"over": ["weights"]}, {"line": False}, {"seed": 3}])
def test_the_same_seed_gives_the_same_search(search):
    def once():
        world = World(lambda t: 0.9 - 0.5 * t, lambda t: 0.9 - 0.2 * t)
        return run(world, trials=15, **search)

    first, second = once(), once()
    assert first.tried == second.tried
    assert first.chosen == second.chosen
    seeds = [run(World(lambda t: 0.9 - 0.5 * t, lambda t: 0.9), trials=15, line=False, seed=s).tried for s in (0, 1)]
    assert seeds[0] != seeds[1]


def test_constraints_come_first():
    # what is nearest to the aim keeps too little
    world = World(lambda t: 1 - t, lambda t: 0.8 - 0.2 * t)
    found = run(world, trials=30, aim=0.0)
    best = found.tried[found.chosen]
    assert best.met
    assert best.values[KEPT].value >= 0.95 * 0.8 - 1e-9
    assert any(one.distance is not None and one.distance < best.distance for one in found.tried if not one.met)
    assert found.tried[found.chosen] == min((one for one in found.tried if one.method), key=order)


def test_where_nothing_keeps_enough_the_nearest_is_taken():
    found = run(World(lambda t: 0.5, lambda t: 0.1 + 0.3 * (1 - t)), trials=5)
    best = found.tried[found.chosen]
    assert not best.met
    least = min(one.shortfall for one in found.tried if one.method and one.distance is not None)
    assert best.shortfall == pytest.approx(least)
    assert least > 0


def test_what_is_given_is_kept():
    world = World(lambda t: 0.9 - 0.5 * t, lambda t: 0.8)
    merge = {"weights": [0.25, 0.75], "parameters": {"sign": "frequency"}}
    found = run(world, trials=8, merge=merge, over=["density", "scale"])
    trials = [one for one in found.tried if one.kind == "trial"]
    assert found.line is None
    assert all(one.weights == [0.25, 0.75] for one in trials)
    assert all(one.parameters.get("sign") == "frequency" for one in trials if one.method == "ties")
    assert all("sign" not in one.parameters for one in trials if one.method == "linear")
    # inputs alone were measured as yardsticks, but their weights are not the given ones
    assert found.tried[found.chosen].kind == "trial"


def test_a_method_that_is_named_is_the_one_that_is_written():
    found = run(World(lambda t: 0.9 - 0.5 * t, lambda t: 0.8), trials=6, methods=["ties"])
    assert found.tried[found.chosen].method == "ties"
    assert found.line is not None


def test_the_time_is_up():
    found = run(World(lambda t: 0.9 - 0.5 * t, lambda t: 0.8), trials=40, minutes=0.2)  # each pass is said to take 1 s
    assert len(found.tried) == 12
    assert any("the time was up" in note for note in found.notes)


def test_a_merge_that_fails_is_passed_over():
    def world(setting):
        if setting is not None and setting.method == "ties":
            return Measured({}, 1.0, "too narrow")
        return measured(0.6, 0.8)

    found = Searching(space(trials=10), asking(), world).run()
    assert found.tried[found.chosen].method == "linear"
    assert any(one.failed == "too narrow" for one in found.tried)
    with pytest.raises(UserError, match="too narrow"):
        Searching(space(trials=4, methods=["ties"]), asking(), world).run()


def test_broken_inputs_and_targets_are_refused():
    with pytest.raises(UserError, match="NaN"):
        Searching(
            space(trials=2), asking(), lambda setting: measured(1, 1) if setting is None else Measured({}, 0, "NaN")
        ).run()
    with pytest.raises(UserError, match="nothing to keep"):
        Searching(space(trials=2), asking(), lambda setting: measured(1, 0.0))
    with pytest.raises(UserError, match="can't be measured"):
        Searching(space(trials=2), asking(), lambda setting: measured(None, 0.8))


def test_optuna_may_be_missing(monkeypatch):
    found = builtins.__import__

    def without(name, *arguments, **more):
        if name == "optuna":
            raise ImportError(name)
        return found(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    world = World(lambda t: 0.9 - 0.5 * t, lambda t: 0.8)
    with pytest.raises(UserError, match="optuna") as raised:
        run(world, trials=3)
    assert "expunge[sweep]" in raised.value.hint
    assert len(world.asked) == 1
    assert run(world, trials=0).line is not None  # the line needs none


# ---------------------------------------------------------------- in memory


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize(
    ("method", "density", "parameters"),
    [("ties", 0.5, {}), ("linear", None, {"scale": 0.7}), ("ties", 0.5, {"scope": "model"}), ("dare_ties", 0.5, {})],
)
def test_what_is_in_memory_is_what_is_written(three, budget, method, density, parameters):
    opened = open_inputs([three / "a", three / "b"], three / "base")
    model = llama(3)
    memory = InMemory(model, opened, budget)
    assert memory.keeps_differences == bool(budget)
    plan = plan_merge(method, 2, [0.3, -0.6], density, {"scale": 0.5})
    memory.set(plan_merge(method, 2, [1.0, 2.0], density))  # none leaves a trace
    memory.set(plan)
    again = plan_merge(method, 2, [0.3, 0.7], density, parameters)
    memory.set(again)
    merge_models(
        [three / "a", three / "b"], three / "out", base=three / "base", method=method, weights=[0.3, 0.7],
        density=density, parameters=parameters,
    )  # fmt: skip
    written, held = weights(three / "out"), dict(model.state_dict())
    assert all(torch.equal(held[name], value) for name, value in written.items())
    memory.reset()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights(three / "base").items())
    opened.close()


def test_narrow_inputs_adapters_and_tied_embeddings(tmp_path):
    base = save(llama(0, tied=True), tmp_path / "base", torch.bfloat16)
    one = save(moved(llama(0, tied=True), 1), tmp_path / "one", torch.bfloat16)
    two = adapter(llama(0, tied=True), tmp_path / "two", 2, str(base), target_modules=["q_proj", "down_proj"])
    opened = open_inputs([one, two], base)
    model = llama(5, tied=True)  # float32 in memory: what is measured is still what bfloat16 holds
    InMemory(model, opened, 10**9).set(plan_merge("linear", 2, [0.4, 0.6]))
    merge_models([one, two], tmp_path / "out", base=base, method="linear", weights=[0.4, 0.6])
    for name, value in weights(tmp_path / "out").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(model.state_dict()[name], value.float())
    opened.close()
