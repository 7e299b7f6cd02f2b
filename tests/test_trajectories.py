"""Thirty steps of every objective on `tiny` against what they were when they were last looked at.

A changed number is a changed objective: if that is wanted, renew the file with `python tests/test_trajectories.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from expunge.methods.base import OBJECTIVES, WeightObjective
from expunge.pipeline.training import train
from training_jobs import QUICK, job

FILE = Path(__file__).parent / "trajectories.json"
STEPS = (1, 2, 5, 10, 20, 30)
LONG = QUICK.model_copy(update={"max_steps": 30, "epochs": 50, "checkpoint_every": 1000, "lr": 1e-3})


def trajectory(name: str, work: Path) -> dict[str, dict[str, float]]:
    """Terms of the loss at some steps; an objective of several trainings counts them through."""
    curve: dict[int, dict[str, float]] = {}
    retain = {} if issubclass(OBJECTIVES.get(name), WeightObjective) else {"nll": 0.5, "kl": 0.5}
    made = job(name, train=LONG, weights={"forget": 1.0, **retain})
    train(made, work, on_step=lambda step, terms: curve.update({step: dict(terms)}))
    return {str(step): {term: round(value, 6) for term, value in curve[step].items()} for step in STEPS}


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_trajectory_is_the_pinned_one(name: str, tmp_path: Path) -> None:
    pinned: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    found = trajectory(name, tmp_path)
    for step, terms in pinned[name].items():
        # rounding differs between machines, and Adam makes much of it where a gradient is next to nothing
        assert found[step] == pytest.approx(terms, rel=2e-2, abs=2e-3), f"step {step}"


if __name__ == "__main__":
    made = {}
    for objective in OBJECTIVES.names():
        with tempfile.TemporaryDirectory() as folder:
            made[objective] = trajectory(objective, Path(folder))
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
