"""The protocol of UWC (arXiv:2406.09179) at small scale: a zoo, calibration, attacks, and what metrics are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from expunge.errors import UserError
from expunge.studies.base import Names, StudyOptions, Whole, study
from expunge.studies.uwc_page import SUMMARY, Member, document

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.report.calibration_record import Calibration
    from expunge.report.document import Document
    from expunge.studies.ground import Ground, Planned

JUDGED, VALIDATION = "retain_unseen", "validation"
METHODS = ("grad_ascent", "grad_diff", "kl_min", "npo", "idk_nll", "rmu")
ATTACKS = ("relearn", "quantize", "jailbreak", "token_noise")


class Uwc(StudyOptions):
    """Options of `uwc`."""

    methods: Names = Field(METHODS, description="objectives of the zoo")
    steps: Whole = Field((6, 16), description="optimizer steps; a checkpoint for each")
    seeds: int = Field(3, gt=0, description="trainings per method and number of steps")
    rate: float = Field(2e-5, gt=0, description="learning rate of unlearning")
    attacks: Names = Field(ATTACKS, description="what is done to every checkpoint (expunge list attacks)")
    epsilon: float = Field(0.01, gt=0, lt=1, description="how close calibration gets to the largest mixture")
    validation: float = Field(0.25, gt=0, lt=1, description="part of the retain rows that calibration looks at")
    limit: int = Field(24, gt=0, description="rows of each split but forget that are measured under attack")
    parameters: Names = Field((), description="settings of attacks, e.g. relearn.steps=40")


def entry(options: Uwc) -> dict[str, Any]:
    """What all checkpoints of the zoo share."""
    train = {"epochs": 1000, "max_steps": max(options.steps), "lr": options.rate, "batch_size": 8}
    return {"method": "grad_ascent", "train": {**train, "schedule": "constant", "checkpoint_every": 100_000}}


@study(
    "uwc",
    summary=SUMMARY,
    paper="2406.09179",
    estimate="about five minutes per checkpoint of the zoo on two CPU cores, attacks included",
    options=Uwc,
    entry=entry,
    fixed=("method", "parameters", "train.max_steps", "train.epochs", "train.lr", "seed"),
)
def uwc(ground: Ground, options: Uwc) -> Document:
    """Train the zoo, calibrate every checkpoint on validation rows, attack all of them, and audit the metrics."""
    attacks = attacks_with(options.attacks, options.parameters)
    ground.set_aside(JUDGED)
    ground.set_aside(VALIDATION, options.validation)
    trials = [
        _trial(ground, options, method, steps, number)
        for number in range(options.seeds)
        for steps in sorted(options.steps)
        for method in dict.fromkeys(options.methods)
    ]
    for trial in trials:
        ground.check(trial.entry)
    ground.expect(len(trials), "then each is calibrated and attacked")
    ground.measure_yardsticks()
    if "reference" not in ground.variants:
        raise UserError(
            "study uwc needs a reference model", "give one: --reference MODEL, or let it teach: --benchmark"
        )
    zoo = [(trial, made) for trial in trials if (made := ground.checkpoint(trial)) is not None]
    members = []
    known: dict[tuple[float, str], Any] = {}
    for trial, variant in zoo:
        try:
            found = _calibrated(ground, options, trial.name, variant, known)
        except UserError as error:  # weights that are no numbers can't be mixed
            ground.remarks.append(f"{trial.name} could not be calibrated: {error.message}")
            continue
        about = trial.about
        members.append(Member(trial.name, about["method"], about["steps"], about["seed"], found))
    audited = _audited(ground, options, {trial.name: made for trial, made in zoo}, attacks)
    return document(ground, options, members, *audited)


def _trial(ground: Ground, options: Uwc, method: str, steps: int, number: int) -> Planned:
    from expunge.studies.ground import Planned

    seed = options.seed + number
    name = f"{method}-{steps}-seed{seed}"
    made = ground.entry(name=name, method=method, seed=seed, train={"max_steps": steps})
    return Planned(name, made, {"method": method, "steps": steps, "seed": seed})


def _calibrated(
    ground: Ground, options: Uwc, name: str, variant: Variant, known: dict[tuple[float, str], Any]
) -> Calibration:
    """The calibration of one checkpoint on validation rows, from the run directory where it was made before."""
    import json
    from pathlib import Path

    from expunge.pipeline.calibrate import CalibrationRows, Settings, calibrate_model, known_strengths
    from expunge.pipeline.resolve import rows_digest
    from expunge.report.calibration_record import NAME, Calibration
    from expunge.runs.atomic import write_json

    target, rows, evaluate = ground.variants["target"], ground.resolved.rows, ground.whole.recipe.evaluate
    splits = {"retain": VALIDATION, "forget": "forget"}
    asked = CalibrationRows(rows[VALIDATION], rows["forget"], splits=splits)
    settings = Settings(keep=options.share, epsilon=options.epsilon, seed=options.seed)
    inputs = {
        "target": target.digest,
        "model": variant.digest,
        "settings": repr(settings),
        "rows": {split: rows_digest(rows[split]) for split in splits.values()},
    }

    def work(folder: Path) -> Mapping[str, Any]:
        with ground.stages.reporter.bar(f"calibrate/{name}", 0) as tick:
            found = calibrate_model(target.config, variant.config, asked, settings, evaluate, known=known, tick=tick)
        (folder / "out").mkdir()
        write_json(folder / "out" / NAME, found.to_json())
        return {"alpha": found.alpha}

    done = ground.directory.stage(f"calibrate/{name}", f"calibrations/{name}", inputs, work)
    found = Calibration.model_validate(json.loads((done.path / NAME).read_text(encoding="utf-8")))
    known |= known_strengths(found)
    return found


def _audited(ground: Ground, options: Uwc, zoo: Mapping[str, Variant], attacks: Sequence[Any]) -> tuple[Any, Any]:
    """The findings of the audit, and the record of the attacks behind them."""
    from expunge.metrics.base import Resampling
    from expunge.pipeline.attack import attack_models
    from expunge.pipeline.audit import ATTACKS as FOLDER
    from expunge.pipeline.audit import Members, findings

    variants, recipe = ground.variants, ground.whole.recipe
    lacking = {"original": variants["original"].config} if "original" in variants else {}
    checkpoints = {name: variant.config for name, variant in zoo.items()}
    members = Members(checkpoints, variants["target"].config, variants["reference"].config, {}, lacking)
    members.check()
    evaluate = recipe.evaluate.model_copy(update={"suite": "standard", "metrics": None})
    record = attack_models(
        members.subjects(),
        recipe.data,
        attacks,
        evaluate,
        options.seed,
        ground.directory.path / FOLDER,
        ground.stages.reporter,
        limit=options.limit,
    )
    return findings(record, members.zoo(), Resampling(evaluate.bootstrap, options.seed)), record


def attacks_with(attacks: Sequence[str], parameters: Sequence[str]) -> list[Any]:
    """Attacks with their settings (`relearn.steps=40`). Raises UserError for an unknown name or setting."""
    from expunge.pipeline.attack import chosen_attacks
    from expunge.recipe import parse_overrides

    given: dict[str, dict[str, Any]] = {}
    for key, value in parse_overrides(parameters).items():
        name, dot, setting = key.partition(".")
        if not dot:
            raise UserError(f"--parameters: '{key}' names no attack", "for instance: --parameters relearn.steps=40")
        given.setdefault(name, {})[setting] = value
    return chosen_attacks(list(attacks), "full", given)
