"""Every objective on one target: a learning rate chosen on validation rows, then seeds, then the trade-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from expunge.errors import UserError, did_you_mean
from expunge.numbers import rate_for_size
from expunge.studies.base import Names, Numbers, StudyOptions, study
from expunge.studies.objectives_page import JUDGED, SUMMARY, VALIDATION, Found, document, rate_text
from expunge.studies.rules import Choice, Measured, choose

if TYPE_CHECKING:
    from expunge.report.document import Document
    from expunge.studies.ground import Ground, Outcome, Planned

#: The published rates are for models of about this many parameters.
PUBLISHED_SIZE = 7e9
#: How much faster adapters are trained than weights, as in the published LoRA runs (1e-4 against 1e-5).
ADAPTERS = 10.0
#: Rates per method; fewer published ones are filled up by this factor.
GRID, FACTOR = 3, 3.0


class Objectives(StudyOptions):
    """Options of `objectives`."""

    methods: Names | None = Field(None, description="objectives, e.g. npo,simnpo; all when absent")
    rates: Numbers | None = Field(None, description="learning rates for all; the methods' own, scaled, when absent")
    seeds: int = Field(3, gt=0, description="trials at the chosen rate, each with a seed of its own")
    epochs: float = Field(5.0, gt=0, description="passes over the forget rows in each trial")
    lora: int | None = Field(None, gt=0, description="train adapters of this rank instead of all weights")
    validation: float = Field(0.25, gt=0, lt=1, description="part of the retain rows that chooses the learning rate")
    parameters: Names = Field((), description="hyper-parameters of methods, e.g. npo.beta=0.5,rmu.layer=3")


def entry(options: Objectives) -> dict[str, Any]:
    """What all trials share."""
    train = {"epochs": options.epochs, "batch_size": 8, "schedule": "linear", "warmup": 0.05, "lr": 1e-5}
    return {
        "method": "grad_ascent",  # needs nothing; each trial names its own
        "lora": options.lora,
        "train": {**train, "checkpoint_every": 100_000},
    }


@study(
    "objectives",
    summary=SUMMARY,
    paper="",
    estimate="five trials per method: hours on a CPU for all methods, minutes for a few",
    options=Objectives,
    entry=entry,
    fixed=("method", "parameters", "train.lr", "train.epochs", "lora", "seed"),
)
def objectives(ground: Ground, options: Objectives) -> Document:
    """A grid of rates on the first seed; per method the rate that the rule chooses; further seeds at that rate."""
    ground.set_aside(JUDGED)
    ground.set_aside(VALIDATION, options.validation)
    grid, left_out = _grid(ground, options)
    count = sum(map(len, grid.values())) + len(grid) * (options.seeds - 1)
    ground.expect(count, f"{len(grid)} methods: {sum(map(len, grid.values()))} for the rates, the rest for the seeds")
    for method, reason in left_out.items():
        ground.stages.reporter.line(f"  left out: {method}: {reason}")
    ground.measure_yardsticks()
    ground.run([trial for trials in grid.values() for trial in trials.values()])
    target = ground.outcomes["target"]
    chosen: dict[str, Choice[float]] = {}
    tried: dict[str, dict[float, Outcome]] = {}
    for method, trials in grid.items():
        tried[method] = {
            rate: ground.outcomes[trial.name] for rate, trial in trials.items() if trial.name in ground.outcomes
        }
        choice = choose(_validated(tried[method]), target[VALIDATION], options.share)
        if choice is not None and len(tried[method]) == len(trials):
            chosen[method] = choice
    further = [
        _trial(ground, options, method, choice.key, seed)
        for seed in range(1, options.seeds)
        for method, choice in chosen.items()
    ]
    ground.run(further)
    found = [_found(ground, options, method, choice, tried[method]) for method, choice in chosen.items()]
    return document(ground, options, found, tried, left_out)


def published_rates(rates: Sequence[float]) -> list[float]:
    """Three rates around the published ones: where fewer are published, further up, and then further down."""
    found = sorted(set(rates))
    while len(found) < GRID:
        found.append(found[-1] * FACTOR)
        if len(found) < GRID:
            found.insert(0, found[0] / FACTOR)
    return found


def scaled_rate(rate: float, parameters: int, adapters: bool) -> float:
    """A published rate for a model of another size (see `rate_for_size`), and ×10 for adapters."""
    return rate_for_size(rate * (ADAPTERS if adapters else 1.0), PUBLISHED_SIZE, parameters)


def _grid(ground: Ground, options: Objectives) -> tuple[dict[str, dict[float, Planned]], dict[str, str]]:
    """Trials by method and rate, and why methods are left out. Raises UserError for a named method that can't run."""
    from expunge.methods.base import OBJECTIVES

    names = list(dict.fromkeys(options.methods)) if options.methods is not None else OBJECTIVES.names()
    check_parameters(options.parameters, names)
    grid: dict[str, dict[float, Planned]] = {}
    left_out = {}
    for name in names:
        declared = OBJECTIVES.get(name).about.rates
        rates = options.rates or [
            scaled_rate(rate, ground.parameters, options.lora is not None) for rate in published_rates(declared)
        ]
        trials = {rate: _trial(ground, options, name, rate, 0) for rate in sorted(rates)}
        try:
            ground.check(next(iter(trials.values())).entry)
        except UserError as error:
            if options.methods is not None:
                raise
            left_out[name] = error.message
            continue
        grid[name] = trials
    if not grid:
        raise UserError("no method is left to study", "name some: --methods npo,simnpo")
    return grid, left_out


def _trial(ground: Ground, options: Objectives, method: str, rate: float, number: int) -> Planned:
    from expunge.studies.ground import Planned

    seed = options.seed + number
    given = given_parameters(options.parameters).get(method, {})
    made = ground.entry(
        name=f"{method}-seed{seed}",
        method=method,
        parameters={**layer_setting(ground, method), **given},
        seed=seed,
        train={"lr": rate},
    )
    return Planned(f"{method}-lr{rate_text(rate)}-seed{seed}", made, {"method": method, "rate": rate, "seed": seed})


def layer_setting(ground: Ground, method: str) -> dict[str, int]:
    """The layer of a method that works at one, at the height in this model that it has in the published ones."""
    from expunge.methods.base import OBJECTIVES
    from expunge.methods.steering import AtLayer
    from expunge.models.forward import decoder_layers

    cls: Any = OBJECTIVES.get(method)
    if not issubclass(cls, AtLayer):
        return {}
    return {"layer": int(len(decoder_layers(ground.architecture)) * cls.height)}


def given_parameters(parameters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method, from `--parameters`. Raises UserError for one that names no method."""
    from expunge.recipe import parse_overrides

    given: dict[str, dict[str, Any]] = {}
    for key, value in parse_overrides(parameters).items():
        method, dot, name = key.partition(".")
        if not dot:
            raise UserError(f"--parameters: '{key}' names no method", "for instance: --parameters npo.beta=0.5")
        given.setdefault(method, {})[name] = value
    return given


def check_parameters(parameters: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for hyper-parameters of methods that are not studied."""
    for method in given_parameters(parameters):
        if method not in names:
            raise UserError(f"--parameters: method '{method}' is not among those studied", did_you_mean(method, names))


def _validated(tried: Mapping[float, Outcome]) -> dict[float, Measured]:
    return {
        rate: Measured(outcome["forget"], outcome[VALIDATION]) for rate, outcome in tried.items() if outcome.strengths
    }


def _found(
    ground: Ground, options: Objectives, method: str, choice: Choice[float], tried: Mapping[float, Outcome]
) -> Found:
    names = [_trial(ground, options, method, choice.key, seed).name for seed in range(options.seeds)]
    seeds = [ground.outcomes[name] for name in names if name in ground.outcomes]
    return Found(method, choice.key, choice.met, tried, seeds)
