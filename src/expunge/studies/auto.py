"""The search behind `method: auto`: variations and published objectives, each scaled to keep enough, then attacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from expunge.errors import UserError, did_you_mean
from expunge.studies.auto_beside import Beside, beside
from expunge.studies.auto_models import calibrated, model_of, planned, scale_of
from expunge.studies.auto_page import JUDGED, SUMMARY, VALIDATION, Examined, chosen_of, document
from expunge.studies.auto_space import AUTO, DEFAULT, MERGED, RIVALS, VARIATIONS, ZJUKLAB, Entrant
from expunge.studies.base import STUDIES, Names, Numbers, StudyOptions, Whole, study
from expunge.studies.objectives import (
    ADAPTERS,
    check_parameters,
    given_parameters,
    layer_setting,
    published_rates,
    rate_text,
    scaled_rate,
)
from expunge.studies.zjuklab_record import OVER, UNDER

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.report.attack_record import AttackRecord
    from expunge.report.document import Document
    from expunge.studies.ground import Ground

_NAMES = (*VARIATIONS, *MERGED)
ATTACKS = ("relearn", "quantize")
#: One epoch on all rows of `fictitious`, as the margin is defined; one pass at 4 bits.
SETTINGS = ("relearn.beside=retain", "relearn.steps=15", "relearn.looks=1", "relearn.lr=1e-4", "quantize.schemes=[nf4]")


class Auto(StudyOptions):
    """Options of `auto`."""

    variations: Names = Field(_NAMES, description="of auto: " + ", ".join(_NAMES))
    rivals: Names = Field(RIVALS, description="published objectives, and zjuklab's merge, beside it; none: --rivals ''")
    rates: Numbers | None = Field(None, description="of the rivals (adapters: × 10); their own, scaled, when absent")
    epochs: float = Field(10.0, gt=0, description="passes of the rivals over the forget rows")
    steps: int | None = Field(None, gt=0, description="optimizer steps of every training at most")
    report: Whole = Field((), description="seeds of other people on whom the chosen one and the rivals are reported")
    attacks: Names = Field(
        ATTACKS, description="what is done to every model (expunge list attacks); none: --attacks ''"
    )
    parameters: Names = Field(
        SETTINGS, description="of attacks, e.g. relearn.steps=40, and of rivals, e.g. rmu.alpha=10"
    )
    limit: int = Field(24, gt=0, description="rows of each split but forget that are measured under attack")
    beside: bool = Field(True, description="measure general knowledge and fluency too")
    validation: float = Field(0.2, gt=0, lt=1, description="part of the retain rows that the scaling looks at")

    @model_validator(mode="after")
    def _others(self) -> Auto:
        if self.seed in self.report:
            raise ValueError(f"--report: people of seed {self.seed} are those that the choice is made on")
        return self


def entry(options: Auto) -> dict[str, Any]:
    """What the rivals share; variations of `auto` bring their own."""
    train = {"epochs": options.epochs, "batch_size": 8, "schedule": "linear", "warmup": 0.05, "lr": 1e-5}
    train |= {"max_steps": options.steps} if options.steps else {}
    return {"method": "grad_ascent", "keep": options.share, "train": {**train, "checkpoint_every": 100_000}}


@study(
    "auto",
    summary=SUMMARY,
    paper="",
    estimate="about ten minutes per variation on one CPU core with a model of 135M parameters, half a minute with "
    "fresh-5m, attacks included",
    options=Auto,
    entry=entry,
    fixed=("method", "parameters", "train.lr", "train.epochs", "train.max_steps", "keep", "seed"),
)
def auto(ground: Ground, options: Auto) -> Document:
    """Examine every entrant on the people of the seed, choose, and examine the chosen ones on other people."""
    from expunge.studies.ground import open_ground

    attacks = _attacks(options)
    _set_aside(ground, options)
    entrants = [*_variations(options), *rivals_of(ground, options)]
    ground.expect(len(entrants), f"then those chosen of them on {len(options.report)} further sets of people")
    tried = _examined(ground, options, entrants, attacks)
    going_on = chosen_of(tried, ground.whole.recipe.thresholds)
    reported: list[Examined] = []
    for seed in options.report if len(tried) == len(entrants) else ():
        recipe = ground.whole.recipe.model_copy(update={"seed": seed})
        place = ground.directory.path / f"people-{seed}"
        with open_ground(STUDIES.get("auto"), options, recipe, place, ground.stages.reporter) as other:
            other.began = ground.began  # one budget of time for all
            _set_aside(other, options)
            other.expect(len(going_on))
            reported += _examined(other, options, [found.entrant for found in going_on], attacks)
            ground.remarks += [f"People {seed}: {remark}" for remark in other.remarks]
            other.directory.finish()
    return document(ground, options, tried, going_on, reported)


def _set_aside(ground: Ground, options: Auto) -> None:
    ground.set_aside(JUDGED)
    ground.set_aside(VALIDATION, options.validation)


def _variations(options: Auto) -> Iterable[Entrant]:
    """Raises UserError for a name that is none."""
    for name in dict.fromkeys((DEFAULT, *options.variations)):
        if name not in _NAMES:
            raise UserError(f"--variations: auto has no variation '{name}'", did_you_mean(name, list(_NAMES)))
        yield Entrant(f"{AUTO}-{name}", AUTO, VARIATIONS.get(name, {}), MERGED.get(name, {}))


def rivals_of(ground: Ground, options: Auto) -> Iterable[Entrant]:
    """Each rival at its rates. Raises UserError for a name that is no objective."""
    from expunge.methods.base import OBJECTIVES

    told = [setting for setting in options.parameters if _of_objective(setting)]
    check_parameters(told, options.rivals)
    given = given_parameters(told)
    for name in dict.fromkeys(options.rivals):
        if name == ZJUKLAB:
            yield from _published_merge(ground, options)
            continue
        declared = published_rates(OBJECTIVES.get(name).about.rates)
        rates = options.rates or [scaled_rate(rate, ground.parameters, adapters=False) for rate in declared]
        own = given.get(name, {})
        called = "-".join([name, *(f"{key}{value}" for key, value in own.items())])
        parameters = {**layer_setting(ground, name), **own}
        for rate in sorted(rates):
            yield Entrant(
                f"{called}-lr{rate_text(rate)}",
                name,
                {"method": name, "parameters": parameters, "train": {"lr": rate}},
            )


def _published_merge(ground: Ground, options: Auto) -> Iterable[Entrant]:
    """ZJUKLAB's two specialists at each rate of adapters, with the published weights of their losses."""
    from expunge.recipe import LoraConfig, RetainTerms
    from expunge.studies.zjuklab_training import PUBLISHED, RATE

    rates = [ADAPTERS * rate for rate in options.rates or ()]
    lora = LoraConfig(rank=32, alpha=32, dropout=0.05)
    for rate in sorted(rates) or [scaled_rate(RATE, ground.parameters, adapters=False)]:
        specialists = {
            name: {
                "forget_weight": PUBLISHED[name].npo,
                "retain": RetainTerms(nll=PUBLISHED[name].nll, kl=PUBLISHED[name].kl),
                "train": {"lr": rate, "batch_size": PUBLISHED[name].rows},
            }
            for name in (OVER, UNDER)
        }
        shared = {"method": "npo", "parameters": {"beta": 0.1, "level": "mean"}, "lora": lora}
        yield Entrant(f"{ZJUKLAB}-lr{rate_text(rate)}", ZJUKLAB, shared, specialists)


def _examined(ground: Ground, options: Auto, entrants: Sequence[Entrant], attacks: Sequence[Any]) -> list[Examined]:
    """Make every entrant, score it, attack them all; those for which time is left, and whose training came through."""
    trainings = [(entrant, planned(ground, options, entrant)) for entrant in entrants]
    ground.measure_yardsticks()
    models: dict[str, tuple[Entrant, Variant]] = {}
    left: dict[str, float | None] = {}
    for entrant, trials in trainings:
        if ground.time_is_up():
            break
        variant = model_of(ground, options, entrant, trials)
        if variant is not None:
            models[entrant.name] = entrant, variant
            left[entrant.name] = calibrated(ground, options, entrant.name, variant, scale_of(ground, entrant.name))
    if not models:
        return []
    found = {name: variant for name, (_, variant) in models.items()}
    others = _beside(ground, options, found)
    record = _attacked(ground, options, found, attacks) if attacks else None
    return [
        Examined(
            entrant,
            ground.whole.recipe.seed,
            dict(ground.outcomes),
            scale_of(ground, name),
            {} if record is None else _standings(record, name, first=name == next(iter(models))),
            left[name],
            {who: others[who] for who in (name, *ground.variants) if who in others},
        )
        for name, (entrant, _) in models.items()
    ]


def _beside(ground: Ground, options: Auto, models: Mapping[str, Variant]) -> dict[str, Beside]:
    """General knowledge and fluency of every model and of what it is held against."""
    everything = {**ground.variants, **models} if options.beside else {}
    return {name: beside(ground, name, variant, options.limit) for name, variant in everything.items()}


def _attacked(ground: Ground, options: Auto, models: Mapping[str, Variant], attacks: Sequence[Any]) -> AttackRecord:
    from expunge.pipeline.attack import attack_models
    from expunge.pipeline.attack_summary import MODEL

    recipe, known = ground.whole.recipe, ground.variants
    first, *others = models
    subjects = {MODEL: models[first].config}
    subjects |= {name: known[name].config for name in ("target", "reference") if name in known}
    subjects |= {name: models[name].config for name in others}
    return attack_models(
        subjects,
        recipe.data,
        attacks,
        recipe.evaluate,
        recipe.seed,
        ground.directory.path / "attacks",
        ground.stages.reporter,
        limit=options.limit,
    )


def _standings(record: AttackRecord, name: str, first: bool) -> dict[str, tuple[float, float | None]]:
    """Attack point → (strength of a model there, that of the reference)."""
    from expunge.pipeline.attack_summary import MODEL

    subject = MODEL if first else name
    found = {}
    for result in record.attacks:
        for point in result.points:
            if subject in point.strengths:
                reference = point.strengths.get("reference")
                strength = point.strengths[subject].value
                found[f"{result.name} {point.label}"] = strength, None if reference is None else reference.value
    return found


def _attacks(options: Auto) -> list[Any]:
    """The attacks with the settings that they are given, with ours where none is given."""
    from expunge.studies.uwc import attacks_with

    told = [setting for setting in options.parameters if not _of_objective(setting)] or SETTINGS
    asked = [setting for setting in told if setting not in SETTINGS or setting.partition(".")[0] in options.attacks]
    return attacks_with(options.attacks, asked) if options.attacks else []


def _of_objective(setting: str) -> bool:
    """Whether a setting (`rmu.alpha=10`) is of an objective; else it is of an attack."""
    from expunge.methods.base import OBJECTIVES

    return setting.partition(".")[0] in OBJECTIVES.names()
