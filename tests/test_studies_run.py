"""Studies on `tiny` from teaching to page: whole, interrupted, repeated; and trials against oracles."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import expunge.pipeline.trials as trials
from expunge import api
from expunge.errors import UserError
from expunge.methods.base import OBJECTIVES, build_objective
from expunge.models.tiny import build_tiny
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.job import Job
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.pipeline.resolve import resolve
from expunge.pipeline.stages import Stages
from expunge.pipeline.training import train
from expunge.recipe import LoraConfig, ModelConfig, TrainConfig, load_recipe
from expunge.runs.store import RunDirectory
from expunge.scoring.hidden import norm_profile
from expunge.scoring.scores import score
from training_rows import rows

pytestmark = pytest.mark.usefixtures("quick_disk")

#: Ten rows per split, taught until they are known.
SMALL = [
    "prepare.train.epochs=40",
    "prepare.train.checkpoint_every=1000",
    "evaluate.bootstrap=100",
    "unlearn.trial.train.precision=float32",
]
RMU = ["unlearn.trial.train.epochs=3", "unlearn.trial.parameters.alpha=10"]


def run_rmu(folder: Path, **options: Any) -> Any:
    given = {"benchmark": "fictitious:40", "layers": "0,1", "coefficients": "6.5", "betas": "5", **options}
    return api.study("rmu_layers", model="tiny", output=folder, overrides=[*SMALL, *RMU], quiet=True, **given)


def run_objectives(folder: Path, **options: Any) -> Any:
    given = {"methods": "grad_diff,rmu", "rates": "1e-3,1e-2", "seeds": "2", "epochs": "2", **options}
    return api.study(
        "objectives", model="tiny", benchmark="fictitious:40", output=folder, overrides=SMALL, quiet=True, **given
    )


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("layers") / "out"
    return folder, run_rmu(folder)


def taught(layers: tuple[Path, Any], folder: Path) -> Path:
    """A run directory that holds what was taught, and nothing else."""
    shutil.copytree(layers[0] / "models", folder / "models")
    shutil.copy(layers[0] / "run.json", folder)
    return folder


@pytest.fixture(scope="module")
def compared(layers: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = taught(layers, tmp_path_factory.mktemp("objectives") / "out")
    return folder, run_objectives(folder)


def mean_strength(folder: Path, trial: str, split: str) -> float:
    """Extraction strength from a trial's table, by its definition."""
    found = []
    for row in pq.read_table(folder / "trials" / trial / f"{split}.parquet").to_pylist():
        hits, length = row["hit"][: row["answer_tokens"]], row["answer_tokens"]
        suffix = next((k for k, hit in enumerate(reversed(hits)) if not hit), length)
        found.append(suffix / length)
    return sum(found) / len(found)


def test_the_layer_study_is_whole(layers: tuple[Path, Any]) -> None:
    folder, result = layers
    assert not result.skipped_all
    table = {row["trial"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    cells = {
        f"{method}-layer{layer}-{sign}"
        for method, sign in (("rmu", "c6.5"), ("adaptive_rmu", "b5"))
        for layer in (0, 1)
    }
    assert set(table) == cells | {"original", "target", "reference"}
    for name, row in table.items():
        for split in ("forget", "retain", "retain_unseen"):
            assert row[split] == pytest.approx(mean_strength(folder, name, split))
        assert row["steps"] == (0 if name in ("original", "target", "reference") else math.ceil(3 * 10 / 8))
    assert table["target"]["forget"] > 0.5 > table["original"]["forget"]
    norms = result.document.results["norms"]
    assert [len(norms[split]) for split in ("forget", "retain")] == [2, 2]
    assert not list(folder.rglob("trials/**/*.safetensors"))
    document = json.loads((folder / "study.json").read_text())
    assert document["answer"] == result.document.answer
    assert document["answer"].startswith("On tiny")
    assert document["answer"] in (folder / "report.html").read_text().replace("&#39;", "'")
    assert not (folder / ".work").exists()


def test_the_chosen_cell_follows_the_printed_rule(layers: tuple[Path, Any]) -> None:
    folder, result = layers
    table = {row["trial"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    target = table["target"]["retain_unseen"]
    eligible = [row for row in table.values() if row["layer"] is not None and row["retain_unseen"] >= 0.95 * target]
    assert result.document.results["meets_rule"] == bool(eligible)
    if eligible:
        chosen = result.document.results["chosen"]
        row = next(r for r in eligible if (r["method"], r["layer"]) == (chosen["method"], chosen["layer"]))
        assert row["forget"] == min(r["forget"] for r in eligible)


def test_a_second_run_trains_nothing(layers: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = layers

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a trial was made again")

    monkeypatch.setattr(trials, "fit", refuse)
    monkeypatch.setattr(trials, "write_scores", refuse)
    again = run_rmu(folder)
    assert again.skipped_all
    assert again.document.answer == result.document.answer
    fewer = run_rmu(shutil.copytree(folder, tmp_path / "out"), layers="1")  # other options, the same trials
    assert fewer.skipped_all
    assert fewer.document.planned == 2


def test_an_interrupted_study_goes_on_where_it_was(
    layers: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    fit = trials.fit

    def interrupted(job: Job, *args: Any, **kwargs: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(repr(job.objective))
        return fit(job, *args, **kwargs)

    monkeypatch.setattr(trials, "fit", interrupted)
    folder = taught(layers, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_rmu(folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not (folder / "study.json").exists()

    def counted(job: Job, *args: Any, **kwargs: Any) -> Any:
        made.append(repr(job.objective))
        return fit(job, *args, **kwargs)

    monkeypatch.setattr(trials, "fit", counted)
    result = run_rmu(folder)
    assert len(made) == len(set(made)) == 4
    # what was measured before and after the interruption is what one go measures
    columns = ["trial", "forget", "retain", "retain_unseen", "steps"]
    one, two = (pq.read_table(f / "trials.parquet", columns=columns) for f in (layers[0], folder))
    assert one.equals(two)
    assert result.document.answer == layers[1].document.answer


def test_time_that_is_up_leaves_a_page_and_an_offer_to_go_on(tmp_path: Path, layers: tuple[Path, Any]) -> None:
    result = run_rmu(taught(layers, tmp_path / "out"), minutes="1e-9")
    assert (result.document.done, result.document.planned) == (0, 4)
    assert "no trial was finished" in result.document.answer
    assert "4 of 4 trials are still to be done" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_is_no_study_is_left_alone(layers: tuple[Path, Any], tmp_path: Path) -> None:
    folder = taught(layers, tmp_path / "out")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "name": "my-run"}))
    with pytest.raises(UserError, match="holds the run 'my-run', which is no study"):
        run_rmu(folder)
    assert json.loads((folder / "run.json").read_text())["name"] == "my-run"


def test_the_comparison_is_whole(compared: tuple[Path, Any]) -> None:
    folder, result = compared
    document = result.document
    table = {row["trial"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    assert len(table) == 3 + 2 * 2 + 2
    assert (document.done, document.planned) == (6, 6)
    target = table["target"]
    for method, chosen in document.results["chosen"].items():
        grid = {row["rate"]: row for row in table.values() if row["method"] == method and row["seed"] == 42}
        assert set(grid) == {1e-3, 1e-2}
        eligible = [rate for rate, row in grid.items() if row["validation"] >= 0.95 * target["validation"]]
        assert chosen["meets_rule"] == bool(eligible)
        if eligible:
            assert grid[chosen["rate"]]["forget"] == min(grid[rate]["forget"] for rate in eligible)
        seeds = {row["seed"] for row in table.values() if row["method"] == method and row["rate"] == chosen["rate"]}
        assert seeds == {42, 43}
    assert set(document.results["chosen"]) == {"grad_diff", "rmu"}
    html = (folder / "report.html").read_text()
    assert all(method in html for method in document.results["chosen"])


def test_validation_rows_are_neither_trained_on_nor_reported(compared: tuple[Path, Any]) -> None:
    folder, _ = compared
    ids = {
        split: set(pq.read_table(folder / "trials" / "target" / f"{split}.parquet")["example_id"].to_pylist())
        for split in ("retain", "validation", "retain_unseen")
    }
    assert ids["validation"]
    assert not ids["validation"] & (ids["retain"] | ids["retain_unseen"])
    run = json.loads((folder / "run.json").read_text())
    assert len(ids["retain"] | ids["validation"]) == run["data"]["retain"]["rows"]
    assert any("validation" in note for note in run["notes"])


def test_methods_that_can_not_run_are_left_out_with_a_reason(
    layers: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="adapters"):  # a named one is a mistake
        run_objectives(taught(layers, tmp_path / "out"), methods="task_negation", lora="2")
    monkeypatch.setattr(OBJECTIVES, "names", lambda: ["grad_ascent", "task_negation"])
    result = run_objectives(tmp_path / "out", methods=None, lora="2", rates="1e-3", seeds="1", epochs="1")
    assert set(result.document.results["left_out"]) == {"task_negation"}
    assert set(result.document.results["chosen"]) == {"grad_ascent"}
    assert "adapters" in result.document.settings["Left out"]


# ---------------------------------------------------------------- trials against oracles


@pytest.fixture
def stages(tmp_path: Path) -> Any:
    recipe = load_recipe(
        {"model": "tiny", "data": {"benchmark": "fictitious:40", "template": "raw"}, "unlearn": [{"lora": 2}]},
        overrides=["evaluate.generate=null"],
    )
    quiet_libraries()
    with RunDirectory(tmp_path / "run", recipe) as directory:
        yield Stages(resolve(recipe), directory, tmp_path / "run", Reporter(quiet=True))


FORGET, RETAIN = rows(6, 1), rows(8, 2)
QUICK = TrainConfig(max_steps=3, lr=1e-3, batch_size=3, precision="float32")


def unlearning(**changes: Any) -> Job:
    job = Job(ModelConfig(id="tiny"), RETAIN, QUICK, 0, FORGET, build_objective("npo", {}), {"forget": 1.0, "nll": 1.0})
    return dataclasses.replace(job, **changes)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_trial_measures_the_model_that_training_writes(
    lora: LoraConfig | None, stages: Stages, tmp_path: Path
) -> None:
    job = unlearning(lora=lora)
    start = stages.given("target", job.model)
    result = trials.run_trial(stages, "one", start, {"forget": FORGET, "retain": RETAIN}, job)
    assert (result.steps, result.skipped, result.failed) == (3, False, "")
    train(job, tmp_path / "work")
    model = LazyModel(ModelConfig(id=str(tmp_path / "work" / "out")), "float32").loaded.model
    for split, chosen in (("forget", FORGET), ("retain", RETAIN)):
        expected = score(model, chosen, batch_size=4)
        found = result.table(split)
        assert found["token_ids"].equals(expected["token_ids"])
        ours, theirs = (np.concatenate(table["logprob"].to_pylist()) for table in (found, expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert {path.suffix for path in result.path.iterdir()} == {".parquet", ".json"}
    assert trials.run_trial(stages, "one", start, {"forget": FORGET, "retain": RETAIN}, job).skipped


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"train": QUICK.model_copy(update={"lr": 2e-3})},
        {"objective": build_objective("npo", {"beta": 0.2})},
    ],
)
def test_another_job_is_another_trial(changes: dict[str, Any], stages: Stages) -> None:
    start = stages.given("target", ModelConfig(id="tiny"))
    trials.run_trial(stages, "one", start, {"forget": FORGET}, unlearning())
    assert not trials.run_trial(stages, "one", start, {"forget": FORGET}, unlearning(**changes)).skipped


def test_a_training_that_breaks_off_is_a_result(stages: Stages) -> None:
    start = stages.given("target", ModelConfig(id="tiny"))
    job = unlearning(
        objective=build_objective("grad_ascent", {}),
        weights={"forget": 1.0},
        train=QUICK.model_copy(update={"lr": 1e30, "max_steps": 30}),
    )
    result = trials.run_trial(stages, "one", start, {"forget": FORGET}, job)
    assert "is not finite at step" in result.failed
    assert not list(result.path.glob("*.parquet"))
    assert trials.run_trial(stages, "one", start, {"forget": FORGET}, job).skipped


def test_a_mistake_is_an_error_all_the_same(stages: Stages) -> None:
    job = unlearning(objective=build_objective("rmu", {"layer": 7}))
    with pytest.raises(UserError, match="layer 7 does not exist"):
        trials.run_trial(stages, "one", stages.given("target", job.model), {"forget": FORGET}, job)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_norms_are_those_of_the_hidden_states(batch_size: int) -> None:
    model, _ = build_tiny()
    chosen = rows(7, 3)
    seen: list[int] = []
    found = norm_profile(model, chosen, batch_size=batch_size, progress=seen.append)
    assert sum(seen) == 7
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    sums, tokens = torch.zeros(2), 0
    for row in chosen:
        states.clear()
        with torch.no_grad():
            model(torch.from_numpy(row.input_ids).long()[None])
        for layer, state in enumerate(states):
            sums[layer] += state[0, row.prompt_tokens - 1 : -1].norm(dim=-1).sum()
        tokens += row.supervised_tokens
    assert found == pytest.approx((sums / tokens).tolist(), rel=1e-5)
