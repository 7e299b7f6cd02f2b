"""Studies without a model: the rules that they decide by, their options, their flags, their documents."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from expunge.cli.app import main
from expunge.data.aside import put_aside
from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.errors import UserError
from expunge.recipe import load_recipe
from expunge.studies import objectives_page, rmu_layers_page
from expunge.studies.base import STUDIES, build_options, study_command, study_recipe
from expunge.studies.objectives import published_rates, scaled_rate
from expunge.studies.objectives_page import Found, rate_text
from expunge.studies.rmu_layers import coefficients, spread_layers, steering_rate
from expunge.studies.rules import Measured, balance, choose, keeps, pareto_front, spread
from study_fixture import fake_ground, layer_trials, options_and_recipe, outcome

# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("candidates", "share", "key", "met"),
    [
        ({"a": (0.1, 0.76), "b": (0.2, 0.8)}, 0.95, "a", True),  # 0.95 · 0.8 = 0.76: the edge itself keeps
        ({"a": (0.1, 0.7599), "b": (0.2, 0.8)}, 0.95, "b", True),
        ({"a": (0.1, 0.7), "b": (0.2, 0.8)}, 0.8, "a", True),
        ({"a": (0.1, 0.78), "b": (0.1, 0.8)}, 0.95, "b", True),  # equal on forget: what keeps more
        ({"a": (0.1, 0.8), "b": (0.1, 0.8)}, 0.95, "a", True),  # equal on both: what comes first
        ({"a": (0.5, 0.4), "b": (0.0, 0.1)}, 0.95, "a", False),  # balances 0.5 and 0.222
        ({"a": (0.9, 0.7), "b": (0.1, 0.6)}, 0.95, "b", False),
    ],
)
def test_the_rule_chooses(candidates: dict[str, tuple[float, float]], share: float, key: str, met: bool) -> None:
    choice = choose({name: Measured(*pair) for name, pair in candidates.items()}, 0.8, share)
    assert choice is not None
    assert (choice.key, choice.met) == (key, met)


def test_nothing_is_chosen_of_nothing() -> None:
    assert choose({}, 0.8, 0.95) is None


@pytest.mark.parametrize(
    ("forget", "kept", "target", "expected"),
    [
        (0.0, 0.8, 0.8, 1.0),
        (0.0, 1.0, 0.8, 1.0),  # more than the target is not better
        (1.0, 0.8, 0.8, 0.0),
        (0.0, 0.0, 0.8, 0.0),
        (1.0, 0.0, 0.8, 0.0),
        (0.5, 0.4, 0.8, 0.5),
        (0.5, 0.0, 0.0, 2 / 3),  # nothing was known, so nothing was lost
    ],
)
def test_balance(forget: float, kept: float, target: float, expected: float) -> None:
    assert balance(Measured(forget, kept), target) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    draw = random.Random(seed)
    points = {n: Measured(draw.randint(0, 6) / 6, draw.randint(0, 6) / 6) for n in range(draw.randint(1, 12))}

    def beats(one: Measured, two: Measured) -> bool:
        return one != two and one.forget <= two.forget and one.kept >= two.kept

    undominated = {points[n] for n in points if not any(beats(points[m], points[n]) for m in points)}
    front = pareto_front(points)
    assert {points[n] for n in front} == undominated
    assert [points[n].forget for n in front] == sorted(points[n].forget for n in front)


@pytest.mark.parametrize("seed", range(20))
def test_no_eligible_candidate_forgets_more_than_the_chosen_one(seed: int) -> None:
    draw = random.Random(seed)
    points = {n: Measured(draw.random(), draw.random()) for n in range(10)}
    choice = choose(points, 0.9, 0.6)
    assert choice is not None
    eligible = [found for found in points.values() if keeps(found, 0.9, 0.6)]
    assert choice.met == bool(eligible)
    if eligible:
        assert points[choice.key].forget == min(found.forget for found in eligible)
    else:
        assert balance(points[choice.key], 0.9) == max(balance(found, 0.9) for found in points.values())


def test_spread() -> None:
    assert spread([0.4]) == (0.4, None)
    assert spread([0.1, 0.3]) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [0]),
        (2, [0, 1]),
        (8, list(range(8))),
        (16, [1, 3, 5, 7, 9, 11, 13, 15]),
        (32, [3, 7, 11, 15, 19, 23, 27, 31]),
    ],
)
def test_layers_are_spread_evenly_up_to_the_last(depth: int, expected: list[int]) -> None:
    assert spread_layers(depth) == expected


@pytest.mark.parametrize("depth", range(1, 100))
def test_layers_exist_and_differ(depth: int) -> None:
    layers = spread_layers(depth)
    assert len(layers) == min(8, depth) == len(set(layers))
    assert layers[-1] == depth - 1
    assert min(layers) >= 0
    assert max(b - a for a, b in itertools.pairwise([-1, *layers])) <= math.ceil(depth / 8)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ((1e-5,), [1e-5 / 3, 1e-5, 3e-5]),
        ((1e-5, 2e-5), [1e-5, 2e-5, 6e-5]),
        ((5e-5, 1e-5, 2e-5), [1e-5, 2e-5, 5e-5]),
        ((1e-5, 1e-4, 3e-4, 1e-3), [1e-5, 1e-4, 3e-4, 1e-3]),
    ],
)
def test_every_method_has_three_rates_at_least(published: tuple[float, ...], expected: list[float]) -> None:
    assert published_rates(published) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rate", "parameters", "adapters", "expected"),
    [(1e-5, 7_000_000_000, False, 1e-5), (1e-5, 70_000_000, False, 1e-4), (2e-5, 7_000_000_000, True, 2e-4)],
)
def test_rates_follow_the_size(rate: float, parameters: int, adapters: bool, expected: float) -> None:
    assert scaled_rate(rate, parameters, adapters) == pytest.approx(expected)


def test_rates_are_written_as_in_papers() -> None:
    assert [rate_text(rate) for rate in (1e-5, 1.4e-4, 0.02, 1e-10)] == ["1e-5", "1.4e-4", "2e-2", "1e-10"]


def encoded(task: str, name: str) -> Encoded:
    import numpy as np

    return Encoded(Example(name, "p", "a", task=task), np.arange(4, dtype=np.int32), 1, 2, 0)


@pytest.mark.parametrize(
    ("tasks", "part", "aside"),
    [
        ("aaaaaaaa", 0.25, [6, 7]),
        ("abababab", 0.25, [6, 7]),
        ("aaaabbbb", 0.5, [2, 3, 6, 7]),
        ("aab", 0.25, [2]),  # no task has four rows: the last row
        ("a", 0.25, []),
    ],
)
def test_the_last_rows_of_each_task_are_put_aside(tasks: str, part: float, aside: list[int]) -> None:
    rows = [encoded(task, str(place)) for place, task in enumerate(tasks)]
    kept, away = put_aside(rows, part)
    assert [int(row.example.id) for row in away] == aside
    assert [int(row.example.id) for row in kept] == [place for place in range(len(tasks)) if place not in aside]


# ---------------------------------------------------------------- options and recipes


@pytest.mark.parametrize(
    ("name", "given", "problem"),
    [
        ("rmu_layers", {"model": "tiny", "layer": "1"}, "has no option --layer"),
        ("rmu_layers", {"model": "tiny", "layers": "one"}, "--layers"),
        ("rmu_layers", {"model": "tiny", "betas": "5,-1"}, "--betas"),
        ("rmu_layers", {"model": "tiny", "share": "1.2"}, "--share"),
        ("rmu_layers", {}, "--model"),
        ("objectives", {"model": "tiny", "forget": "f.jsonl"}, "--forget needs --retain"),
        ("objectives", {"model": "tiny", "retain": "r.jsonl"}, "--retain needs --forget"),
        ("objectives", {"model": "tiny", "forget": "f", "retain": "r", "benchmark": "fictitious"}, "either"),
        ("objectives", {"model": "tiny", "seeds": "0"}, "--seeds"),
    ],
)
def test_options_that_can_not_be(name: str, given: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        build_options(STUDIES.get(name), given)
    assert problem in caught.value.message
    assert caught.value.hint


def test_options_are_read_from_text() -> None:
    options = build_options(STUDIES.get("rmu_layers"), {"model": "tiny", "layers": "1, 0,", "betas": "2.5"})
    assert (options.layers, options.betas, options.coefficients) == ((1, 0), (2.5,), None)


@pytest.mark.parametrize("name", STUDIES.names())
def test_recipes_load_again_and_teach_the_benchmark_alone(name: str) -> None:
    chosen = STUDIES.get(name)
    taught = study_recipe(chosen, build_options(chosen, {"model": "smollm2-135m"}), ["prepare.train.epochs=3"])
    assert taught.prepare is not None
    assert taught.prepare.train.epochs == 3
    assert (taught.data.benchmark, taught.evaluate.generate) == ("fictitious", None)
    given = {"model": "tiny", "forget": "f.jsonl", "retain": "r.jsonl"} | (
        {"reference": "clean"} if chosen.reference else {}
    )
    own = study_recipe(chosen, build_options(chosen, given), [])
    assert own.prepare is None
    assert (own.reference is not None) == chosen.reference
    for recipe in (taught, own):
        assert load_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("rmu_layers", "unlearn.0.parameters.layer=3"),
        ("rmu_layers", "unlearn.trial.method=npo"),
        ("objectives", "unlearn.0.train.lr=1e-5"),
        ("objectives", "merge.method=ties"),
        ("zjuklab", "unlearn.trial.retain.kl=1"),
        ("zjuklab", "unlearn.trial.train.lr=1e-3"),
        ("zjuklab", "unlearn.trial.lora.rank=4"),
    ],
)
def test_what_the_study_sets_itself_can_not_be_set(name: str, override: str) -> None:
    options, _ = options_and_recipe(name)
    with pytest.raises(UserError, match="sets it itself"):
        study_recipe(STUDIES.get(name), options, [override])


def test_the_command_repeats_the_options() -> None:
    chosen = STUDIES.get("rmu_layers")
    options = build_options(chosen, {"model": "my model", "layers": "1,2", "betas": "3", "share": "0.95"})
    command = study_command(chosen, options, ["prepare.train.epochs=3"], Path("out"))
    assert command == (
        "expunge study rmu_layers --model 'my model' --layers 1,2 --betas 3 --set prepare.train.epochs=3 -o out"
    )


def test_what_is_not_given_follows_from_the_model() -> None:
    options, _ = options_and_recipe("rmu_layers", betas="3,5")
    norms = {"forget": [10.0, 20.0, 40.04, 80.0], "retain": [1.0, 1.0, 1.0, 1.0]}
    assert coefficients(options, [0, 1, 2, 3], norms) == (6.5, 120.0)
    assert coefficients(options, [1], norms) == (6.5, 60.0)
    assert [steering_rate(count) for count in (500_000, 135_000_000, 540_000_000)] == [1e-2, 1e-2, 5e-3]


# ---------------------------------------------------------------- documents


def rmu_document(trials, planned=None, **given):
    options, recipe = options_and_recipe("rmu_layers", layers="0,4,8,12", betas="5", coefficients="6.5", **given)
    norms = {"forget": [1.0 + layer for layer in range(16)], "retain": [2.0 + layer for layer in range(16)]}
    strengths = {"rmu": options.coefficients, "adaptive_rmu": options.betas}
    scanned = rmu_layers_page.Grid(16, [0, 4, 8, 12], strengths, 1e-2)
    return rmu_layers_page.document(fake_ground(recipe, trials, planned), options, scanned, norms)


def cell(method: str, layer: int, forget: float, unseen: float, failed: str = ""):
    about = {"method": method, "layer": layer, "strength": 5.0 if method == "adaptive_rmu" else 6.5}
    return outcome(f"{method}-{layer}", about, failed, forget=forget, retain=0.9, retain_unseen=unseen)


def test_the_answer_names_the_layer_and_those_alike() -> None:
    trials = [cell("rmu", 0, 0.01, 0.2), cell("rmu", 4, 0.11, 0.79), cell("adaptive_rmu", 8, 0.1, 0.76)]
    document = rmu_document(trials)
    assert document.answer == (
        "On tiny, Adaptive RMU at layer 8 of 16 with β = 5 serves best: forget strength 0.900 → 0.100, 95% of unseen "
        "retain strength kept; layer 4 within 0.02."
    )
    assert document.results["chosen"] == {"method": "adaptive_rmu", "layer": 8, "strength": 5.0}
    rmu, adaptive = (section.figures[0] for section in document.sections[:2])
    assert rmu.values == [[0.01], [0.11], [None], [None]]
    assert (rmu.eligible, rmu.best) == ([(1, 0)], None)
    assert (adaptive.eligible, adaptive.best) == ([(2, 0)], (2, 0))


def test_the_answer_says_when_no_layer_keeps_enough() -> None:
    document = rmu_document([cell("rmu", 0, 0.01, 0.2), cell("rmu", 4, 0.5, 0.7, failed="not finite")])
    assert document.answer.startswith("On tiny no layer keeps 95% of unseen retain strength; the best balance has RMU")
    assert document.results["meets_rule"] is False
    assert document.remarks == []
    assert document.sections[0].figures[0].failed == [(1, 0)]
    assert "no trial was finished" in rmu_document([], planned=8).answer


def test_a_lower_share_changes_the_choice() -> None:
    trials = [cell("rmu", 0, 0.05, 0.5), cell("rmu", 4, 0.5, 0.79)]
    assert rmu_document(trials).results["chosen"]["layer"] == 4
    assert rmu_document(trials, share="0.5").results["chosen"]["layer"] == 0
    assert rmu_document(trials, share="0.5").remarks == []
    (remark,) = rmu_document(trials).remarks  # 0.05 at 0.625 of the target's is the better balance of the two
    assert "RMU at layer 0 of 16 with c = 6.5" in remark


def test_methods_are_ranked_and_the_front_is_drawn() -> None:
    options, recipe = options_and_recipe("objectives", methods="npo,rmu,wga", seeds="2")
    found, trials, tried = [], [], {}
    for method, forget, unseen in (("npo", 0.1, 0.7), ("rmu", 0.5, 0.78), ("wga", 0.6, 0.3)):
        grid = {}
        for rate in (1e-5, 2e-5):
            about = {"method": method, "rate": rate, "seed": 42}
            strengths = {"forget": forget, "retain": 0.9, "validation": 0.79, "retain_unseen": unseen}
            grid[rate] = outcome(f"{method}-{rate}", about, **strengths)
        again = outcome(f"{method}-again", about, **{**strengths, "forget": forget + 0.02})
        tried[method] = grid
        trials += [*grid.values(), again]
        found.append(Found(method, 2e-5, method != "wga", grid, [grid[2e-5], again]))
    ground = fake_ground(recipe, trials, validation=0.03)
    document = objectives_page.document(ground, options, found, tried, {"lunar": "no such layer"})
    assert document.results["front"] == ["npo", "rmu"]
    assert document.answer == (
        "On tiny, npo has the best balance of 3 objectives: forget strength 0.900 → 0.110, unseen retain strength "
        "0.800 → 0.700; nothing dominates rmu either."
    )
    table = document.sections[1].tables[0]
    assert [row.cells[0].text for row in table.rows] == ["npo", "rmu", "wga", "Original", "Target", "Reference"]
    assert (table.rows[0].cells[2].text, table.rows[0].cells[2].under) == ("0.110", "± 0.014")
    assert "keeps 95%" in table.rows[1].cells[-1].text
    assert table.rows[2].cells[-1].text == "no rate met the rule"
    plane = document.sections[0].figures[0]
    assert plane.retain_at_least == pytest.approx(0.76)
    assert {spot.name: spot.role for spot in plane.spots}["npo"] == "result"
    assert plane.spots[0].x_ends == pytest.approx((0.11 - 0.0141421, 0.11 + 0.0141421))
    assert document.settings["Left out"] == "lunar: no such layer"


def test_a_document_is_json_and_back() -> None:
    document = rmu_document(layer_trials([0, 4, 8, 12], {"rmu": (6.5,), "adaptive_rmu": (5.0,)}))
    again = type(document).model_validate(json.loads(json.dumps(document.to_json())))
    assert again == document


# ---------------------------------------------------------------- the command line


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    shown = capsys.readouterr().out
    assert main(["list", "studies"]) == 0
    listed = capsys.readouterr().out
    for name in STUDIES.names():
        assert name in shown
        assert name in listed


@pytest.mark.parametrize("name", STUDIES.names())
def test_help_shows_every_flag(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["study", name, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in STUDIES.get(name).options.model_fields:
        assert f"--{option.replace('_', '-')}" in shown
    assert "--set" in shown
    assert "--output" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        (["study", "rmu_layer"], "unknown study 'rmu_layer'", "did you mean 'rmu_layers'?"),
        (["study", "rmu_layers"], "Missing option '--model'", "see: expunge study rmu_layers --help"),
        (["study", "rmu_layers", "--depth", "3"], "No such option: --depth", "see: expunge study rmu_layers --help"),
        (["study", "rmu_layers", "--model", "tiny", "--layers", "x"], "--layers", "expunge study rmu_layers --help"),
        (["study", "rmu_layers", "--model", "tiny", "--layers", "7"], "the model has layers 0 to 1", "--layers"),
        (["study", "rmu_layers", "--model", "nowhere"], "no model at nowhere", ""),
        (["study", "objectives", "--model", "tiny", "--methods", "npoo"], "unknown method 'npoo'", "'npo'"),
        (
            ["study", "objectives", "--model", "tiny", "--methods", "npo", "--parameters", "wga.beta=1"],
            "method 'wga' is not among those studied",
            "npo",
        ),
        (["study", "objectives", "--model", "tiny", "--methods", "npo", "--parameters", "npo.b=1"], "'b'", "beta"),
        (["study", "objectives", "--model", "tiny", "--set", "unlearn.0.seed=1"], "sets it itself", "-h"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    sentence: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert hint in shown.err
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == [] or not list((tmp_path / "runs").iterdir())
