"""Grounds without a model: outcomes that are made up, so that what is said of them can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expunge.recipe import Recipe
from expunge.report.document import STUDY, Document
from expunge.runs.atomic import write_json
from expunge.runs.store import RunDirectory
from expunge.studies.base import STUDIES, build_options, study_recipe
from expunge.studies.ground import Outcome, Strength


def outcome(name: str, about: Mapping[str, Any], failed: str = "", **strengths: float) -> Outcome:
    """A trial of these strengths, with intervals around them."""
    found = {split: Strength(v, max(0.0, v - 0.04), min(1.0, v + 0.04)) for split, v in strengths.items()}
    return Outcome(name, about, {} if failed else found, 12.5, 40, "", failed)


def yardsticks(**more: float) -> list[Outcome]:
    """Original, target and reference."""
    known = dict.fromkeys(more, 0.8)
    return [
        outcome("original", {"method": "original"}, forget=0.03, retain=0.04, retain_unseen=0.02, **more),
        outcome("target", {"method": "target"}, forget=0.9, retain=0.9, retain_unseen=0.8, **known),
        outcome("reference", {"method": "reference"}, forget=0.07, retain=0.9, retain_unseen=0.8, **known),
    ]


def fake_ground(recipe: Recipe, trials: list[Outcome], planned: int | None = None, **more: float) -> Any:
    """What the documents read of a ground."""
    standing = yardsticks(**more)
    splits = ["forget", "retain", *more, "retain_unseen"]
    return SimpleNamespace(
        whole=SimpleNamespace(recipe=recipe),
        rows=dict.fromkeys(splits),
        variants={found.name: None for found in standing},
        outcomes={found.name: found for found in [*standing, *trials]},
        trials=trials,
        remarks=[],
        planned=len(trials) if planned is None else planned,
    )


def options_and_recipe(name: str, **given: Any) -> tuple[Any, Recipe]:
    """Options of a study on `tiny`, and its recipe."""
    chosen = STUDIES.get(name)
    options = build_options(chosen, {"model": "tiny", **given})
    return options, study_recipe(chosen, options, [])


def layer_trials(layers: list[int], strengths: Mapping[str, tuple[float, ...]], model: Any = None) -> list[Outcome]:
    """Trials of a smooth made-up landscape: early layers harm, late ones do nothing."""
    found = []
    for layer in layers:
        for method, values in strengths.items():
            for value in values:
                height = layer / max(layers)
                forget = 0.9 / (1 + math.exp(-9 * (height - 0.62))) if method == "adaptive_rmu" else 0.2 + 0.7 * height
                unseen = 0.8 * (1 - 0.55 * math.exp(-7 * height))
                about = {"method": method, "layer": layer, "strength": value}
                name = f"{method}-layer{layer}-{value:g}"
                found.append(outcome(name, about, forget=forget, retain=min(1, unseen + 0.1), retain_unseen=unseen))
    return found


def write_study(folder: Path, recipe: Recipe, document: Document) -> Path:
    """A run directory that holds a finished study."""
    with RunDirectory(folder, recipe) as directory:
        directory.record(data={"forget": {"rows": 30, "role": "forget", "digest": "ab" * 32, "truncated": 0}})
        write_json(folder / STUDY, document.to_json())
        write_json(folder / "metrics.json", [])
    return folder
