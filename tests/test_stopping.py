"""Stop rules: when they fire, which model is kept, that a killed run decides the same, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from expunge.cli.app import app
from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.pipeline.job import Watched
from expunge.pipeline.training import train
from expunge.recipe import ModelConfig, StopRule
from training_jobs import FORGET, QUICK, RETAIN, job, taught

TRAIN = QUICK.model_copy(update={"max_steps": 24, "lr": 2e-3, "epochs": 20})
WATCHED = {
    "forget": Watched("forget", FORGET),
    "retain": Watched("retain", RETAIN),
    "holdout": Watched("holdout", RETAIN[:4]),
}


class Followed:
    """One run with its looks and losses."""

    def __init__(self, work: Path, *rules: dict[str, Any], kill_at: int | None = None, **changes: Any) -> None:
        self.looks: dict[int, dict[str, float]] = {}
        self.steps = 0

        def on_step(step: int, terms: Mapping[str, float]) -> None:
            self.steps = step
            if step == kill_at:
                raise KeyboardInterrupt

        def on_look(step: int, values: Mapping[str, float]) -> None:
            self.looks[step] = dict(values)

        made = job("grad_ascent", model=taught(), train=TRAIN, watched=WATCHED)
        made = replace(made, stop_when=[StopRule(**rule) for rule in rules], **changes)
        self.made = train(made, work, on_step=on_step, on_look=on_look)
        self.weights = dict(load_model(ModelConfig(id=str(work / "out"))).model.state_dict())

    def values(self) -> dict[int, float]:
        """Value of the first rule by step."""
        return {step: next(iter(values.values())) for step, values in self.looks.items()}


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-5) for name in left)


def test_a_goal_keeps_the_look_nearer_to_its_threshold(tmp_path: Path) -> None:
    free = Followed(tmp_path / "free", {"metric": "nll", "above": 1e9, "every": 3})
    values = free.values()
    assert free.made["note"] == "no stop rule fired"
    assert list(values) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    before, after = values[6], values[9]
    assert before < after
    for part, kept in ((0.2, 6), (0.8, 9)):
        threshold = before + part * (after - before)
        run = Followed(tmp_path / f"{part}", {"metric": "nll", "above": threshold, "every": 3})
        assert run.steps == 9
        assert run.made["note"].startswith("stopped at step 9: nll of forget above")
        assert ("step 6 is kept" in run.made["note"]) == (kept == 6)
        short = Followed(tmp_path / f"{part}-short", train=TRAIN.model_copy(update={"max_steps": kept}))
        assert same(run.weights, short.weights), f"the model of step {kept}"


def test_a_guard_keeps_the_model_before_it_fired(tmp_path: Path) -> None:
    free = Followed(tmp_path / "free", {"metric": "probability", "split": "retain", "below": 0.0, "every": 2})
    values = list(free.values().items())
    fired = next(i for i, (_, value) in enumerate(values) if value < 0.9 * values[0][1])
    threshold = (values[fired][1] + values[fired - 1][1]) / 2
    rule = {"metric": "probability", "split": "retain", "below": threshold, "every": 2}
    run = Followed(tmp_path / "guarded", rule)
    kept = values[fired - 1][0]
    assert f"the model of step {kept} is kept" in run.made["note"]
    short = Followed(tmp_path / "short", train=TRAIN.model_copy(update={"max_steps": kept}))
    assert same(run.weights, short.weights)


def test_a_threshold_may_be_another_split(tmp_path: Path) -> None:
    run = Followed(tmp_path, {"metric": "perplexity", "split": "forget", "above": "holdout", "every": 2})
    assert "perplexity of forget above holdout" in run.made["note"]
    assert run.steps < TRAIN.max_steps  # type: ignore[operator]


def test_a_killed_run_stops_where_the_uninterrupted_one_did(tmp_path: Path) -> None:
    rule = {"metric": "nll", "above": Followed(tmp_path / "free", train=TRAIN).steps + 30.0, "every": 3}
    whole = Followed(tmp_path / "whole", rule)
    assert "stopped" in whole.made["note"]
    with pytest.raises(KeyboardInterrupt):
        Followed(tmp_path / "killed", rule, kill_at=whole.steps - 1)
    again = Followed(tmp_path / "killed", rule)
    assert again.made["note"] == whole.made["note"]
    assert same(again.weights, whole.weights)


@pytest.mark.parametrize(
    "rule", [{"metric": "nll", "above": 0.001}, {"metric": "probability", "split": "retain", "below": 1.0}]
)
def test_a_rule_that_holds_already_leaves_the_start_model(rule: dict[str, Any], tmp_path: Path) -> None:
    run = Followed(tmp_path, rule)
    assert run.steps == 0
    assert run.made["note"].startswith("not trained: ")
    assert same(run.weights, load_model(taught()).model.state_dict())


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"metric": "rouge_l_recall", "below": 0.5}, "which needs more than a scoring pass"),
        ({"metric": "nlll", "above": 1}, "did you mean 'nll'"),
        ({"metric": "nll", "split": "holdouts", "above": 1}, "there is none"),
        ({"metric": "nll", "above": "nowhere"}, "there is none"),
        ({"metric": "nll"}, "give either `above` or `below`"),
        ({"metric": "nll", "above": 1, "below": 2}, "give either `above` or `below`"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule: dict[str, Any], says: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    entry = {"method": "npo", "stop_when": rule}
    recipe.write_text(yaml.safe_dump({"model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [entry]}))
    result = CliRunner().invoke(app, ["run", str(recipe), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert says in f"{result.exception.message} {result.exception.hint}"
    assert not (tmp_path / "out").exists()


def test_the_run_record_says_where_a_rule_stopped(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    entry = {
        "method": "grad_ascent",
        "train": {"max_steps": 12, "lr": 1e-3, "batch_size": 4, "precision": "float32"},
        "stop_when": {"metric": "perplexity", "above": 600, "every": 4, "limit": 2},
    }
    data = {"benchmark": "fictitious"}
    quick = {"metrics": ["nll"], "generate": None}
    whole = {"model": "tiny", "data": data, "unlearn": [entry], "evaluate": quick}
    recipe.write_text(yaml.safe_dump(whole))
    result = CliRunner().invoke(app, ["run", str(recipe), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert any("stopped at step 4: perplexity of forget above 600" in note for note in record["notes"])
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "look"] == [0, 4]
