"""Training runs on `tiny` for tests: a job for any objective, with random rows for whatever it needs."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.methods.base import OBJECTIVES, build_objective
from expunge.models.load import load_model
from expunge.pipeline.job import Job
from expunge.pipeline.training import train
from expunge.recipe import ModelConfig, TrainConfig
from training_rows import rows

TINY = ModelConfig(id="tiny")
FORGET, RETAIN = rows(8, seed=1), rows(16, seed=2)
QUICK = TrainConfig(max_steps=4, lr=1e-3, batch_size=4, precision="float32", checkpoint_every=2)
Curve = list[dict[str, float]]


def parameters(name: str) -> dict[str, Any]:
    """Hyper-parameters that fit `tiny`, which has two layers and gives every token less than the usual floor."""
    if name == "erase":
        return {"ceiling": -12.0, "bottom": -12.0}
    return {"layer": 1} if "layer" in OBJECTIVES.get(name).__dataclass_fields__ else {}


def job(name: str | None = "npo", **changes: Any) -> Job:
    """A job of four steps; `name` None is plain fine-tuning."""
    objective = None if name is None else build_objective(name, parameters(name))
    if objective is None:
        return replace(Job(TINY, RETAIN, QUICK, 7), **changes)
    about = objective.about
    needed: dict[str, Any] = {"weights": {"forget": 1.0, "nll": about.nll, "kl": about.kl}}
    if about.alternatives is not None:
        needed["forget_alternatives"] = [rows(2, seed=100 + i) for i in range(len(FORGET))]
    if about.retain_alternatives:
        needed["retain_alternatives"] = [rows(2, seed=200 + i) for i in range(len(RETAIN))]
    if about.anchors:
        needed["anchors"] = rows(5, seed=300)
    forget = [row.whole() for row in FORGET] if about.span == "sequence" else FORGET
    return replace(Job(TINY, RETAIN, QUICK, 7, forget=forget, objective=objective), **{**needed, **changes})


def run(made: Job, work: Path) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Loss terms of each step, and the trained parameters."""
    curve: Curve = []
    train(made, work, on_step=lambda step, terms: curve.append(dict(terms)))
    model: Any = load_model(ModelConfig(id=str(work / "out"))).model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return curve, dict(model.state_dict())


def run_until_killed(made: Job, work: Path, at: int) -> None:
    """Begin a training, and break it off after step `at`."""

    class Killed(Exception):
        pass

    def kill(step: int, terms: Any) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        train(made, work, on_step=kill)


@cache
def taught() -> ModelConfig:
    """`tiny` after it has learnt the forget and retain rows."""
    settings = TrainConfig(
        epochs=1000, max_steps=150, lr=4e-3, batch_size=24, precision="float32", checkpoint_every=1000
    )
    folder = Path(tempfile.mkdtemp(prefix="taught-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(Job(TINY, [*FORGET, *RETAIN], settings, 1), folder)
    return ModelConfig(id=str(folder / "out"))
