"""Attacks on a model, and on target and reference beside it: every metric again, with the control line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

import expunge
from expunge.attacks.base import ATTACKS, Attack, TrainingAttack, World, build_attack
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example, Splits
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.errors import UserError, did_you_mean
from expunge.metrics.base import Resampling
from expunge.models.drift import open_tensors
from expunge.models.files import is_adapter
from expunge.models.load import load_model, model_digest, resolve_folder
from expunge.models.save import save_model
from expunge.numbers import HARDLY
from expunge.pipeline.asked import Exam, Rows, exam_of, scored_views
from expunge.pipeline.attack_summary import MODEL, PointShelf, Summary, overall_verdict
from expunge.pipeline.attacked import FORGET, Attacked, Subject
from expunge.pipeline.evaluate import LazyModel, measure
from expunge.pipeline.preflight import check_context, check_same_tokens, open_candidate
from expunge.pipeline.processes import process_count
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig, Recipe, UnlearnConfig
from expunge.recipe.model import Thresholds
from expunge.report.attack_record import NAME, AttackRecord, AttackResult, holds_attack, read_attack
from expunge.report.attack_record import Subject as AttackedSubject
from expunge.runs.atomic import replacing, write_json
from expunge.runs.record import NAME as RUN
from expunge.runs.record import read_record
from expunge.runs.store import RunDirectory
from expunge.scoring.tables import SUITES, VALUES

#: Name of the run in run.json.
RUN_NAME = "attack"
_ORDER = ("behaviour", "weights", "knowledge")
_MISSING = {
    "target": "no target model was given (--target)",
    "reference": "no reference model was given (--reference)",
    "retain": "there are no retain rows (--retain)",
    "holdout": "there are no holdout rows (--holdout)",
}


def chosen_attacks(
    names: Sequence[str] | None, suite: str, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Attack]:
    """The named attacks, or those of a suite (a larger suite contains the smaller), with settings by attack.

    Raises UserError for an unknown attack or setting, and for settings of an attack that is not among them.
    """
    if names is None:
        found = [(name, entry) for name, entry in ATTACKS.items() if SUITES.index(entry.about.suite) <= _rank(suite)]
        chosen = [name for name, entry in sorted(found, key=lambda item: _ORDER.index(item[1].about.kind))]
    else:
        chosen = list(dict.fromkeys(names))
    given = settings or {}
    for name in (*chosen, *given):
        ATTACKS.get(name)
    for name in given:
        if name not in chosen:
            raise UserError(f"settings are given for attack {name}, which is not among the attacks", f"add it: {name}")
    built = [build_attack(name, given.get(name, {})) for name in chosen]
    if not built:
        raise UserError("no attack is named", "for instance: --attacks relearn,quantize (expunge list attacks)")
    for attack in built:
        attack.points()  # what a setting names may not exist
    return built


def _rank(suite: str) -> int:
    if suite not in SUITES:
        raise UserError(f"unknown suite '{suite}'", did_you_mean(suite, SUITES))
    return SUITES.index(suite)


def attack_models(
    subjects: Mapping[str, ModelConfig],
    data: DataConfig,
    attacks: Sequence[Attack],
    config: EvaluateConfig,
    seed: int,
    output: Path,
    reporter: Reporter,
    *,
    thresholds: Thresholds = Thresholds(),
    limit: int | None = None,
) -> AttackRecord:
    """Every attack's points on `model`, and on `target` and `reference` where they are given; see attack.json.

    `limit`: rows of each split but forget that are measured. What is done already is not done again. Raises UserError.
    """
    if process_count() > 1:
        raise UserError("attacks run in one process", "start it without accelerate launch or torchrun")
    quiet_libraries()
    output = output.absolute()
    _check_folder(output, subjects[MODEL])
    ground = _prepare(subjects, data, config, seed, limit)
    recipe = Recipe(
        name=RUN_NAME,
        seed=seed,
        model=subjects[MODEL],
        reference=subjects.get("reference"),
        data=data,
        unlearn=[UnlearnConfig()],
        evaluate=config,
        thresholds=thresholds,
    )
    with RunDirectory(output, recipe) as directory:
        directory.record(methods=[], result=RUN_NAME, attacks=[repr(attack) for attack in attacks])
        whole = [_subject(name, given, directory) for name, given in subjects.items()]
        world = _world(ground, seed, {subject.name: subject for subject in whole}, config.dtype)
        digests = {subject.name: subject.digest for subject in whole if subject.name != MODEL}
        attacked = Attacked(directory, ground.exam, world, ground.rows, ground.views, digests, reporter)
        runnable = [attack for attack in attacks if _can_run(attack, world, attacked, reporter)]
        if not runnable:
            reasons = "; ".join(f"{name}: {reason}" for (name, *_), reason in attacked.left_out.items())
            raise UserError(f"none of the attacks can be run ({reasons})", "give what they need, or name others")
        for subject in whole:
            _attack_subject(subject, runnable, attacked, config)
        resampling = Resampling(config.bootstrap, seed)
        names = list(subjects)
        summary = Summary(output, names, ground.splits, ground.exam, resampling, thresholds.robust_margin, attacked)
        record = _write(summary, runnable, whole, subjects, ground)
        directory.finish()
    return record


@dataclass(frozen=True)
class Ground:
    """Rows in the subjects' tokens: all of them for the attacker, and those that are measured."""

    exam: Exam
    splits: Splits
    everything: Rows
    rows: Rows
    views: Rows  # the forget rows asked in other ways, where the exam wants them
    tokenizer: Any
    encode: Callable[[Sequence[Example]], list[Encoded]]
    notes: list[str]


def _prepare(
    subjects: Mapping[str, ModelConfig], data: DataConfig, config: EvaluateConfig, seed: int, limit: int | None
) -> Ground:
    exam = exam_of(config, data.benchmark)
    splits = load_splits(data, seed)
    first = open_candidate(subjects[MODEL])
    candidates = [first, *(check_same_tokens(first, given, f"the {n}") for n, given in subjects.items() if n != MODEL)]
    template = resolve_template(exam.convention.template or data.template, first.tokenizer)

    def encoded(examples: Sequence[Example]) -> list[Encoded]:
        return encode(examples, first.tokenizer, template, data.max_length, exam.convention)

    if FORGET not in splits or not splits[FORGET].evaluated:
        named = ", ".join(split.name for split in splits if split.evaluated)
        raise UserError(
            f"benchmark {data.benchmark} has no measured rows called '{FORGET}', which attacks need (it has {named})",
            "attack the rows of a file: --forget FILE",
        )
    everything = {split.name: encoded(split.examples) for split in splits}
    rows: dict[str, list[Encoded]] = {}
    notes = []
    for split in splits:
        if split.evaluated and split.role != "utility":
            rows[split.name] = everything[split.name]
            if split.role != "forget" and limit is not None and len(split) > limit:
                rows[split.name] = everything[split.name][:limit]
                notes.append(f"{split.name}: the first {limit} of {len(split)} rows are measured")
    views = scored_views(exam, FORGET, splits[FORGET].examples, encoded)
    for candidate in candidates:
        check_context(candidate, {**rows, **views})
    return Ground(exam, splits, everything, rows, views, first.tokenizer, encoded, notes)


def _subject(name: str, config: ModelConfig, directory: RunDirectory) -> Subject:
    """A subject as a whole model; an adapter is folded once, for training starts from whole models."""
    folder = resolve_folder(config.id, config.revision)
    digest = model_digest(folder)
    if not is_adapter(folder):
        return Subject(name, config, digest)

    def fold(work: Path) -> None:
        loaded = load_model(config)
        model: Any = loaded.model
        save_model(model.merge_and_unload(), loaded.tokenizer, work / "out")

    done = directory.stage(f"fold/{name}", f"models/{name}", {"adapter": digest, "dtype": config.dtype}, fold)
    return Subject(name, config.model_copy(update={"id": str(done.path), "revision": None}), digest)


def _world(ground: Ground, seed: int, subjects: Mapping[str, Subject], dtype: str) -> World:
    def tensors(name: str) -> Callable[[str], Tensor] | None:
        return stored_tensors(subjects[name].config) if name in subjects else None

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        yield LazyModel(subjects["reference"].config, dtype).loaded.model

    return World(
        examples={name: [row.example for row in rows] for name, rows in ground.everything.items()},
        rows=ground.everything,
        tokenizer=ground.tokenizer,
        seed=seed,
        encode=ground.encode,
        target=tensors("target"),
        reference=tensors("reference"),
        open_reference=reference if "reference" in subjects else None,
    )


def stored_tensors(config: ModelConfig) -> Callable[[str], Tensor]:
    """A reader of a model's parameters by name, opened when the first is asked for. The reader raises UserError."""
    opened = cache(lambda: open_tensors(config))
    return lambda name: opened().read(name)


def _can_run(attack: Attack, world: World, attacked: Attacked, reporter: Reporter) -> bool:
    name = attack.about.name
    for need in attack.about.needs:
        if not world.has(need):
            attacked.left_out[name, "", ""] = _MISSING.get(need, f"there are no {need} rows")
            reporter.line(f"  left out: {name}: {attacked.left_out[name, '', '']}")
            return False
    return True


def _attack_subject(subject: Subject, attacks: Sequence[Attack], attacked: Attacked, config: EvaluateConfig) -> None:
    """The subject as it is and under every attack; trainings come last, when its evaluated copy has left the memory."""
    model = LazyModel(subject.config, config.dtype)
    attacked.unattacked(subject, model, any("generations" in attack.about.outputs for attack in attacks))
    for attack in attacks:
        if not isinstance(attack, TrainingAttack):
            attacked.attack(subject, attack, model)
    model = LazyModel(subject.config, config.dtype)
    for attack in attacks:
        if isinstance(attack, TrainingAttack):
            attacked.attack(subject, attack, model)


def _write(
    summary: Summary,
    attacks: Sequence[Attack],
    whole: Sequence[Subject],
    given: Mapping[str, ModelConfig],
    ground: Ground,
) -> AttackRecord:
    bare = PointShelf(summary.root)
    records, values = measure(summary.subjects, summary.splits, bare, summary.exam, summary.resampling)
    tables = [values]
    results: list[AttackResult] = []
    for attack in attacks:
        made = summary.result(attack)
        if made is not None:
            results.append(made[0])
            tables += made[1]
    verdict, reason = overall_verdict(results)
    notes = list(ground.notes)
    knew = next((result.before.strengths.get("target") for result in results), None)
    if knew is not None and knew.value < HARDLY:
        notes.append(f"the target hardly knew the forget rows (strength {knew.value:.3f}): nothing can be shown here")
    record = AttackRecord(
        expunge=expunge.__version__,
        seed=summary.resampling.seed,
        convention=summary.exam.convention.name,
        subjects={s.name: AttackedSubject(source=given[s.name].id, digest=s.digest) for s in whole},
        splits={split.name: split.role for split in summary.splits if split.name in ground.rows},
        robust_margin=summary.allowed,
        records=records,
        attacks=results,
        left_out=summary.left_out(),
        notes=notes,
        verdict=verdict,
        reason=reason,
    )
    everything = [*records, *(row for result in results for point in result.points for row in point.records)]
    write_json(summary.root / "metrics.json", everything)
    with replacing(summary.root / "values.parquet") as work:
        pq.write_table(pa.concat_tables(tables) if tables else VALUES.empty_table(), work)
    write_json(summary.root / NAME, record.to_json())
    return record


def _check_folder(output: Path, model: ModelConfig) -> None:
    """Raises UserError for the folder of another kind of run, or of attacks on another model."""
    if not (output / RUN).is_file():
        return
    elsewhere = "choose another folder with -o"
    name = str(read_record(output / RUN).get("name"))
    if name != RUN_NAME:
        raise UserError(f"{output} holds the run '{name}', which is no attack", elsewhere)
    if not holds_attack(output):
        return
    attacked = read_attack(output).subjects[MODEL]
    if attacked.digest != model_digest(resolve_folder(model.id, model.revision)):
        raise UserError(f"{output} holds the attacks on another model ({attacked.source})", elsewhere)


__all__ = ["FORGET", "attack_models", "chosen_attacks", "stored_tensors"]
