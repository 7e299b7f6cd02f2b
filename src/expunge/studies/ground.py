"""What a study stands on: a run directory, a target that knows the rows, and trials that are measured one by one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.data.aside import put_aside
from expunge.errors import UserError
from expunge.numbers import HARDLY
from expunge.report.text import duration
from expunge.studies.base import STUDIES, Study, StudyOptions, StudyResult

if TYPE_CHECKING:
    from expunge.data.encode import Encoded
    from expunge.pipeline.job import Job
    from expunge.pipeline.progress import Reporter
    from expunge.pipeline.resolve import Resolved
    from expunge.pipeline.snapshots import Recorder
    from expunge.pipeline.stages import Stages, Variant
    from expunge.pipeline.trials import TrialResult
    from expunge.recipe import Recipe, TokenSelection, UnlearnConfig
    from expunge.report.document import Document
    from expunge.runs.store import RunDirectory

METRIC = "extraction_strength"
SPLITS = ("forget", "retain", "validation", "retain_unseen")
#: Part of the retain rows that is put aside where a split of its own is missing.
ASIDE = 0.25


@dataclass(frozen=True)
class Planned:
    """A trial before it is made; `about` are the columns that tell it from the others."""

    name: str
    entry: UnlearnConfig
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Strength:
    """Extraction strength on a split: mean over its rows, and the ends of its 95% interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Outcome:
    """A trial after it was made; without strengths if its training broke off."""

    name: str
    about: Mapping[str, Any]
    strengths: Mapping[str, Strength]
    seconds: float
    steps: int
    note: str
    failed: str

    def __getitem__(self, split: str) -> float:
        """Mean strength on a split."""
        return self.strengths[split].value


class Ground:
    """Rows, target and yardsticks of a study, and the one way in which its trials are made and counted."""

    def __init__(self, study: Study, options: StudyOptions, resolved: Resolved, stages: Stages) -> None:
        self.study, self.options, self.stages = study, options, stages
        self.whole = resolved  # as it was taught
        self.resolved = resolved  # as trials see it
        self.outcomes: dict[str, Outcome] = {}
        self.planned = 0
        self.began = time.monotonic()
        self.remarks: list[str] = []
        self._records: list[dict[str, Any]] = []
        self._fresh = 0

    # ------------------------------------------------------------ what stands before the first trial

    @property
    def directory(self) -> RunDirectory:
        """The run directory."""
        assert self.stages.directory is not None
        return self.stages.directory

    @property
    def rows(self) -> Mapping[str, Sequence[Encoded]]:
        """The rows on which trials are measured, by split."""
        return {name: rows for name, rows in self.resolved.rows.items() if name in SPLITS}

    @cached_property
    def architecture(self) -> Any:
        """The model as modules; without weights where its files allow that."""
        from expunge.models.load import load_model, skeleton

        config = self.whole.recipe.model
        modules = skeleton(config)
        return load_model(config).model if modules is None else modules

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in self.architecture.parameters())

    @cached_property
    def variants(self) -> dict[str, Variant]:
        """Original (if it was taught here), target, and reference (if there is one)."""
        from expunge.pipeline.entries import prepare_jobs

        recipe, stages = self.whole.recipe, self.stages
        given = stages.given("original" if recipe.prepare else "target", recipe.model)
        found = {given.name: given}
        wanted = {"target": self.study.target, "reference": self.study.reference}
        for name, (_, job) in prepare_jobs(self.whole).items():
            if not wanted[name]:
                continue
            found[name] = stages.trained(f"prepare/{name}", f"models/{name}", job, given)
        if recipe.reference is not None:
            found["reference"] = stages.given("reference", recipe.reference)
        return found

    def set_aside(self, name: str, part: float = ASIDE) -> None:
        """Move the last part of the retain rows to a split of that name, unless there is one already."""
        rows = dict(self.resolved.rows)
        if name in rows:
            return
        kept, aside = put_aside(rows["retain"], part)
        if not aside:
            raise UserError(
                f"a split '{name}' can't be put aside from {len(kept)} retain rows", "give more retain rows"
            )
        self.directory.note(
            f"{name}: {len(aside)} of {len(rows['retain'])} retain rows, the last of each task, were put aside; no "
            "trial trains on them."
        )
        self.resolved = replace(self.resolved, rows={**rows, "retain": kept, name: aside})

    def measure_yardsticks(self) -> None:
        """Score original, target and reference on the rows of the trials."""
        from expunge.pipeline.trials import run_trial

        for name, variant in self.variants.items():
            self._keep(run_trial(self.stages, name, variant, self.rows), {"method": name})
        target = self.outcomes["target"]["forget"]
        if target < HARDLY:
            words = (
                f"The target hardly knew the forget rows (extraction strength {target:.3f}): little can be forgotten."
            )
            self.remarks.append(words)
            self.stages.reporter.line(f"  note: {words}")

    # ------------------------------------------------------------ trials

    def entry(self, **changes: Any) -> UnlearnConfig:
        """The study's unlearn entry with other fields; `train` may be a mapping of its fields."""
        base = self.whole.recipe.unlearn[0]
        train = changes.pop("train", {})
        return base.model_copy(update={**changes, "train": base.train.model_copy(update=train)})

    def check(self, entry: UnlearnConfig) -> None:
        """Raises UserError for an entry that training would refuse."""
        from expunge.pipeline.entries import unlearn_job
        from expunge.pipeline.preflight import check_job

        check_job(unlearn_job(self._resolved(entry), entry, self.whole.recipe.model), self.whole.recipe.model)

    def expect(self, count: int, words: str = "") -> None:
        """Say how many trials there will be."""
        self.planned = count
        line = (
            f"{self.study.name}: {count} trials{f' ({words})' if words else ''}; the first one says how long they take"
        )
        self.stages.reporter.line(line)

    def time_is_up(self) -> bool:
        """Whether no trial may begin any more (`--minutes`)."""
        limit = self.options.minutes
        return limit is not None and time.monotonic() - self.began > 60 * limit

    def run(self, trials: Sequence[Planned]) -> list[Outcome]:
        """Make the trials in order; those that were made before are found. Stops where the time is used up."""
        made = []
        for trial in trials:
            if trial.name in self.outcomes:
                made.append(self.outcomes[trial.name])
                continue
            if self.time_is_up():
                break
            made.append(self._run(trial))
        return made

    def _run(self, trial: Planned) -> Outcome:
        from expunge.pipeline.trials import run_trial

        inner = self._inner(trial)
        job = inner.job(trial.entry, self.variants["target"], self._lacking)
        return self._told(run_trial(inner, trial.name, self.variants["target"], self.rows, job), trial.about)

    def checkpoint(self, trial: Planned) -> Variant | None:
        """A trial whose model is kept, in `zoo/`, for what is to be done to it; None if its training broke off."""
        made = self.trained(trial, f"zoo/{trial.name}")
        return None if made is None else self.scored(trial.name, made, trial.about)

    def scored(self, name: str, made: Variant, about: Mapping[str, Any]) -> Variant:
        """Score a model that was made as a trial, and count it as one."""
        from expunge.pipeline.trials import run_trial

        scored = run_trial(self.stages, name, made, self.rows)
        self._told(replace(scored, seconds=scored.seconds + made.seconds), about)
        return made

    def trained(self, trial: Planned, place: str, recorder: Recorder | None = None) -> Variant | None:
        """The model of a trial, kept in `place`; None, and a remark, if its training broke off."""
        from expunge.pipeline.trainer import DivergedError

        inner = self._inner(trial)
        job = inner.job(trial.entry, self.variants["target"], self._lacking)
        try:
            return inner.trained(place, place, job, self.variants["target"], recorder=recorder)
        except DivergedError as error:
            self.remarks.append(f"{trial.name} broke off: {error.message}")
            return None

    def job(self, trial: Planned, start: Variant) -> Job:
        """The training of a trial from another model than the target."""
        return self._inner(trial).job(trial.entry, start, self._lacking)

    def steps(self, entry: UnlearnConfig) -> int:
        """Optimizer steps of the training that an entry asks for."""
        from expunge.pipeline.entries import unlearn_job
        from expunge.pipeline.stages import training_steps

        return training_steps(unlearn_job(self._resolved(entry), entry, self.whole.recipe.model))

    def _inner(self, trial: Planned) -> Stages:
        """The stages of one trial, with its objective built."""
        from expunge.pipeline.stages import Stages

        return Stages(self._resolved(trial.entry), self.directory, self.stages.root, self.stages.reporter)

    def _told(self, result: TrialResult, about: Mapping[str, Any]) -> Outcome:
        outcome = self._keep(result, about)
        if not result.skipped:
            self._fresh += 1
            self.stages.reporter.line(f"    {self._said(outcome)}{self._left()}")
        return outcome

    def _resolved(self, entry: UnlearnConfig) -> Resolved:
        from expunge.methods.base import build_objective
        from expunge.pipeline.entries import beside

        objective = build_objective(entry.method, entry.parameters)
        found = self.resolved
        made = beside(entry, objective, found.recipe, found.rows, found.tokenizer, found.template)
        return replace(found, objectives={entry.name: objective}, beside={entry.name: made})

    def _lacking(self, tokens: TokenSelection) -> Variant:
        """The model that lacks the knowledge, for token selection."""
        from expunge.pipeline.beforehand import SELECTOR
        from expunge.recipe import ModelConfig

        known = self.variants.get(tokens.model)
        return known or self.stages.given(SELECTOR, ModelConfig(id=tokens.model))

    def _keep(self, result: TrialResult, about: Mapping[str, Any]) -> Outcome:
        """The trial's strengths, from its score tables."""
        from expunge.metrics.base import Resampling, TableShelf, evaluate_metrics

        recipe = self.whole.recipe
        strengths = {}
        for split in self.rows if not result.failed else ():
            role = "forget" if split == "forget" else "retain"
            shelf = TableShelf({(result.name, split, "scores"): result.table(split)})
            resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
            (record,), _ = evaluate_metrics(shelf, role, [METRIC], resampling, result.name, split)
            self._records.append(record)
            if record["value"] is not None:
                strengths[split] = Strength(record["value"], record["ci_low"], record["ci_high"])
        found = Outcome(result.name, about, strengths, result.seconds, result.steps, result.note, result.failed)
        self.outcomes[result.name] = found
        return found

    # ------------------------------------------------------------ progress

    @property
    def trials(self) -> list[Outcome]:
        """The trials so far, yardsticks left out."""
        return [outcome for name, outcome in self.outcomes.items() if name not in self.variants]

    def _said(self, outcome: Outcome) -> str:
        if outcome.failed:
            return f"broke off: {outcome.failed}"
        return " · ".join(f"{split} {strength.value:.3f}" for split, strength in outcome.strengths.items())

    def _left(self) -> str:
        """What is still to come, by the mean time of the trials so far."""
        done = self.trials
        rest = self.planned - len(done)
        if rest <= 0:
            return ""
        mean = sum(outcome.seconds for outcome in done) / len(done)
        first = f"a trial takes {duration(mean)}, so all take" if self._fresh == 1 else "about"
        words = duration(60 * max(1, round(mean * rest / 60))) if mean * rest > 90 else duration(mean * rest)
        return f"   [{len(done)}/{self.planned}] {first} {words}{' more' if self._fresh == 1 else ' left'}"

    # ------------------------------------------------------------ the end

    def close(self, document: Document) -> StudyResult:
        """Write study.json, trials.parquet, metrics.json and the page."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from expunge.report.document import STUDY
        from expunge.report.document_page import build_document_report
        from expunge.runs.atomic import write_bytes, write_json

        directory = self.directory
        write_json(directory.path / "metrics.json", self._records)
        lines = [_row(outcome) for outcome in self.outcomes.values()]
        columns = list(dict.fromkeys(name for line in lines for name in line))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({name: [line.get(name) for line in lines] for name in columns}), sink)
        write_bytes(directory.path / "trials.parquet", sink.getvalue().to_pybytes())
        write_json(directory.path / STUDY, document.to_json())
        models = {v.name: {"source": v.config.id, "digest": v.digest} for v in self.variants.values()}
        methods = list(dict.fromkeys(str(outcome.about["method"]) for outcome in self.trials))
        directory.record(models=models, methods=methods, result=document.results.get("trial") or document.name)
        directory.finish()
        report = build_document_report(directory.path, STUDY)
        return StudyResult(directory.path, report, document, directory.skipped_all)


def _row(outcome: Outcome) -> dict[str, Any]:
    """A line of trials.parquet."""
    row: dict[str, Any] = {"trial": outcome.name, **outcome.about}
    for split, strength in outcome.strengths.items():
        row |= {split: strength.value, f"{split}_low": strength.low, f"{split}_high": strength.high}
    return {**row, "seconds": outcome.seconds, "steps": outcome.steps, "note": outcome.note, "failed": outcome.failed}


@contextmanager
def open_ground(
    study: Study, options: StudyOptions, recipe: Recipe, output: Path, reporter: Reporter
) -> Iterator[Ground]:
    """The ground of a study in its run directory. Raises UserError before anything is written."""
    from expunge.pipeline.processes import process_count
    from expunge.pipeline.progress import quiet_libraries
    from expunge.pipeline.resolve import resolve
    from expunge.pipeline.stages import Stages
    from expunge.runs.store import RunDirectory

    if process_count() > 1:
        raise UserError("studies run in one process", "start it without accelerate launch or torchrun")
    quiet_libraries()
    output = output.absolute()
    _check_folder(output)
    resolved = resolve(recipe)
    with RunDirectory(output, recipe) as directory:
        directory.record(data=resolved.data_record())
        for note in resolved.notes():
            directory.note(note)
            reporter.line(f"  note: {note}")
        yield Ground(study, options, resolved, Stages(resolved, directory, output, reporter))


def _check_folder(output: Path) -> None:
    """Raises UserError for the folder of a run that is no study; studies share what they teach in one."""
    from expunge.runs.record import NAME, read_record

    if not (output / NAME).is_file():
        return
    name = str(read_record(output / NAME).get("name"))
    if name not in STUDIES:
        raise UserError(f"{output} holds the run '{name}', which is no study", "choose another folder with -o")
