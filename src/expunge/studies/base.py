"""What a study is: a resumable program over many trials, its options, and how it is registered. No torch here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from expunge.errors import UserError, did_you_mean
from expunge.recipe import Recipe, load_recipe, parse_overrides
from expunge.recipe.base import Frozen
from expunge.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from expunge.pipeline.progress import Reporter
    from expunge.report.document import Document
    from expunge.studies.ground import Ground

#: Name of the unlearn entry whose settings all trials start from: `--set unlearn.trial.train.epochs=3`.
ENTRY = "trial"
#: How small models are taught; others are as in the demo.
_PRESETS = {"tiny": "demo-tiny", "fresh-5m": "scratch"}


_COMMA = re.compile(r",(?![^\[]*\])")


def _parts(value: Any) -> Any:
    """A text as its parts; commas inside brackets are a value's own: quantize.schemes=[int8,nf4],relearn.steps=40."""
    return [part.strip() for part in _COMMA.split(value) if part.strip()] if isinstance(value, str) else value


Whole = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_parts)]
Numbers = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_parts)]
Names = Annotated[tuple[str, ...], BeforeValidator(_parts)]


class StudyOptions(Frozen):
    """What every study is told; each field is a flag of `expunge study NAME`."""

    model: str = Field(description="folder, hub id, .gguf file or alias")
    benchmark: str | None = Field(
        None, description="rows that the model is taught first; fictitious when no --forget is given"
    )
    forget: str | None = Field(None, description="rows to forget, which the model knows already")
    retain: str | None = Field(None, description="rows to keep; unlearning trains on them")
    retain_unseen: str | None = Field(
        None, description="rows to keep that unlearning never sees; a quarter of --retain when absent"
    )
    reference: str | None = Field(None, description="a model that never saw the forget rows")
    template: str | None = Field(None, description="auto, chat, raw, or text with {prompt} and {answer}")
    share: float = Field(0.95, gt=0, le=1, description="part of the target's retain strength that counts as kept")
    seed: int = Field(42, ge=0, description="of data, teaching and (the first) trials")
    minutes: float | None = Field(None, gt=0, description="begin no trial after this time; run again to go on")

    @model_validator(mode="after")
    def _one_origin(self) -> StudyOptions:
        if self.benchmark and self.forget:
            raise ValueError("give either --benchmark or --forget")
        if self.forget and not self.retain:
            raise ValueError("--forget needs --retain: what is kept is half of the answer")
        if not self.forget and (self.retain or self.retain_unseen):
            raise ValueError("--retain needs --forget; a benchmark has its own rows")
        return self


@dataclass(frozen=True)
class Study:
    """A study's declaration, and the program that makes its document on a ground."""

    name: str
    summary: str
    paper: str  # arXiv ids; "" for a comparison of our own
    estimate: str  # how long it takes, measured
    options: type[StudyOptions]
    entry: Callable[[Any], Mapping[str, Any]]  # options → the unlearn entry that all trials start from
    fixed: tuple[str, ...]  # fields of that entry that the study itself sets
    run: Callable[[Ground, Any], Document]
    reference: bool = True  # whether a model without the forget rows is taught beside the target
    target: bool = True  # whether a model is taught all rows
    recipe: Callable[[Any, dict[str, Any]], None] | None = None  # the study's own changes to the recipe's tree

    def describe(self) -> dict[str, str]:
        """Label → text, for `expunge list studies` and the docs."""
        described = {"summary": self.summary, "takes": self.estimate, "paper": self.paper}
        for name, field in self.options.model_fields.items():
            default = "" if field.is_required() or field.default is None else f" (default {shown(field.default)})"
            described[f"option {flag(name)}"] = f"{field.description}{default}"
        return described


STUDIES: Registry[Study] = Registry("study", "expunge.studies")


def study(
    name: str,
    *,
    summary: str,
    paper: str,
    estimate: str,
    options: type[StudyOptions],
    entry: Callable[[Any], Mapping[str, Any]],
    fixed: Sequence[str],
    reference: bool = True,
    target: bool = True,
    recipe: Callable[[Any, dict[str, Any]], None] | None = None,
) -> Callable[[Callable[[Ground, Any], Document]], Callable[[Ground, Any], Document]]:
    """Decorator that files a program over trials as the study `name`."""

    def file(run: Callable[[Ground, Any], Document]) -> Callable[[Ground, Any], Document]:
        made = Study(name, summary, paper, estimate, options, entry, tuple(fixed), run, reference, target, recipe)
        STUDIES.register(name)(made)
        return run

    return file


@dataclass(frozen=True)
class StudyResult:
    """What a study left: its folder, its page, what it found, and whether every trial had been done before."""

    path: Path
    report: Path
    document: Document
    skipped_all: bool


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def build_options(chosen: Study, given: Mapping[str, Any]) -> Any:
    """The options of a study. Raises UserError for unknown ones and values that can't be."""
    valid = list(chosen.options.model_fields)
    for name in given:
        if name not in valid:
            raise UserError(f"study {chosen.name} has no option {flag(name)}", did_you_mean(name, valid))
    try:
        return chosen.options.model_validate(dict(given))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{flag(str(item['loc'][0]))}: {message}" if item["loc"] else message)
        hint = f"see: expunge study {chosen.name} --help"
        raise UserError("; ".join(dict.fromkeys(problems)), hint) from None


def study_recipe(chosen: Study, options: StudyOptions, overrides: Sequence[str]) -> Recipe:
    """The recipe that all trials of a study share. Raises UserError."""
    _check_overrides(chosen, overrides)
    preset = load_recipe(preset=_PRESETS.get(options.model, "demo")).model_dump(mode="json")
    data: dict[str, Any] = {name: getattr(options, name) for name in ("forget", "retain", "retain_unseen")}
    if options.forget is None:
        benchmark = options.benchmark or preset["data"]["benchmark"]
        data = {"benchmark": benchmark, **{name: preset["data"][name] for name in ("template", "max_length")}}
    if options.template is not None:
        data["template"] = options.template
    tree = {
        "name": chosen.name,
        "seed": options.seed,
        "model": options.model,
        "reference": options.reference,
        "data": data,
        "prepare": preset["prepare"] if options.forget is None else None,
        "unlearn": [{"name": ENTRY, **chosen.entry(options)}],
        "evaluate": {
            "batch_size": preset["evaluate"]["batch_size"],
            "generate": None,
            "metrics": ["extraction_strength"],
        },
    }
    if chosen.recipe is not None:
        chosen.recipe(options, tree)
    return load_recipe(tree, overrides=overrides)


def _check_overrides(chosen: Study, overrides: Sequence[str]) -> None:
    """Raises UserError for fields that the study sets itself."""
    for key in parse_overrides(overrides):
        head, *rest = key.split(".")
        inner = ".".join(rest[1:]) if head == "unlearn" else ""
        if head == "merge" or any(inner == field or inner.startswith(f"{field}.") for field in chosen.fixed):
            raise UserError(f"--set {key}: study {chosen.name} sets it itself", f"see: expunge study {chosen.name} -h")


def run_study(
    name: str, given: Mapping[str, Any], output: Path, overrides: Sequence[str], reporter: Reporter
) -> StudyResult:
    """Do every trial of a study that is not done yet, and write its page. Raises UserError."""
    chosen = STUDIES.get(name)
    options = build_options(chosen, given)
    recipe = study_recipe(chosen, options, overrides)
    from expunge.studies.ground import open_ground

    with open_ground(chosen, options, recipe, output, reporter) as ground:
        ground.directory.record(command=study_command(chosen, options, overrides, output))
        return ground.close(chosen.run(ground, options))


def study_command(chosen: Study, options: StudyOptions, overrides: Sequence[str], output: Path) -> str:
    """The command that makes this study, however it was started."""
    parts = ["expunge", "study", chosen.name]
    for name, field in chosen.options.model_fields.items():
        value = getattr(options, name)
        if value != field.default and value not in (None, ()):
            parts += [flag(name), shown(value)]
    for override in overrides:
        parts += ["--set", override]
    return shlex.join([*parts, "-o", str(output)])
