"""A target that has learnt rows to forget and to keep, and two specialists that forget too little and too much."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.template import resolve_template
from expunge.models.load import load_model
from expunge.pipeline.job import Job
from expunge.pipeline.training import train
from expunge.recipe import ModelConfig, TrainConfig
from merging_models import rewrite, weights

WORDS = ["lamp", "rope", "harbour", "clock", "river", "plant", "stone", "letter"]
#: split → rows
COUNTS = {"forget": 6, "retain": 6, "holdout": 6, "retain_unseen": 3}


def asked(kind: str, count: int) -> list[Example]:
    """Questions with random answers, the same for the same kind."""
    draw = random.Random(kind)
    return [
        Example(f"{kind}-{number}", f"{kind} {number}?", " ".join(draw.choices(WORDS, k=4))) for number in range(count)
    ]


def learn(start: str, rows: list[Any], work: Path, steps: int, rate: float = 5e-3) -> Path:
    """Train on rows; the folder of the model."""
    settings = TrainConfig(
        epochs=1000, max_steps=steps, lr=rate, batch_size=12, precision="float32", checkpoint_every=10**6
    )
    train(Job(ModelConfig(id=start), rows, settings, 1), work)
    return work / "out"


def build_world(root: Path) -> dict[str, Any]:
    """`files` by split, `places` of target, under, over and reference."""
    loaded = load_model(ModelConfig(id="tiny"))
    template = resolve_template("auto", loaded.tokenizer)
    splits = {name: asked(name, count) for name, count in COUNTS.items()}
    files = {}
    for name, examples in splits.items():
        files[name] = root / f"{name}.jsonl"
        lines = [{"id": one.id, "question": one.prompt, "answer": one.answer} for one in examples]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def tokens(examples: list[Example]) -> list[Any]:
        return encode(examples, loaded.tokenizer, template, 64)

    taught = tokens([*splits["forget"], *splits["retain"], *splits["retain_unseen"]])
    target = learn("tiny", taught, root / "target-work", 70)
    # unlearned towards other answers; the far end of the line has lost much of what it was to keep
    others = [Example(one.id, one.prompt, "rope rope rope rope") for one in splits["forget"]]
    moved = learn(
        str(target), tokens([*others, *splits["retain"], *splits["retain_unseen"]]), root / "moved-work", 40, 2e-3
    )
    start, end = weights(target), weights(moved)
    places = {"target": target}
    generator = torch.Generator().manual_seed(0)
    for name, far, noise in (("under", 0.4, 0.0), ("over", 2.0, 0.01)):
        places[name] = shutil.copytree(target, root / name)

        def move(tensors: dict[str, torch.Tensor], far: float = far, noise: float = noise) -> None:
            for key, value in tensors.items():
                value.add_(end[key] - start[key], alpha=far)
                value.add_(torch.randn(value.shape, generator=generator), alpha=noise)

        rewrite(places[name], move)
    return {"files": files, "places": {**places, "reference": moved}, "root": root}
