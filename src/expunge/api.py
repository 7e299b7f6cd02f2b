"""The Python API: what the commands do, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.recipe import ModelConfig, Recipe, load_recipe, parse_overrides

if TYPE_CHECKING:
    from expunge.pipeline.run import RunResult
    from expunge.studies.base import StudyResult

RecipeLike = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    recipe: Recipe
    steps: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line per stage, in order."""
        return list(self.steps)


def run(
    recipe: RecipeLike, *, output: str | Path | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> RunResult:
    """Run a recipe (file, mapping or Recipe); what is done already is not done again. Raises UserError."""
    loaded = _recipe(recipe, overrides)
    place = _output(loaded, output)
    from expunge.pipeline.progress import Reporter
    from expunge.pipeline.run import execute

    return execute(loaded, place, Reporter(quiet=quiet))


def plan(recipe: RecipeLike, *, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Check a recipe, its data, model and methods as `run` does, and say what would be done. Trains nothing."""
    loaded = _recipe(recipe, overrides)
    place = _output(loaded, output)
    from expunge.pipeline.outline import outline
    from expunge.pipeline.resolve import resolve

    return Plan(loaded, tuple(outline(resolve(loaded), place)))


def demo(
    *, tiny: bool = False, output: str | Path | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> RunResult:
    """Teach a model fictitious people, unlearn some of them by two merged specialists, and examine what is left."""
    name = "demo-tiny" if tiny else "demo"
    recipe = load_recipe(preset=name, overrides=overrides)
    return run(recipe, output=output or Path("runs") / name, quiet=quiet)


def unlearn(
    model: str,
    forget: str,
    retain: str | None = None,
    *,
    output: str | Path,
    method: str = "npo",
    lora: int | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> RunResult:
    """Unlearn the rows of `forget` from a model while keeping those of `retain`; the result is `output/model`."""
    recipe: dict[str, Any] = {
        "name": "unlearn",
        "model": model,
        "data": {"forget": forget, "retain": retain},
        "unlearn": [{"method": method, "lora": lora}],
    }
    if reference is not None:
        recipe["reference"] = reference
    return run(load_recipe(recipe, overrides=overrides), output=output, quiet=quiet)


def evaluate(
    model: str,
    *,
    forget: str,
    retain: str | None = None,
    holdout: str | None = None,
    reference: str | None = None,
    target: str | None = None,
    template: str = "auto",
    max_length: int = 512,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Every metric of a model (and of a reference and a target beside it) on every split, as records."""
    _check_eval_overrides(overrides)
    rows = {"forget": forget, "retain": retain, "holdout": holdout, "template": template, "max_length": max_length}
    given: dict[str, Any] = {"name": "eval", "model": model, "data": rows, "unlearn": [{}]}
    if reference is not None:
        given["reference"] = reference
    recipe = load_recipe(given, overrides=overrides)
    flags = {"trust_remote_code": recipe.model.trust_remote_code, "allow_pickle": recipe.model.allow_pickle}
    beside = {
        "target": None if target is None else ModelConfig(id=target),
        "model": recipe.model,
        "reference": recipe.reference,
    }
    from expunge.pipeline.examine import examine
    from expunge.pipeline.progress import Reporter

    return examine(
        {name: config.model_copy(update=flags) for name, config in beside.items() if config is not None},
        recipe.data,
        recipe.evaluate,
        recipe.seed,
        Path(output) if output else None,
        Reporter(quiet=quiet),
    )


def merge(
    models: Sequence[str],
    *,
    output: str | Path,
    base: str | None = None,
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] = 0.8,
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Merge checkpoints or adapters into a whole checkpoint at `output`."""
    from expunge.merging.run import merge_models

    count = len(models)
    made = merge_models(
        list(models),
        Path(output),
        base=base,
        method=method,
        weights=list(weights) if weights is not None else [1.0] * count,
        density=[density] * count if isinstance(density, int | float) else list(density),
        parameters=parameters or {},
    )
    return made.path


def study(
    name: str,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> StudyResult:
    """A published experiment over many trials (`expunge list studies NAME` has its options); it can be interrupted."""
    from expunge.pipeline.progress import Reporter
    from expunge.studies.base import run_study

    place = Path(output) if output is not None else Path("runs") / name
    return run_study(name, options, place, overrides, Reporter(quiet=quiet))


def _recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        return load_recipe(recipe.model_dump(mode="json"), overrides=overrides) if overrides else recipe
    return load_recipe(recipe, overrides=overrides)


def _check_eval_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError for a field that an evaluation would silently ignore."""
    for key in parse_overrides(overrides):
        if key.partition(".")[0] in ("name", "prepare", "unlearn", "merge", "thresholds"):
            raise UserError(
                f"--set {key}: an evaluation has no use for it",
                "it reads data.*, evaluate.*, model.*, reference.*, seed",
            )


def _output(recipe: Recipe, output: str | Path | None) -> Path:
    path = Path(output) if output is not None else Path("runs") / recipe.name
    if path.is_file():
        raise UserError(f"{path} is a file, not a folder", "choose another folder with -o")
    return path


__all__ = ["Plan", "demo", "evaluate", "merge", "plan", "run", "study", "unlearn"]
