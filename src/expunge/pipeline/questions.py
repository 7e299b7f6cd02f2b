"""What commands ask, as recipes: models, rows and settings given by hand, and what a command has no use for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from expunge.errors import UserError
from expunge.recipe import ModelConfig, Recipe, load_recipe, parse_overrides

#: command → who it is, the fields of a recipe that it would silently ignore, and those that it reads
_USES = {
    "eval": (
        "an evaluation has",
        ("name", "prepare", "localize", "unlearn", "merge", "thresholds", "attacks"),
        "it reads data.*, evaluate.*, model.*, reference.*, seed",
    ),
    "attack": (
        "attacks have",
        ("name", "prepare", "localize", "unlearn", "merge"),
        "they read attacks.*, data.*, evaluate.*, model.*, reference.*, thresholds.*, seed",
    ),
    "localize": (
        "a localization has",
        ("name", "prepare", "unlearn", "merge", "evaluate", "thresholds", "reference", "attacks"),
        "it reads data.*, localize.*, model.*, seed",
    ),
}


def question(
    name: str, model: str, overrides: Sequence[str], reference: str | None, suite: str | None = None, **rows: Any
) -> Recipe:
    """A recipe that only asks of models that exist; settings of attacks among the overrides are not its own."""
    tree: dict[str, Any] = {"name": name, "model": model, "data": rows, "unlearn": [{}], "reference": reference}
    if suite is not None:
        tree["evaluate"] = {"suite": suite}
    own = {key: value for key, value in parse_overrides(overrides).items() if not key.startswith("attacks.")}
    return load_recipe(tree, overrides=own)


def beside(recipe: Recipe, target: str | None) -> dict[str, ModelConfig]:
    """The model and the yardsticks that are given, all opened with the same permissions."""
    flags = {"trust_remote_code": recipe.model.trust_remote_code, "allow_pickle": recipe.model.allow_pickle}
    given = {"target": None if target is None else ModelConfig(id=target), "model": recipe.model}
    beside = {**given, "reference": recipe.reference}
    return {name: config.model_copy(update=flags) for name, config in beside.items() if config is not None}


def check_overrides(command: Literal["eval", "attack", "localize"], overrides: Sequence[str]) -> None:
    """Raises UserError for a field that the command would silently ignore."""
    who, ignored, read = _USES[command]
    for key in parse_overrides(overrides):
        if key.partition(".")[0] in ignored:
            raise UserError(f"--set {key}: {who} no use for it", read)


def attack_settings(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`attacks.NAME.KEY` → value, by attack. Raises UserError for another shape."""
    settings: dict[str, dict[str, Any]] = {}
    for key, value in parse_overrides(overrides).items():
        head, *rest = key.split(".")
        if head != "attacks":
            continue
        if len(rest) != 2:
            raise UserError(f"--set {key} is not of the form attacks.NAME.KEY", "e.g. attacks.relearn.steps=80")
        settings.setdefault(rest[0], {})[rest[1]] = value
    return settings


def checkpoints(config: ModelConfig, *groups: Sequence[str]) -> list[dict[str, ModelConfig]]:
    """Models by name: `NAME=MODEL`, or `MODEL` by the last part of its path. Raises UserError if two share one."""
    made: list[dict[str, ModelConfig]] = []
    for models in groups:
        made.append({})
        for given in models:
            name, equals, model = given.partition("=")
            if not equals:
                path = Path(given).absolute()
                # every run calls its result `model`: the folder around it tells them apart
                name, model = path.parent.name if path.name in ("model", "target", "reference") else path.name, given
            if not name or any(name in group for group in made):
                raise UserError(f"two checkpoints are called '{name}'", "name them apart: NAME=FOLDER")
            made[-1][name] = config.model_copy(update={"id": model})
    return made
