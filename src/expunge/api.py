"""The Python API: what the commands do, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.pipeline.questions import attack_settings, beside, check_overrides, checkpoints, question
from expunge.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from expunge.merging.run import MergeResult
    from expunge.pipeline.examine import Examination
    from expunge.pipeline.run import RunResult
    from expunge.report.attack_record import AttackRecord
    from expunge.report.calibration_record import Calibration
    from expunge.report.document import Document
    from expunge.report.localization_record import Localization
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
    method: str = "auto",
    lora: int | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> RunResult:
    """Unlearn the rows of `forget` from a model while keeping those of `retain`; the result is `output/model`."""
    recipe = unlearning(model, forget, retain, method=method, lora=lora, reference=reference, overrides=overrides)
    return run(recipe, output=output, quiet=quiet)


def unlearning(
    model: str,
    forget: str,
    retain: str | None = None,
    *,
    method: str = "auto",
    lora: int | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe that `unlearn` runs, for `plan` or to be kept. Raises UserError."""
    recipe: dict[str, Any] = {
        "name": "unlearn",
        "model": model,
        "data": {"forget": forget, "retain": retain},
        "unlearn": [{"method": method, "lora": lora}],
    }
    if reference is not None:
        recipe["reference"] = reference
    return load_recipe(recipe, overrides=overrides)


def evaluate(
    model: str,
    *,
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    reference: str | None = None,
    target: str | None = None,
    template: str = "auto",
    max_length: int = 512,
    overrides: Sequence[str] = (),
    benchmark: str | None = None,
    folder: str | None = None,
    suite: str | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> Examination:
    """Every metric of a model (and of a reference and a target beside it) on every split of files or a benchmark."""
    check_overrides("eval", overrides)
    files = {"forget": forget, "retain": retain, "holdout": holdout, "benchmark": benchmark, "folder": folder}
    recipe = question("eval", model, overrides, reference, suite, template=template, max_length=max_length, **files)
    from expunge.pipeline.examine import examine
    from expunge.pipeline.progress import Reporter

    found = examine(
        beside(recipe, target),
        recipe.data,
        recipe.evaluate,
        recipe.seed,
        Path(output) if output else None,
        Reporter(quiet=quiet),
    )
    _page(output)
    return found


def calibrate(
    unlearned: str,
    *,
    target: str,
    forget: str | None = None,
    retain: str | None = None,
    benchmark: str | None = None,
    folder: str | None = None,
    keep: float = 0.95,
    epsilon: float = 0.01,
    curve: bool = True,
    template: str = "auto",
    max_length: int = 512,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    quiet: bool = False,
) -> Calibration:
    """The largest mixture of an unlearned model with its target that keeps `keep` of the target's retain strength.

    `retain` should be rows that unlearning never saw; beside a benchmark they stand for its held-out retain rows. The
    record, and the calibrated model, are written to `output` if that is given.
    """
    check_overrides("eval", overrides)
    held_out = "retain" if benchmark is None else "retain_unseen"
    rows: dict[str, Any] = {"benchmark": benchmark, "folder": folder, "forget": forget, held_out: retain}
    rows |= {"template": template, "max_length": max_length}
    recipe = load_recipe({"name": "calibrate", "model": target, "data": rows, "unlearn": [{}]}, overrides=overrides)
    from expunge.pipeline.calibrate import Settings
    from expunge.pipeline.calibration_folder import Question
    from expunge.pipeline.calibration_folder import calibrate as run_calibration
    from expunge.pipeline.progress import Reporter

    settings = Settings(keep=keep, epsilon=epsilon, curve=curve, seed=recipe.seed)
    changed = recipe.model.model_copy(update={"id": unlearned, "revision": None})
    asked = Question(recipe.model, changed, recipe.data, recipe.evaluate, settings)
    found = run_calibration(asked, None if output is None else Path(output), Reporter(quiet=quiet))
    _page(output)
    return found


def attack(
    model: str,
    *,
    output: str | Path,
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    target: str | None = None,
    reference: str | None = None,
    attacks: Sequence[str] | None = None,
    benchmark: str | None = None,
    folder: str | None = None,
    suite: str | None = None,
    template: str = "auto",
    max_length: int = 512,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> AttackRecord:
    """Attack a model, with target and reference as controls; `output` is resumed. Settings: `attacks.NAME.KEY=VALUE`.

    `attacks` are names (those of the suite when None); `limit` is how many rows of each split but forget are measured.
    """
    check_overrides("attack", overrides)
    files = {"forget": forget, "retain": retain, "holdout": holdout, "benchmark": benchmark, "folder": folder}
    recipe = question("attack", model, overrides, reference, template=template, max_length=max_length, **files)
    from expunge.pipeline.attack import attack_models, chosen_attacks
    from expunge.pipeline.progress import Reporter

    record = attack_models(
        beside(recipe, target),
        recipe.data,
        chosen_attacks(attacks, suite or "standard", attack_settings(overrides)),
        recipe.evaluate,
        recipe.seed,
        Path(output),
        Reporter(quiet=quiet),
        thresholds=recipe.thresholds,
        limit=limit,
    )
    _page(output)
    return record


def audit(
    zoo: Sequence[str],
    *,
    target: str,
    reference: str,
    output: str | Path,
    knows: Sequence[str] = (),
    lacks: Sequence[str] = (),
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    attacks: Sequence[str] | None = None,
    benchmark: str | None = None,
    folder: str | None = None,
    suite: str | None = None,
    template: str = "auto",
    max_length: int = 512,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Document:
    """Rank metrics by what attacks do to them over a zoo of unlearned checkpoints (MODEL or NAME=MODEL).

    `knows` and `lacks` are further models that hold, or never held, the knowledge; the rest is as for `attack`.
    """
    check_overrides("attack", overrides)
    files = {"forget": forget, "retain": retain, "holdout": holdout, "benchmark": benchmark, "folder": folder}
    recipe = question(
        "audit", target, overrides, reference, "standard", template=template, max_length=max_length, **files
    )
    from expunge.pipeline.attack import chosen_attacks
    from expunge.pipeline.audit import Members, audit_metrics
    from expunge.pipeline.progress import Reporter

    unlearned, knowing, lacking = checkpoints(recipe.model, zoo, knows, lacks)
    assert recipe.reference is not None
    document = audit_metrics(
        Members(unlearned, recipe.model, recipe.reference, knowing, lacking),
        recipe.data,
        chosen_attacks(attacks, suite or "standard", attack_settings(overrides)),
        recipe.evaluate,
        recipe.seed,
        Path(output),
        Reporter(quiet=quiet),
        limit=limit,
    )
    _page(output)
    return document


def localize(
    model: str,
    *,
    output: str | Path,
    forget: str | None = None,
    retain: str | None = None,
    benchmark: str | None = None,
    folder: str | None = None,
    template: str = "auto",
    overrides: Sequence[str] = (),
    quiet: bool = False,
    command: str = "",
    **settings: Any,
) -> Localization:
    """Choose the part of a model that has most to do with the forget rows; `output` is the file of the mask.

    `settings` are the fields of `localize` in a recipe (by, unit, density, strata, parameters, limit, against, …).
    """
    check_overrides("localize", overrides)
    given = {"forget": forget, "retain": retain, "benchmark": benchmark, "folder": folder}
    tree = {"name": "localize", "model": model, "unlearn": [{}], "data": {**given, "template": template}}
    known = {name: value for name, value in settings.items() if value is not None}
    recipe = load_recipe({**tree, "localize": known}, overrides=overrides)
    from expunge.pipeline.localize import Question, run_localize
    from expunge.pipeline.progress import Reporter

    assert recipe.localize is not None
    data = recipe.data if recipe.data.benchmark or recipe.data.forget or recipe.data.retain else None
    asked = Question(recipe.model, recipe.localize, recipe.seed, data, command)
    return run_localize(asked, Path(output), Reporter(quiet=quiet))


def merge(
    models: Sequence[str],
    *,
    output: str | Path,
    base: str | None = None,
    method: str | None = None,
    weights: Sequence[Any] | None = None,
    density: Any = None,
    parameters: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
    **rows: Any,
) -> MergeResult:
    """Merge checkpoints or adapters into a whole checkpoint at `output`: TIES of density 0.8 when nothing is said.

    Weights and density are numbers, lists over layers or {pattern: …, default: …}, one per model. With `search` (the
    fields of `merge.search`) what is not given is chosen on `rows` (forget, retain, …, the fields of `data`), and the
    record is `output/search.json`. `options` are further keywords of `merge_models`, such as device.
    """
    from expunge.pipeline import merge as merging
    from expunge.pipeline.progress import Reporter

    said = merging.Said(base, method, weights, density, parameters or {}, options or {})
    return merging.merge(models, Path(output), said, search, reference, rows, overrides, Reporter(quiet=quiet))


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


def _page(output: str | Path | None) -> None:
    """The page of what a command wrote, in its folder."""
    if output is None:
        return
    from expunge.pipeline.processes import process_rank
    from expunge.report.pages import build_page

    if process_rank() == 0:
        build_page(Path(output))


def _output(recipe: Recipe, output: str | Path | None) -> Path:
    path = Path(output) if output is not None else Path("runs") / recipe.name
    if path.is_file():
        raise UserError(f"{path} is a file, not a folder", "choose another folder with -o")
    return path


__all__ = [
    "Plan",
    "attack",
    "audit",
    "calibrate",
    "demo",
    "evaluate",
    "localize",
    "merge",
    "plan",
    "run",
    "study",
    "unlearn",
    "unlearning",
]
