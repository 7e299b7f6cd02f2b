"""The study `zjuklab` up to its merges: options, what is trained, what a training keeps, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import expunge.pipeline.stages as stages_module
from expunge.errors import UserError
from expunge.methods.base import build_objective
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.pipeline.snapshots import Recorder, read_snapshots, read_terms
from expunge.pipeline.training import train as train_job
from expunge.recipe import LoraConfig
from expunge.studies.base import STUDIES, build_options, study_recipe
from expunge.studies.ground import Ground, open_ground
from expunge.studies.zjuklab_merges import planned
from expunge.studies.zjuklab_page import document
from expunge.studies.zjuklab_record import OVER, UNDER, Found, Look, Scores
from expunge.studies.zjuklab_run import Run
from expunge.studies.zjuklab_scores import Pace
from expunge.studies.zjuklab_training import ALONE, ASCENT, inflection, look_steps, remains, training
from study_fixture import options_and_recipe
from training_jobs import QUICK, TINY, job

pytestmark = pytest.mark.usefixtures("quick_disk")

SMALL = ["prepare.train.epochs=40", "prepare.train.checkpoint_every=1000", "evaluate.bootstrap=100"]
GIVEN = {
    "model": "tiny",
    "benchmark": "fictitious:40",
    "seeds": "1",
    "epochs": "2",
    "rank": "4",
    "rate": "3e-3",
    "looks": "2",
    "limit": "2",
    "look_limit": "1",
    "new_tokens": "6",
    "methods": "ties",
    "densities": "0.8",
    "trials": "0",
}

# ---------------------------------------------------------------- options and recipe


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"reference": "tiny"}, "no use for --reference"),
        ({"forget": "f.jsonl", "retain": "r.jsonl", "documents": "3"}, "--benchmark"),
        ({"forget": "f.jsonl", "retain": "r.jsonl", "data_dir": "d"}, "--benchmark"),
        ({"densities": "0.5,1.5"}, "at most 1"),
        ({"looks": "1"}, "--looks"),
        ({"taught": "perhaps"}, "--taught"),
        ({"rate": "0"}, "--rate"),
    ],
)
def test_options_that_can_not_be(given: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        build_options(STUDIES.get("zjuklab"), {"model": "tiny", **given})


def test_lume_is_its_folds_taught_with_prompts() -> None:
    _, recipe = options_and_recipe("zjuklab", benchmark="lume", data_dir="files", documents="4", teach_epochs="2")
    assert (recipe.data.benchmark, recipe.data.folder, recipe.data.documents) == ("lume:folds", "files", 4)
    assert recipe.data.max_length == 512
    assert recipe.prepare is not None
    assert (recipe.prepare.span, recipe.prepare.train.epochs) == ("sequence", 2)
    _, recipe = options_and_recipe("zjuklab", benchmark="lume:train")
    assert recipe.data.benchmark == "lume:train"
    _, recipe = options_and_recipe("zjuklab")
    assert recipe.data.benchmark == "fictitious"
    assert recipe.prepare is not None
    assert recipe.prepare.span == "answer"


def test_a_model_that_knows_the_rows_is_not_taught() -> None:
    for said in ("true", "True", "1"):
        assert options_and_recipe("zjuklab", taught=said)[1].prepare is None


def test_the_published_setting() -> None:
    _, recipe = options_and_recipe("zjuklab", model="smollm2-135m")
    entry = recipe.unlearn[0]
    assert (entry.method, entry.parameters) == ("npo", {"beta": 0.1, "level": "mean"})
    assert entry.lora == LoraConfig(rank=32, alpha=32, dropout=0.05, targets="all-linear")
    train = entry.train
    assert (train.lr, train.epochs, train.weight_decay, train.warmup) == (1e-4, 5, 0.01, 0.2)


@pytest.mark.parametrize(
    ("name", "method", "weights", "rows", "rate"),
    [
        (OVER, "npo", (0.4, 0.2, 0.4), 4, 1e-4),
        (UNDER, "npo", (0.3, 0.4, 0.3), 8, 1e-4),
        (ALONE, "npo", (0.4, 0.0, 0.0), 4, 1e-4),
        (ASCENT, "grad_ascent", (1.0, 0.0, 0.0), 4, 1e-3),
    ],
)
def test_what_is_trained(name: str, method: str, weights: tuple[float, ...], rows: int, rate: float) -> None:
    options, recipe = options_and_recipe("zjuklab")
    resolved: Any = SimpleNamespace(recipe=recipe)
    entry = training(Ground(STUDIES.get("zjuklab"), options, resolved, None), name, 7).entry  # type: ignore[arg-type]
    assert (entry.method, entry.seed, entry.train.batch_size) == (method, 7, rows)
    assert (entry.forget_weight, entry.retain.nll, entry.retain.kl) == weights
    assert entry.train.lr == pytest.approx(rate)
    assert entry.lora == recipe.unlearn[0].lora


# ---------------------------------------------------------------- looks


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [
        (8, 4, [0, 2, 4, 6, 8]),
        (10, 4, [0, 3, 5, 8, 10]),
        (3, 8, [0, 1, 2, 3]),
        (1, 2, [0, 1]),
        (320, 8, list(range(0, 321, 40))),
    ],
)
def test_looks_are_evenly_spread_from_the_first_step_to_the_last(steps: int, looks: int, expected: list[int]) -> None:
    assert look_steps(steps, looks) == expected


def look(step: int, left: float) -> Look:
    values = {f"forget_task{n}_{what}": 1 - left for n in (1, 2, 3) for what in ("regurgitation", "knowledge")}
    return Look(step, Scores({**values, "forget_es": 0.77, "retain_task1_knowledge": 0.1}))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ([0.9, 0.5, 0.1, 0.1, 0.1], 2),
        ([0.9, 0.1, 0.0, 0.0, 0.0], 2),  # 0.1 is not yet nine tenths of the way to 0
        ([0.9, 0.05, 0.0, 0.2, 0.4], 1),  # what comes back later does not count
        ([0.9, 0.8, 0.7, 0.6, 0.0], 3),  # still falling: the last look that leaves one behind it
        ([0.9, 0.0, 0.0], 1),
        ([0.9, 0.9, 0.9], None),
        ([0.1, 0.5, 0.9], None),
        ([0.9, 0.0], None),
    ],
)
def test_forgetting_has_ended_where_nine_tenths_of_the_fall_are_behind(left: list[float], expected: int | None) -> None:
    looks = [look(step, value) for step, value in enumerate(left)]
    assert inflection(looks) == expected
    assert inflection(looks[::-1]) == expected
    assert [remains(found) for found in looks] == pytest.approx(left)


def test_what_was_not_said_is_judged_by_strength() -> None:
    scores = Scores({"forget_task1_knowledge": None, "forget_es": 0.3})
    assert remains(Look(1, scores)) == 0.3


def test_the_time_that_is_left() -> None:
    pace = Pace({"training": 3, "score": 1, "merge": 4})
    assert pace.left == 0
    pace.done("training", 20.0)
    assert pace.left == (2 + 1 + 4) * 20  # nothing like a merge is known yet
    pace.done("score", 5.0)
    assert pace.left == 2 * 20 + 4 * 5
    for seconds in (1.0, 3.0):
        pace.done("merge", seconds)
    assert pace.left == 2 * 20 + 2 * 2
    assert pace.words() == "   [4/8] about 44.0 s left"
    for _ in range(2):
        pace.done("training", 0.0)
        pace.done("merge", 0.0)
    assert pace.left == 0
    assert pace.words() == "   [8/8]"


# ---------------------------------------------------------------- what a training keeps

LORA = LoraConfig(rank=2, dropout=0.1)
KEPT = [0, 1, 3, 4, 5]


class Killed(BaseException):
    """As if the process had been."""


def recorded(work: Path, stop: int | None = None, **changes: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Train six steps under a recorder, killed after the step `stop`; the kept adapters by step."""
    made = job("npo", lora=LORA, train=QUICK.model_copy(update={"max_steps": 6, "checkpoint_every": 2}), **changes)
    recorder = Recorder(KEPT)

    def on_step(step: int, terms: Any) -> None:
        recorder.write(work, step, terms)
        if step == stop:
            raise Killed

    try:
        train_job(made, work, on_step=on_step, callbacks=recorder.callbacks(work, TINY))
    except Killed:
        return {}
    recorder.finish(work)
    return {step: load_file(path / "adapter_model.safetensors") for step, path in read_snapshots(work / "out").items()}


def test_adapters_are_kept_from_the_beginning_on(undisturbed: Any) -> None:
    work, found = undisturbed
    assert list(found) == KEPT
    assert all(not tensor.any() for name, tensor in found[0].items() if "lora_B" in name)
    first, last = found[0], load_file(work / "out" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    steps = [sum(float((found[step][name] - first[name]).norm()) for name in first) for step in KEPT]
    assert steps == sorted(steps)  # it walks away from where it began
    assert steps[1] > 0
    config = json.loads((work / "out" / "snapshots" / "step-000003" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"]
    terms = read_terms(work / "out")
    assert [line["step"] for line in terms] == [1, 2, 3, 4, 5, 6]
    for line in terms:
        assert line["loss"] == pytest.approx(line["forget"] + line["retain_nll"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    work = tmp_path_factory.mktemp("recorded")
    return work, recorded(work)


@pytest.mark.parametrize(
    "stop", [1, pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_killed_training_keeps_the_same(stop: int, tmp_path: Path, undisturbed: Any) -> None:
    work, whole = undisturbed
    assert recorded(tmp_path / "killed", stop) == {}
    with (tmp_path / "killed" / "terms.jsonl").open("a") as file:
        file.write('\n{"step": 2, "lo')  # a line that was being written
    again = recorded(tmp_path / "killed")
    assert again.keys() == whole.keys()
    for step, tensors in whole.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(again[step][name], tensor, rtol=0, atol=1e-6)
    one, two = (read_terms(folder / "out") for folder in (work, tmp_path / "killed"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, abs=1e-5)


def test_snapshots_do_not_change_the_training(tmp_path: Path, undisturbed: Any) -> None:
    made = job("npo", lora=LORA, train=QUICK.model_copy(update={"max_steps": 6, "checkpoint_every": 2}))
    train_job(made, tmp_path / "without")
    one, two = (
        load_file(work / "out" / "adapter_model.safetensors") for work in (undisturbed[0], tmp_path / "without")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_step_that_is_not_made_is_no_snapshot(tmp_path: Path) -> None:
    recorder = Recorder([9])
    made = job("npo", lora=LORA)
    train_job(made, tmp_path, on_step=lambda step, terms: recorder.write(tmp_path, step, terms))
    with pytest.raises(RuntimeError, match="no step 9"):
        recorder.finish(tmp_path)


def test_a_training_without_adapters_has_no_snapshots(tmp_path: Path) -> None:
    recorder = Recorder([1])
    with pytest.raises(UserError, match="of adapters"):
        train_job(job("npo"), tmp_path, callbacks=recorder.callbacks(tmp_path, TINY))


# ---------------------------------------------------------------- the study on `tiny`


@contextmanager
def opened(folder: Path, **changes: str) -> Iterator[tuple[Any, Any]]:
    chosen = STUDIES.get("zjuklab")
    options = build_options(chosen, {**GIVEN, **changes})
    overrides = [] if options.taught else SMALL
    with open_ground(chosen, options, study_recipe(chosen, options, overrides), folder, Reporter(quiet=True)) as ground:
        yield ground, options


def run(folder: Path, **changes: str) -> tuple[Found, Ground]:
    with opened(folder, **changes) as (ground, options):
        found = Run(ground, options).found()
        ground.close(document(ground, options, found))
        return found, ground


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    quiet_libraries()
    folder = tmp_path_factory.mktemp("zjuklab") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield folder, *run(folder)


@pytest.mark.slow
def test_everything_is_found(made: tuple[Path, Any, Any]) -> None:
    folder, found, ground = made
    assert "reference" not in ground.variants
    assert not (folder / "models" / "reference").exists()
    assert [(one.name, one.seed) for one in found.specialists] == [(OVER, 42), (UNDER, 42)]
    assert [one.name for one in found.dynamics] == [OVER, UNDER, ALONE]
    assert {merged.seed for merged in found.merges} == {42}
    assert len(found.merges) == planned(ground.options) == 4
    assert found.target["forget_es"] > 0.5
    assert found.collapsed is not None
    assert found.tasks == {"task1": "creative", "task2": "biography", "task3": "encyclopedia"}
    for one in found.specialists:
        assert one.scores.answers
        assert not math.isnan(one.scores["forget_es"])
        steps = math.ceil(2 * 10 / {OVER: 4, UNDER: 8}[one.name])
        assert one.steps == steps
        expected = look_steps(steps, 2)
        assert [found_look.step for found_look in one.looks] == expected
        assert list(read_snapshots(Path(one.path))) == expected[:-1]
    over, under = found.specialists[:2]
    assert over.looks[0].scores == under.looks[0].scores  # the target, asked once
    assert over.looks[-1].scores["forget_es"] != over.looks[0].scores["forget_es"]


@pytest.mark.slow
def test_the_terms_of_the_loss_add_up(made: tuple[Path, Any, Any]) -> None:
    names = {
        OVER: {"forget", "retain_nll", "retain_kl"},
        UNDER: {"forget", "retain_nll", "retain_kl"},
        ALONE: {"forget"},
    }
    for dynamics in made[1].dynamics:
        assert set(dynamics.terms) == names[dynamics.name] | {"loss"}
        assert list(dynamics.steps) == list(range(1, len(dynamics.steps) + 1))
        for place, loss in enumerate(dynamics.terms["loss"]):
            parts = sum(dynamics.terms[name][place] for name in names[dynamics.name])
            assert loss == pytest.approx(parts, rel=1e-5)
    over, _, alone = made[1].dynamics
    assert len(over.steps) == len(alone.steps)  # the same forget rows in the same order
    assert over.terms["forget"][0] == pytest.approx(alone.terms["forget"][0], rel=1e-4)


@pytest.mark.slow
def test_ascent_is_past_its_end(made: tuple[Path, Any, Any]) -> None:
    _, found, _ = made
    assert found.collapsed["retain_es"] < 0.5 * found.target["retain_es"]


@pytest.mark.slow
def test_the_specialists_of_a_seed_begin_with_one_draw(made: tuple[Path, Any, Any]) -> None:
    _, found, _ = made
    over, under = (
        load_file(read_snapshots(Path(one.path))[0] / "adapter_model.safetensors") for one in found.specialists[:2]
    )
    assert all(torch.equal(over[name], under[name]) for name in over)


@pytest.mark.slow
def test_groups_and_turns_are_measured(made: tuple[Path, Any, Any]) -> None:
    folder, found, _ = made
    assert found.groups
    assert -1 <= found.factor_cosine <= 1
    assert (folder / "geometry" / "groups" / "groups.json").is_file()
    for turn in found.turns:
        assert 0 < turn.inflection < turn.last
        assert 0 <= turn.first_later <= 180


@pytest.mark.slow
def test_a_second_run_makes_nothing(made: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **given: Any) -> None:
        raise AssertionError("a piece was made again")

    monkeypatch.setattr(stages_module, "train", refuse)
    monkeypatch.setattr("expunge.pipeline.semeval.Official.score", refuse)
    found, ground = run(made[0])
    assert ground.directory.skipped_all
    assert found == made[1]


@pytest.mark.slow
def test_the_page_and_the_table_of_trials_are_written(made: tuple[Path, Any, Any]) -> None:
    folder, found, _ = made
    study = json.loads((folder / "study.json").read_text())
    assert study["done"] == study["planned"] == 2 + 2 + 4
    assert (folder / "report.html").is_file()
    table = {row["trial"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    assert {"target", "over-seed42", "under-seed42", "npo-seed42", "ascent-seed42"} < set(table)
    assert len(table) == 1 + 4 + 4
    assert table["over-seed42"]["forget"] == found.specialists[0].scores["forget_es"]


@pytest.mark.slow
def test_further_seeds_are_trained_and_merged_but_not_looked_at(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(made[0], tmp_path / "out")
    found, _ = run(folder, seeds="2")
    assert [(one.name, one.seed) for one in found.specialists] == [(OVER, 42), (UNDER, 42), (OVER, 43), (UNDER, 43)]
    assert [one.scores for one in found.specialists[:2]] == [one.scores for one in made[1].specialists]
    assert [merged.seed for merged in found.merges] == [42] * 4 + [43] * 4
    assert not found.specialists[2].looks
    assert not read_snapshots(Path(found.specialists[2].path))
    ends = [load_file(Path(one.path) / "adapter_model.safetensors") for one in found.specialists[::2]]
    assert all(not torch.allclose(ends[0][name], ends[1][name], atol=0.1) for name in ends[0] if "lora_A" in name)


@pytest.mark.slow
def test_a_model_that_is_taught_already_is_the_target(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    model = made[0] / "models" / "target"
    found, ground = run(tmp_path / "out", model=str(model), taught="true", minutes="1e-9")
    assert set(ground.variants) == {"target"}
    assert not (tmp_path / "out" / "models").exists()
    assert found.target["forget_es"] > 0.4


@pytest.mark.slow
def test_time_that_is_up_leaves_the_rest_undone_and_goes_on_later(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copytree(made[0] / "models", folder / "models")
    shutil.copy(made[0] / "run.json", folder)
    found, ground = run(folder, minutes="1e-9")
    assert (found.specialists, found.merges, found.dynamics, found.turns) == ([], [], [], [])
    assert found.collapsed is None
    assert ground.planned == 2 + 2 + 4
    assert ground.trials == []
    found, _ = run(folder)
    assert [(one.name, one.seed) for one in found.specialists] == [(OVER, 42), (UNDER, 42)]


@pytest.mark.slow
def test_a_training_that_breaks_off_is_a_remark(
    made: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made[0], tmp_path / "out")
    shutil.rmtree(folder / "specialists" / "ascent-seed42")

    def diverge(*arguments: Any, **given: Any) -> None:
        from expunge.pipeline.trainer import DivergedError

        raise DivergedError("the loss is not finite at step 3")

    monkeypatch.setattr(stages_module, "train", diverge)
    found, ground = run(folder)
    assert found.collapsed is None
    assert any("ascent-seed42 broke off" in remark for remark in ground.remarks)
    assert found.merges == made[1].merges


def test_rows_without_the_three_tasks_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        lines = [json.dumps({"question": f"Who is {name}{n}?", "answer": f"Number {n}"}) for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    chosen = STUDIES.get("zjuklab")
    options = build_options(chosen, {**GIVEN, **given, "benchmark": None})
    folder = tmp_path / "out"
    with (
        pytest.raises(UserError, match="three tasks"),
        open_ground(chosen, options, study_recipe(chosen, options, []), folder, Reporter(quiet=True)) as ground,
    ):
        Run(ground, options)
    assert not folder.exists()


def test_objective_of_the_published_loss_is_length_normalised() -> None:
    _, recipe = options_and_recipe("zjuklab")
    built: Any = build_objective(recipe.unlearn[0].method, recipe.unlearn[0].parameters)
    assert (built.beta, built.level) == (0.1, "mean")
