"""Evaluation of models that exist already: the same passes and metrics as in a run, without a recipe."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import expunge
from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.errors import UserError
from expunge.metrics.base import METRICS, Resampling
from expunge.models.load import model_digest, resolve_folder
from expunge.numbers import HARDLY
from expunge.pipeline.aggregates import official
from expunge.pipeline.asked import Asked, Exam, ask, exam_of
from expunge.pipeline.depth import write_layers, write_weights
from expunge.pipeline.evaluate import (
    MAIN,
    STATES,
    FolderShelf,
    LazyModel,
    measure,
    not_measured,
    write_generations,
    write_scores,
)
from expunge.pipeline.lm_eval import lm_eval_records, run_tasks
from expunge.pipeline.preflight import Candidate, check_context, open_candidate, other_token
from expunge.pipeline.processes import process_count, process_rank
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig
from expunge.runs.atomic import disk_errors, write_json
from expunge.runs.output import check_output, whole_folder

RECORD = "evaluation.json"
#: Folder of an unfinished evaluation with a file for each finished pass.
DONE = ".done"


@dataclass(frozen=True)
class Examination:
    """What an evaluation found: records, official numbers of a benchmark, and what could not be measured."""

    records: list[dict[str, Any]]
    aggregates: list[dict[str, Any]]
    left_out: dict[str, str]
    convention: str


def examine(
    models: Mapping[str, ModelConfig],
    data: DataConfig,
    config: EvaluateConfig,
    seed: int,
    output: Path | None,
    reporter: Reporter,
) -> Examination:
    """Every model × split × metric; `output` keeps the tables, metrics.json and aggregates.json. Raises UserError."""
    quiet_libraries()
    if output is not None:
        check_output(output, RECORD)
    exam = exam_of(config, data.benchmark)
    splits = load_splits(data, seed, unlearns=False)
    for note in splits.notes:
        reporter.line(f"  note: {note}")
    candidates = {name: open_candidate(given) for name, given in models.items()}
    _note_other_tokenizers(candidates, reporter)
    with ExitStack() as stack:
        if output is not None and process_rank() == 0:
            about = {"schema": "expunge.eval/1", "expunge": expunge.__version__, "models": models, "data": data}
            settings = {"evaluate": exam.config, "convention": exam.convention, "seed": seed}
            rows = {split.name: {"rows": len(split), "role": split.role} for split in splits}
            metrics = {name: METRICS.get(name).describe() for name in exam.metrics}
            known = {"splits": rows, "metrics": metrics}
            made_of = _digest(candidates, splits, exam, data)
            folder = stack.enter_context(whole_folder(output, RECORD, {**about, **settings, **known}, made_of))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expunge-")))
        stack.enter_context(disk_errors(folder))
        tasks: list[dict[str, Any]] = []
        for name, candidate in ordered(candidates):
            asked = ask(exam, splits, candidate.tokenizer, data)
            tasks += _write_passes(name, candidate, asked, folder, reporter, "target" in candidates)
        shutil.rmtree(folder / "scores" / "target" / STATES, ignore_errors=True)
        shutil.rmtree(folder / DONE, ignore_errors=True)
        _look_inside(candidates, exam, splits, data, folder, reporter)
        shelf, resampling = FolderShelf(folder), Resampling(config.bootstrap, seed)
        records, values = measure(models, splits, shelf, exam, resampling)
        for note in warnings(records):
            reporter.line(f"  note: {note}")
        left_out = not_measured(models, splits, shelf, exam, records)
        records += tasks
        aggregates = official(exam, models, splits, records, values)
        write_json(folder / "metrics.json", records)
        write_json(folder / "aggregates.json", aggregates)
        write_json(folder / "left_out.json", left_out)
        pq.write_table(values, folder / "values.parquet")
    return Examination(records, aggregates, left_out, exam.convention.name)


def warnings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on what makes numbers worthless: models that give none, and a target that never knew the rows."""
    said = []
    main = {(r["variant"], r["split"]): r for r in records if r["metric"] == MAIN}
    for variant in dict.fromkeys(variant for variant, _ in main):
        mine = [record for (name, _), record in main.items() if name == variant]
        if not any(record["n"] for record in mine) and any(record["unscored"] for record in mine):
            rows = sum(record["unscored"] for record in mine)
            said.append(f"{variant} gives no numbers on any of {rows} rows: its weights are broken (NaN)")
    target = main.get(("target", "forget"))
    if target is not None and target["value"] is not None and target["value"] < HARDLY:
        said.append(
            f"the target hardly knows the forget rows (extraction strength {target['value']:.3f}): other rows, or "
            "another template than in its training? (--template)"
        )
    return said


def ordered(candidates: Mapping[str, Candidate]) -> list[tuple[str, Candidate]]:
    """The target first: the others' drift is measured from what it says."""
    return sorted(candidates.items(), key=lambda item: item[0] != "target")


def _write_passes(
    name: str, candidate: Candidate, asked: Asked, folder: Path, reporter: Reporter, has_target: bool
) -> list[dict[str, Any]]:
    """Both passes of one model, over rows in its own tokens; records of the lm-eval tasks that are asked for."""
    check_context(candidate, asked.scores)
    for note in asked.notes():
        reporter.line(f"  note: {note}")
    config = asked.exam.config
    model = LazyModel(candidate.config, config.dtype)
    drift = has_target and "divergence" in asked.exam.tables
    states = folder / "scores" / "target" / STATES
    if not _is_done(folder, f"scores-{name}"):
        with reporter.bar(f"scores/{name}", sum(map(len, asked.scores.values()))) as tick:
            keep, compared = drift and name == "target", states if drift and name != "target" else None
            compared = compared if compared is not None and compared.is_dir() else None
            write_scores(model, asked.scores, config, folder / "scores" / name, tick, keep, compared)
        _mark(folder, f"scores-{name}")
    if config.generate is not None and asked.generations and not _is_done(folder, f"generations-{name}"):
        with reporter.bar(f"generations/{name}", sum(map(len, asked.generations.values()))) as tick:
            write_generations(model, asked.generations, config, folder / "generations" / name, tick)
        _mark(folder, f"generations-{name}")
    if not config.lm_eval:
        return []
    with reporter.bar(f"lm-eval/{name}", 1) as tick:
        loaded = model.loaded
        try:
            found = run_tasks(loaded.model, loaded.tokenizer, config.lm_eval, batch_size=config.batch_size)
        except UserError as error:  # the rest was measured, and stays
            reporter.line(f"  note: lm-eval: {error.message}; {error.hint}")
            return []
        tick(1)
    return lm_eval_records(found, name)


def _digest(candidates: Mapping[str, Candidate], splits: Splits, exam: Exam, data: DataConfig) -> str:
    """What the passes are made of: models, rows, and how they are asked."""
    whole = hashlib.sha256(repr((exam.config, exam.convention, sorted(exam.tables), data)).encode())
    for name, candidate in candidates.items():
        whole.update(f"{name} {model_digest(resolve_folder(candidate.config.id, candidate.config.revision))}".encode())
    for split in splits:
        whole.update(repr(split).encode())
    return whole.hexdigest()


def _is_done(folder: Path, name: str) -> bool:
    """Whether an interrupted process made this pass. Several processes share every pass, and make it again."""
    return process_count() == 1 and (folder / DONE / name).is_file()


def _mark(folder: Path, name: str) -> None:
    (folder / DONE).mkdir(exist_ok=True)
    (folder / DONE / name).touch()


def _look_inside(
    candidates: Mapping[str, Candidate], exam: Exam, splits: Splits, data: DataConfig, folder: Path, reporter: Reporter
) -> None:
    """Tables of weights and layers, where the exam wants them and the models beside are there."""
    models = {name: candidate.config for name, candidate in candidates.items()}
    if process_rank() != 0 or "target" not in models:
        return
    if "weights" in exam.tables:
        for name, problem in write_weights(models, folder / "weights", reporter).items():
            reporter.line(f"  note: weights of {name}: {problem}")
    if "layers" in exam.tables and "reference" in models and "forget" in splits and splits["forget"].evaluated:
        rows = ask(exam, splits, candidates["target"].tokenizer, data).scores["forget"]
        entities = FolderShelf(folder).find("target", "forget", "scores")
        try:
            write_layers(models, exam.config.dtype, rows, entities, folder / "layers", reporter)
        except UserError as error:
            reporter.line(f"  note: layers: {error.message}")


def _note_other_tokenizers(candidates: Mapping[str, Candidate], reporter: Reporter) -> None:
    """Each model reads the rows in its own tokens, which a reader of the numbers must know."""
    (first, one), *others = candidates.items()
    for name, two in others:
        token = other_token(one.tokenizer, two.tokenizer)
        if token is not None:
            reporter.line(
                f"  note: {first} and {name} have different tokenizers ({token}): numbers per token differ in unit"
            )
