"""How the models of the study `auto` are made: trained, or merged of specialists; and what is left once calibrated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.pipeline.keeping import EPSILON
from expunge.studies.auto_page import JUDGED, VALIDATION
from expunge.studies.auto_space import AUTO, Entrant

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.recipe import UnlearnConfig
    from expunge.studies.auto import Auto
    from expunge.studies.ground import Ground, Planned

#: How specialists are merged, as published (arXiv:2503.21088).
MERGE, DENSITY = "ties", 0.8


def planned(ground: Ground, options: Auto, entrant: Entrant) -> list[Planned]:
    """The trainings of an entrant: one, or one of each specialist. Raises UserError for what can't be trained."""
    from expunge.studies.ground import Planned

    about = {"method": entrant.family, "entrant": entrant.name, "people": ground.whole.recipe.seed}
    made = [
        Planned(name, _written(ground, options, entrant.family, name, entry), about)
        for name, entry in _entries(entrant).items()
    ]
    for trial in made:
        ground.check(trial.entry)
    return made


def _entries(entrant: Entrant) -> Mapping[str, Mapping[str, Any]]:
    """What each training of an entrant says; of specialists, all of the update is kept until they are merged."""
    if not entrant.specialists:
        return {entrant.name: entrant.entry}
    return {
        f"{entrant.name}-{name}": {**entrant.entry, **said, "keep": None} for name, said in entrant.specialists.items()
    }


def _written(ground: Ground, options: Auto, family: str, name: str, said: Mapping[str, Any]) -> UnlearnConfig:
    """The entry of a training: what `auto` writes out for these rows, or the rivals' own."""
    from expunge.numbers import rate_for_size
    from expunge.pipeline.auto import SIZE, Given, decided
    from expunge.recipe import UnlearnConfig
    from expunge.studies.objectives import layer_setting

    seed = ground.whole.recipe.seed
    if family != AUTO:
        return ground.entry(name=name, seed=seed, **said)
    objective, train = said.get("method"), dict(said.get("train", {}))
    if "lr" in train:
        train["lr"] = rate_for_size(train["lr"], SIZE, ground.parameters)
    asked = {"keep": options.share, "seed": seed, **said, "train": train, "name": name, "method": AUTO}
    recipe = ground.whole.recipe.model_copy(update={"unlearn": [UnlearnConfig.model_validate(asked)]})
    rows = ground.resolved.rows
    given = Given(len(rows["forget"]), len(rows["retain"]), ground.parameters)
    made = decided(recipe, given)[0].unlearn[0]
    if objective is not None:
        made = made.model_copy(update={"method": objective, "parameters": layer_setting(ground, objective)})
    bounds = [steps for steps in (made.train.max_steps, options.steps) if steps is not None]
    limits = {"checkpoint_every": 100_000, "max_steps": min(bounds, default=None)}
    return made.model_copy(update={"train": made.train.model_copy(update=limits)})


def model_of(ground: Ground, options: Auto, entrant: Entrant, trials: list[Planned]) -> Variant | None:
    """The model of an entrant, trained or merged, scaled and scored; None if a training broke off."""
    if not entrant.specialists:
        return ground.checkpoint(trials[0])
    made = [ground.trained(trial, f"specialists/{trial.name}") for trial in trials]
    found = [variant for variant in made if variant is not None]
    if len(found) < len(made):
        return None
    return ground.scored(entrant.name, _merged(ground, options, entrant.name, found), trials[0].about)


def _merged(ground: Ground, options: Auto, name: str, specialists: list[Variant]) -> Variant:
    """Specialists merged on the target, and the whole scaled until validation rows keep enough."""
    from expunge.merging.run import merge_models
    from expunge.models.load import load_model
    from expunge.models.save import save_model
    from expunge.pipeline.job import Keep
    from expunge.pipeline.keeping import scale_down
    from expunge.pipeline.resolve import rows_digest
    from expunge.pipeline.stages import Variant

    target, place = ground.variants["target"], f"zoo/{name}"
    rows, forget = (ground.resolved.rows[split] for split in (VALIDATION, "forget"))
    inputs = {
        "models": [target.digest, *(variant.digest for variant in specialists)],
        "merge": [MERGE, DENSITY],
        "keep": [options.share, rows_digest(rows), rows_digest(forget)],
    }

    def work(folder: Path) -> Mapping[str, Any]:
        merged = folder / "merged"
        paths = [variant.config.id for variant in specialists]
        merge_models(paths, merged, base=target.config.id, method=MERGE, density=DENSITY)
        loaded = load_model(target.config.model_copy(update={"id": str(merged)}))
        scale, note = scale_down(loaded.model, target.config, Keep(options.share, rows, forget))
        save_model(loaded.model, loaded.tokenizer, folder / "out")
        shutil.rmtree(merged)
        return {"scale": scale, "note": note}

    done = ground.directory.stage(place, place, inputs, work)
    ground.stages.reporter.line(f"  note: {place}: {done.outputs['note']}")
    config = target.config.model_copy(update={"id": str(done.path.resolve()), "revision": None})
    seconds = done.seconds + sum(variant.seconds for variant in specialists)
    return Variant(name, config, done.digest, seconds, done.skipped)


def scale_of(ground: Ground, name: str) -> float | None:
    """By what the update of a model was scaled, from the record of its making."""
    made = json.loads((ground.directory.path / "zoo" / name / "stage.json").read_text(encoding="utf-8"))
    scale: float | None = made["outputs"].get("scale")
    return scale


def calibrated(ground: Ground, options: Auto, name: str, model: Variant, scale: float | None) -> float | None:
    """What is left of the forget rows at the largest α that keeps enough of the unseen rows (UWC, arXiv:2406.09179).

    The update is taken as it was before any scaling: this says how good a method is, not what a user gets, who does not
    have these rows. None where nothing can be mixed.
    """
    from expunge.errors import UserError
    from expunge.pipeline.calibrate import both, mixture_of, search
    from expunge.pipeline.calibration_passes import FORGET, CalibrationRows, Passes
    from expunge.pipeline.resolve import rows_digest

    target, rows, evaluate = ground.variants["target"], ground.resolved.rows, ground.whole.recipe.evaluate
    reach = 1.0 if not scale else 1.0 / scale
    inputs = {
        "models": [target.digest, model.digest],
        "keep": [options.share, reach, EPSILON],
        "rows": [rows_digest(rows[split]) for split in (JUDGED, "forget")],
        "dtype": evaluate.dtype,
    }

    def work(folder: Path) -> Mapping[str, Any]:
        (folder / "out").mkdir()
        with both(target.config, model.config) as opened:
            mixture = mixture_of(opened, target.config, evaluate.dtype)
            passes = Passes(lambda: mixture, CalibrationRows(rows[JUDGED], rows["forget"]))
            wanted = options.share * passes.retain(0.0)
            alpha = reach * search(lambda part: passes.retain(reach * part), wanted, EPSILON)
            return {"alpha": alpha, "forget": passes.mean(alpha, FORGET)}

    try:
        left: float | None = ground.directory.stage(f"calibrate/{name}", f"calibrations/{name}", inputs, work).outputs[
            "forget"
        ]
    except UserError as error:  # weights that are no numbers can't be mixed
        ground.remarks.append(f"{name} could not be calibrated: {error.message}")
        return None
    return left
