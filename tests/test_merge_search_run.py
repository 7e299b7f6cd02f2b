"""`expunge merge --search` from beginning to end: what is found, written, resumed and refused."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest

from expunge import api
from expunge.cli.app import main
from expunge.errors import UserError
from expunge.pipeline import merge_search_bench
from expunge.report.search_page import search_document
from expunge.report.search_record import read_search
from expunge.scoring.scores import score
from merge_search_world import COUNTS, build_world
from merging_models import assert_equal, weights

pytestmark = pytest.mark.usefixtures("quick_disk")

# ---------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return build_world(tmp_path_factory.mktemp("world"))


def merged(world, out, *, models=("under", "over"), rows=("forget", "retain", "holdout"), search=None, **more):
    given = {name: str(world["files"][name]) for name in rows}
    return api.merge(
        [str(world["places"][name]) for name in models],
        output=out,
        base=str(world["places"]["target"]),
        search=search or {},
        quiet=True,
        **{**given, **more},
    )


class CountedScore:
    """The scoring pass, counted; from the `stop`-th on it is interrupted."""

    def __init__(self, stop: int | None = None) -> None:
        self.passes, self.stop = 0, stop

    def __call__(self, model, rows, **settings):
        if self.stop is not None and self.passes >= self.stop:
            raise KeyboardInterrupt
        self.passes += 1
        return score(model, rows, **settings)


@pytest.fixture
def passed(monkeypatch) -> CountedScore:
    counted = CountedScore()
    monkeypatch.setattr(merge_search_bench, "score", counted)
    return counted


AIM = {"aims": ["forget:mia_loss=0.85"], "keep": ["retain:extraction_strength=0.7"]}


def test_a_search_writes_the_merge_that_it_measured(world, tmp_path):
    out = tmp_path / "out"
    made = merged(world, out, search={**AIM, "trials": 12})
    found = read_search(out)
    best = found.best
    assert best.met
    assert best.distance < min(one.distance for one in found.tried if one.kind == "input" and one.met)
    assert found.rows == {name: COUNTS[name] for name in ("forget", "holdout", "retain")}
    assert found.against == "holdout"
    assert made.path == out
    # measured again from the folder, by the command that measures models
    exam = api.evaluate(
        str(out), **{name: str(world["files"][name]) for name in ("forget", "retain", "holdout")},
        overrides=["evaluate.metrics=[mia_loss,extraction_strength]", "evaluate.generate=null"], quiet=True,
    )  # fmt: skip
    values = {f"{entry['split']}:{entry['metric']}": entry for entry in exam.records}
    for name, estimate in best.values.items():
        assert values[name]["value"] == pytest.approx(estimate.value, abs=1e-6)
        assert values[name]["n"] == estimate.n
    # the record of the merge has the numbers of the search
    record = json.loads((out / "merge.json").read_text())
    assert [model["weight"] for model in record["models"]] == best.weights
    assert record["method"] == best.method
    assert record["parameters"]["scale"] == best.parameters["scale"]
    assert {"search.json", "search.html"} <= set(record["files"])
    page = (out / "search.html").read_text(encoding="utf-8")
    for words in ("Search of a merge", "forget (6 rows)", "best of many looks", "Along the line", "t = "):
        assert words in page
    assert merged(world, out, search={**AIM, "trials": 0}).path == out  # a folder of ours is replaced


def test_a_killed_search_goes_on_and_finds_the_same(world, tmp_path, monkeypatch, passed):
    search = {**AIM, "trials": 8}
    merged(world, tmp_path / "whole", search=search)
    whole = passed.passes
    assert whole == sum(1 for one in read_search(tmp_path / "whole").tried)
    for stop in (3, 8):
        monkeypatch.setattr(merge_search_bench, "score", CountedScore(stop))
        with pytest.raises(KeyboardInterrupt):
            merged(world, tmp_path / "cut", search=search)
        assert not (tmp_path / "cut").exists()
        journal = tmp_path / "cut.search" / "trials.jsonl"
        journal.write_text(journal.read_text() + '{"key": "half a li')  # as a kill leaves it
        stop = 0
    rest = CountedScore()
    monkeypatch.setattr(merge_search_bench, "score", rest)
    merged(world, tmp_path / "cut", search=search)
    assert rest.passes == whole - 3 - 8
    first, second = read_search(tmp_path / "whole"), read_search(tmp_path / "cut")
    assert [one.values for one in first.tried] == [one.values for one in second.tried]
    assert first.answer == second.answer
    # more trials, another aim: only what is new is passed
    rest.passes = 0
    merged(world, tmp_path / "cut", search={**AIM, "trials": 0, "aims": ["forget:mia_loss=0.9"]})
    assert rest.passes <= 6


def test_other_rows_are_other_numbers(world, tmp_path, passed):
    merged(world, tmp_path / "out", search={**AIM, "trials": 0})
    before = passed.passes
    merged(world, tmp_path / "out", search={**AIM, "trials": 0, "limit": 4})
    assert passed.passes >= before + 3
    assert read_search(tmp_path / "out").rows["forget"] == 4


def test_the_defaults_aim_at_what_the_rows_allow(world, tmp_path):
    merged(world, tmp_path / "a", search={"trials": 0})
    assert read_search(tmp_path / "a").aims == ["forget:mia_loss=0.5"]
    assert read_search(tmp_path / "a").keep == ["retain:extraction_strength=0.95"]
    merged(world, tmp_path / "b", search={"trials": 0}, rows=("forget", "retain", "retain_unseen"))
    found = read_search(tmp_path / "b")
    assert found.aims == ["forget:extraction_strength<=0"]
    assert found.unused == ["retain_unseen"]
    assert "retain_unseen" in search_document(found).remarks[-1]
    reference = str(world["places"]["reference"])
    merged(world, tmp_path / "c", search={"trials": 0}, rows=("forget", "retain"), reference=reference)
    found = read_search(tmp_path / "c")
    assert found.aims == ["forget:extraction_strength<=reference"]
    told = next(one for one in found.tried if one.kind == "reference")
    assert found.wanted["forget:extraction_strength"] == told.values["forget:extraction_strength"].value


def test_other_rows_may_stand_for_the_holdout(world, tmp_path):
    unseen = {"splits": {"outside": {"path": str(world["files"]["retain_unseen"]), "role": "holdout"}}}
    search = {"trials": 0, "aims": ["forget:mia_loss=0.8"]}
    merged(world, tmp_path / "a", search=search, **unseen)
    assert read_search(tmp_path / "a").against == "outside"  # what the report does not use comes first
    merged(world, tmp_path / "b", search={**search, "holdout": "holdout"}, **unseen)
    assert read_search(tmp_path / "b").against == "holdout"
    assert read_search(tmp_path / "a").target.values != read_search(tmp_path / "b").target.values
    told = {"aims": ["forget:mia_reference=0.5"], "trials": 0}
    merged(world, tmp_path / "c", search=told, reference=str(world["places"]["reference"]))
    assert "forget:mia_reference" in read_search(tmp_path / "c").best.values


@pytest.mark.parametrize(
    ("search", "more", "sentence"),
    [
        ({"aims": ["forgot:mia_loss=0.5"]}, {}, "there are no rows called forgot"),
        ({"aims": ["forget:mia_los=0.5"]}, {}, "unknown metric 'mia_los'"),
        ({"aims": ["retain:mia_loss=0.5"]}, {}, "has nothing to say of retain rows"),
        ({"aims": ["forget:rouge_l_recall=0"]}, {}, "makes the scoring pass alone"),
        ({"aims": ["forget:kl_drift=0"]}, {}, "makes the scoring pass alone"),
        ({"aims": ["forget:mia_reference=0.5"]}, {}, "needs a reference model"),
        ({"aims": ["forget:extraction_strength<=reference"]}, {}, "there is none"),
        ({"aims": ["forget:mia_loss=0.5"]}, {"rows": ("forget", "retain")}, "needs holdout rows"),
        ({"aims": ["forget:extraction_strength_paraphrase=0"]}, {}, "can be asked as paraphrase"),
        ({"keep": ["retain:perplexity=0.9"]}, {}, "higher values of perplexity are not better"),
        ({"holdout": "outside"}, {}, "there is no split 'outside'"),
        ({}, {"rows": ("forget",)}, "there are no rows called retain"),
        ({}, {"rows": ("retain",)}, "no rows to forget"),
        ({"aim": ["forget:mia_loss=0.5"]}, {}, "unknown key"),
        ({}, {"models": ("under",), "density": 0.5, "parameters": {"scale": 1}}, "nothing is left to choose"),
    ],
)
def test_what_can_not_be_searched_is_refused_before_anything_is_written(world, tmp_path, search, more, sentence):
    if "models" in more:
        search = {**search, "over": []}
    with pytest.raises(UserError, match=re.escape(sentence)):
        merged(world, tmp_path / "out", search=search, **more)
    assert list(tmp_path.iterdir()) == []


def test_a_search_needs_a_base_and_an_own_folder(world, tmp_path):
    places = [str(world["places"][name]) for name in ("under", "over")]
    rows = {name: str(world["files"][name]) for name in ("forget", "retain")}
    with pytest.raises(UserError, match="before unlearning"):
        api.merge(places, output=tmp_path / "out", search={}, quiet=True, **rows)
    (tmp_path / "out.search").mkdir()
    (tmp_path / "out.search" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine\.txt"):
        merged(world, tmp_path / "out", search={"trials": 0})
    with pytest.raises(UserError, match="in each other's way"):
        merged(world, world["places"]["over"] / "out", search={"trials": 0})


def test_what_keeps_too_little_is_written_with_a_verdict(world, tmp_path):
    over = str(world["places"]["over"])
    search = {"trials": 4, "keep": ["retain:extraction_strength=1.5"], "scale": [0.9, 1.1]}
    merged(world, tmp_path / "out", search=search, models=("over",), rows=("forget", "retain"))
    found = read_search(tmp_path / "out")
    assert not found.best.met
    assert found.answer.startswith("no merge that was tried keeps enough")
    assert search_document(found).remarks[0].startswith("No merge that was tried")
    assert found.models == [over]


def test_the_command(world, tmp_path, capsys):
    places, files, out = world["places"], world["files"], tmp_path / "out"
    command = ["merge", places["under"], places["over"], "--base", places["target"], "-o", out, "--no-line", "--search"]
    command += ["--forget", files["forget"], "--retain", files["retain"], "--methods", "ties,linear", "--trials", "5"]
    command += ["--aim", "forget:extraction_strength<=0.3", "--keep", "retain:extraction_strength=0.6", "--seed", "2"]
    command += ["--density", "0.7", "--range", "scale=0.5:1.2", "--set", "evaluate.batch_size=4"]
    assert main([*map(str, command)]) == 0
    shown = capsys.readouterr()
    assert "→ " in shown.out
    assert "forget:extraction_strength" in shown.out
    assert read_search(out).answer in shown.out
    assert str(out / "search.html") in shown.err
    assert main([*map(str, command), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["over"] == ["weights", "scale"]
    assert {one["density"] for one in printed["tried"] if one["method"] == "ties"} == {0.7}
    assert printed["line"] is None
    assert printed["seed"] == 2
    before = (out / "search.html").read_bytes()
    (out / "search.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "search.html").read_bytes() == before
    # what the page says makes the merge again does
    again = shlex.split(search_document(read_search(out)).command)[1:-1]
    assert main([*again, str(tmp_path / "again")]) == 0
    assert_equal(weights(tmp_path / "again"), weights(out))


def test_a_run_searches_its_merge(world, tmp_path):
    rows = {name: str(world["files"][name]) for name in ("forget", "retain", "holdout")}
    train = {"lr": 2e-3, "batch_size": 6, "precision": "float32", "max_steps": 3}
    recipe = {
        "name": "searched",
        "model": str(world["places"]["target"]),
        "data": {**rows, "max_length": 64},
        "unlearn": [
            {"name": "over", "method": "grad_ascent", "train": {**train, "max_steps": 4}},
            {"name": "under", "method": "npo", "train": train, "lora": 4},
        ],
        "merge": {"search": {"trials": 4, "aims": ["forget:extraction_strength=0.2"], "seed": 1}},
        "evaluate": {"metrics": ["extraction_strength"], "generate": None},
    }
    lines = api.plan(recipe, output=tmp_path / "run").lines()
    assert any("searched in 4 trials" in line for line in lines)
    assert any("aims: forget:extraction_strength=0.2" in line for line in lines)
    result = api.run(recipe, output=tmp_path / "run", quiet=True)
    found = read_search(result.model)
    assert found.models == ["over", "under"]
    entry = next(
        e
        for e in result.metrics
        if (e["variant"], e["split"], e["metric"]) == ("merged", "forget", "extraction_strength")
    )
    assert entry["value"] == pytest.approx(found.best.values["forget:extraction_strength"].value, abs=1e-6)
    assert found.answer in json.loads((tmp_path / "run" / "run.json").read_text())["notes"][-1]
    assert "chosen in 4 trials" in result.report.read_text(encoding="utf-8")
    assert (result.model / "search.html").is_file()
    assert api.run(recipe, output=tmp_path / "run", quiet=True).skipped_all


@pytest.mark.parametrize(
    ("merge", "sentence"),
    [
        ({"search": {"aims": ["forget:nonsense=1"]}}, "nonsense"),
        ({"search": {"keep": ["unseen:extraction_strength=0.9"]}}, "no rows called unseen"),
        ({"search": {"trials": 0}, "parameters": {"sign": "total"}}, "the line is linear"),
        ({"search": {}, "weights": [1, 1]}, "the search chooses weights"),
    ],
)
def test_a_recipe_that_can_not_be_searched_is_refused_before_anything_is_trained(world, tmp_path, merge, sentence):
    recipe = {
        "model": str(world["places"]["target"]),
        "data": {name: str(world["files"][name]) for name in ("forget", "retain")},
        "unlearn": [{"name": "over"}, {"name": "under"}],
        "merge": merge,
    }
    with pytest.raises(UserError, match=sentence):
        api.plan(recipe, output=tmp_path / "run")
