"""The study behind `auto`: what it chooses from made-up findings, and a whole one on `tiny`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import api
from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.recipe import ModelConfig
from expunge.recipe.model import Thresholds
from expunge.studies.auto import rivals_of
from expunge.studies.auto_beside import Beside
from expunge.studies.auto_page import Examined, chosen_of, document
from expunge.studies.auto_space import AUTO, MERGED, VARIATIONS, Entrant
from study_fixture import fake_ground, options_and_recipe, outcome, yardsticks

pytestmark = pytest.mark.usefixtures("quick_disk")

TAUGHT = ["prepare.train.epochs=40", "prepare.train.checkpoint_every=1000", "evaluate.bootstrap=100"]


def found(
    name: str, forget: float, kept: float, relearned: float = 0.5, people: int = 42, family: str = AUTO
) -> Examined:
    """An entrant on made-up people: the target keeps .8 of validation and unseen rows, the reference relearns .2."""
    standing = {one.name: one for one in yardsticks(validation=0.8)}
    own = outcome(name, {"method": family}, forget=forget, retain=0.9, validation=kept, retain_unseen=kept)
    return Examined(Entrant(name, family), people, {**standing, name: own}, 0.9, {"relearn 15steps": (relearned, 0.2)})


def names(tried: list[Examined]) -> list[str]:
    return [one.entrant.name for one in chosen_of(tried, Thresholds())]


def test_the_smallest_margin_is_chosen_among_those_that_forget():
    tried = [
        found("auto-default", 0.05, 0.8, 0.6),
        found("auto-forgot-little", 0.3, 0.8, 0.2),
        found("auto-good", 0.06, 0.78, 0.4),
        found("npo-low", 0.5, 0.8, family="npo"),
        found("npo-high", 0.4, 0.77, family="npo"),
    ]
    assert names(tried) == ["auto-good", "auto-default", "npo-high"]


def test_where_nothing_forgets_what_leaves_least_stands_in():
    tried = [found("auto-default", 0.5, 0.8), found("auto-deep", 0.4, 0.8)]
    assert names(tried) == ["auto-deep", "auto-default"]
    assert names([]) == []


@pytest.mark.parametrize("reported", [True, False])
def test_the_page_has_means_over_people(reported: bool):
    options, recipe = options_and_recipe("auto", report="43,44" if reported else ())
    tried = [found("auto-default", 0.05, 0.8, 0.6), found("npo-low", 0.5, 0.8, family="npo")]
    others = [found(one.entrant.name, one.own["forget"] + step, 0.8, people=43 + i, family=one.entrant.family)
              for one in tried for i, step in enumerate((0.0, 0.02))]  # fmt: skip
    made = document(fake_ground(recipe, []), options, tried, tried, others if reported else [])
    first = made.sections[0].tables[0]
    row = {cell.text: cell for cell in first.rows[0].cells}
    wanted = "0.060" if reported else "0.050"
    assert row[wanted].under == ("± 0.014" if reported else "")
    assert f"leaves extraction strength {wanted}" in made.answer
    assert ("on other people" in made.answer) == reported
    assert made.results["chosen"] == "auto-default"


def test_the_best_rival_is_the_one_that_leaves_least_once_calibrated():
    options, recipe = options_and_recipe("auto")
    ours = replace(found("auto-default", 0.05, 0.8), calibrated=0.02)
    handed_out, better = found("npo-low", 0.3, 0.8, family="npo"), found("eul-low", 0.4, 0.8, family="eul")

    def answer(*rivals: Examined) -> str:
        tried = [ours, *rivals]
        return document(fake_ground(recipe, []), options, tried, tried, []).answer

    assert "leaves 0.020, and the best rival, eul-low, 0.100" in answer(
        replace(handed_out, calibrated=0.3), replace(better, calibrated=0.1)
    )
    assert "the best rival, npo-low, leaves 0.300" in answer(handed_out, better), "none could be calibrated"
    assert "rival" not in answer()


def test_what_broke_beside_the_subject_stands_in_the_table():
    options, recipe = options_and_recipe("auto")
    said = {"auto-default": Beside(0.7, 0.25, None), "target": Beside(0.8, 0.125, 3.0)}
    one = replace(found("auto-default", 0.05, 0.8), beside=said)
    table = document(fake_ground(recipe, []), options, [one], [one], []).sections[0].tables[0]
    places = [
        place for place, column in enumerate(table.columns) if column.label in ("General", "Repetition", "Perplexity")
    ]
    shown = {row.role: [row.cells[place].text for place in places] for row in table.rows}
    assert shown == {
        "result": ["0.700", "0.250", "–"], "target": ["0.800", "0.125", "3.000"], "reference": ["–"] * 3,
        "original": ["–"] * 3,
    }  # fmt: skip


def test_a_page_without_any_model_says_so():
    options, recipe = options_and_recipe("auto")
    assert "no model was finished" in document(fake_ground(recipe, []), options, [], [], []).answer


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"variations": "depe"}, "auto has no variation 'depe'"),
        ({"rivals": "npoo"}, "npoo"),
        ({"report": "42,43"}, "those that the choice is made on"),
        ({"attacks": "relearning"}, "relearning"),
        ({"rivals": "npo", "parameters": "rmu.alpha=10"}, "method 'rmu' is not among those studied"),
        ({"rivals": "rmu", "parameters": "rmu.alfa=10"}, "alfa"),
        ({"parameters": "relearning.steps=10"}, "relearning"),
    ],
)
def test_mistakes_are_told(given: dict[str, str], match: str, tmp_path: Path):
    with pytest.raises(UserError, match=match):
        api.study("auto", model="tiny", output=tmp_path / "out", quiet=True, **given)


def test_every_variation_is_an_entry_that_could_be_trained(tmp_path: Path):
    given = {
        "benchmark": "fictitious:40",
        "variations": ",".join((*VARIATIONS, *MERGED)),
        "rivals": "",
        "minutes": "0.0001",
    }
    result = api.study("auto", model="tiny", output=tmp_path / "out", overrides=TAUGHT, quiet=True, **given)
    assert result.document.planned == len(VARIATIONS) + len(MERGED)
    assert result.document.done == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("auto") / "out"
    return folder, run(folder)


def run(folder: Path) -> Any:
    given = {
        "benchmark": "fictitious:40", "variations": "deep", "rivals": "npo", "rates": "1e-3",
        "epochs": "2", "steps": "8", "report": "7",
        "parameters": "relearn.steps=2,relearn.looks=1,quantize.schemes=[nf4]",
    }  # fmt: skip
    return api.study("auto", model="tiny", output=folder, overrides=TAUGHT, quiet=True, **given)


def test_a_whole_study_reports_on_other_people(whole: tuple[Path, Any]):
    folder, result = whole
    found = result.document.results
    assert [one["name"] for one in found["tried"]] == ["auto-default", "auto-deep", "npo-lr1e-3"]
    for one in found["tried"]:
        assert one["calibrated"] is not None
        assert one["calibrated"] <= 1
        assert set(one["beside"]) == {one["name"], "original", "target", "reference"}
        assert all(0 <= values["general"] <= 1 for values in one["beside"].values())
    assert {one["people"] for one in found["reported"]} == {7}
    assert {label for one in found["tried"] for label in one["attacks"]} == {"relearn 2steps", "quantize nf4"}
    target, model = (
        dict(load_model(ModelConfig(id=str(folder / place))).model.named_parameters())
        for place in ("models/target", "zoo/npo-lr1e-3")
    )
    assert any(not torch.equal(target[name], model[name]) for name in target)
    scaled = json.loads((folder / "zoo" / "npo-lr1e-3" / "stage.json").read_text())["outputs"]["scale"]
    assert scaled == next(one["scale"] for one in found["tried"] if one["name"] == "npo-lr1e-3")
    other = (folder / "people-7" / "recipe.resolved.yaml").read_text()
    assert "seed: 7" in other
    assert (folder / "report.html").read_text().count("auto-default") > 2


def test_a_rival_takes_hyper_parameters_and_attacks_keep_theirs(tmp_path: Path):
    given = {
        "benchmark": "fictitious:40", "variations": "default", "rivals": "rmu,npo", "rates": "1e-3", "epochs": "1",
        "steps": "2", "attacks": "quantize", "beside": "false", "parameters": "rmu.alpha=10,rmu.coefficient=2",
    }  # fmt: skip
    result = api.study("auto", model="tiny", output=tmp_path / "out", overrides=TAUGHT, quiet=True, **given)
    tried = {one["name"]: one for one in result.document.results["tried"]}
    assert list(tried) == ["auto-default", "rmu-alpha10-coefficient2-lr1e-3", "npo-lr1e-3"]
    assert all(list(one["attacks"]) == ["quantize nf4"] for one in tried.values())
    options, recipe = options_and_recipe("auto", rivals="npo", rates="1e-3", parameters="npo.beta=0.5")
    (rival,) = rivals_of(fake_ground(recipe, []), options)
    assert (rival.name, rival.entry["parameters"]) == ("npo-beta0.5-lr1e-3", {"beta": 0.5})


def test_a_second_run_does_nothing(whole: tuple[Path, Any]):
    assert run(whole[0]).skipped_all


@pytest.mark.slow
def test_specialists_are_merged_and_scaled_as_a_whole(tmp_path: Path):
    given = {
        "benchmark": "fictitious:40", "variations": "merged", "rivals": "zjuklab", "rates": "1e-3", "epochs": "2",
        "steps": "8", "attacks": "", "beside": "false",
    }  # fmt: skip
    result = api.study("auto", model="tiny", output=tmp_path / "out", overrides=TAUGHT, quiet=True, **given)
    tried = {one["name"]: one for one in result.document.results["tried"]}
    assert list(tried) == ["auto-default", "auto-merged", "zjuklab-lr1e-2"]
    assert not any(one["attacks"] or one["beside"] for one in tried.values())
    for name in ("auto-merged", "zjuklab-lr1e-2"):
        place = tmp_path / "out" / "zoo" / name
        scale = json.loads((place / "stage.json").read_text())["outputs"]["scale"]
        assert scale == tried[name]["scale"]
        assert 0 <= scale <= 1
        assert not (place / "adapter_config.json").exists()
        found = {one.name for one in (tmp_path / "out" / "specialists").iterdir() if one.name.startswith(name)}
        assert found == {f"{name}-over", f"{name}-under"}
