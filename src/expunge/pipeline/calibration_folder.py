"""`expunge calibrate`: models and rows are checked, passes are kept as they come, and the mixed model is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.errors import UserError
from expunge.merging.adapters import Adapter
from expunge.merging.inputs import Full, Inputs, resolve
from expunge.merging.run import merge_models
from expunge.merging.writer import RECORD as MERGE_RECORD
from expunge.merging.writer import check_output
from expunge.metrics.base import Resampling
from expunge.models.mixture import Mixture
from expunge.pipeline.asked import Exam, ask, exam_of
from expunge.pipeline.calibrate import Settings, both, calibrated, mixture_of
from expunge.pipeline.calibration_passes import FORGET, PARAPHRASE, RETAIN, CalibrationRows, Passes
from expunge.pipeline.preflight import Candidate, check_context, check_same_tokens, open_candidate
from expunge.pipeline.processes import process_count
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.pipeline.resolve import rows_digest
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig
from expunge.report.calibration_record import NAME, Calibration, read_calibration
from expunge.runs.atomic import disk_errors, write_json
from expunge.runs.lock import NAME as LOCK
from expunge.runs.lock import FolderLock
from expunge.runs.provenance import file_digest

#: Inside the folder: the passes that were made, whatever became of the search, and the calibrated model; and what
#: `expunge report` adds.
PASSES, MODEL = "passes.json", "model"
_OURS = {PASSES, NAME, MODEL, f"{MODEL}.partial", "report.html"}


@dataclass(frozen=True)
class Question:
    """What is to be calibrated, on which rows."""

    target: ModelConfig
    unlearned: ModelConfig
    data: DataConfig
    evaluate: EvaluateConfig
    settings: Settings


def calibrate(question: Question, output: Path | None, reporter: Reporter) -> Calibration:
    """Calibrate, and write record and model to `output`; what an earlier try has passed is not passed again.

    Raises UserError for models, rows and places that don't fit, before anything is passed.
    """
    quiet_libraries()
    question.settings.check()
    if process_count() > 1:
        raise UserError("calibration runs in one process", "start it without accelerate launch or torchrun")
    if output is not None:
        _check_place(output)
    with both(question.target, question.unlearned) as opened:
        notes = _check_base(opened)
        if output is not None:
            _check_apart(opened, output)
        exam = exam_of(question.evaluate, question.data.benchmark)
        rows, noted = _rows(question, opened, exam)
        for note in (*notes, *noted):
            reporter.line(f"  note: {note}")
        settings = replace(question.settings, convention=exam.convention)
        digest = _digest(opened, rows, question.evaluate, exam)
        with ExitStack() as stack:
            stored = _Stored(None, digest) if output is None else stack.enter_context(_stored(output, digest))

            @cache
            def mixture() -> Mixture:
                reporter.line("  loading the target")
                return mixture_of(opened, question.target, question.evaluate.dtype)

            with reporter.bar("passes", _most_rows(rows, settings)) as tick:
                passes = Passes(
                    mixture,
                    rows,
                    batch_size=question.evaluate.batch_size,
                    convention=exam.convention,
                    known=stored.read(),
                    on_pass=stored.write,
                    tick=tick,
                )
                resampling = Resampling(question.evaluate.bootstrap, settings.seed)
                found = calibrated(passes, settings, resampling, question.target.id, question.unlearned.id)
            for note in found.notes:
                reporter.line(f"  note: {note}")
            mixture.cache_clear()  # the model's memory is free while the result is written
            found = found.model_copy(update={"notes": [*notes, *noted, *found.notes], "inputs": digest})
            return found if output is None else _written(found, opened, output, reporter)


def _rows(question: Question, opened: Inputs, exam: Exam) -> tuple[CalibrationRows, list[str]]:
    """Retain and forget rows in the target's tokens, and what a reader should know of them."""
    assert opened.base is not None
    config = question.target.model_copy(update={"id": str(opened.base.folder), "revision": None})
    candidate: Candidate = open_candidate(config)
    source = opened.models[0]
    if isinstance(source, Full) and (source.folder / "tokenizer_config.json").is_file():
        other = question.unlearned.model_copy(update={"id": str(source.folder), "revision": None})
        check_same_tokens(candidate, other, "the unlearned model")
    splits = load_splits(question.data, question.settings.seed)
    retain = _retain_split(splits)
    two = Splits({name: replace(splits[name], evaluated=True) for name in (FORGET, retain)})
    plain = exam.config.model_copy(update={"generate": None})
    needed = frozenset({"scores", "scores/paraphrase"})
    asked = ask(Exam(plain, exam.metrics, needed, exam.convention), two, candidate.tokenizer, question.data)
    check_context(candidate, asked.scores)
    notes = [note for note in asked.notes() if not note.startswith(f"{retain}@")]
    if question.data.benchmark is not None and splits[retain].name == RETAIN:
        notes.append(
            "the retain rows are those that unlearning may have trained on; held-out rows are the better judge"
        )
    paraphrase = asked.scores.get(PARAPHRASE, ())
    return CalibrationRows(
        asked.scores[retain], asked.scores[FORGET], paraphrase, {RETAIN: retain, FORGET: FORGET}
    ), notes


def _retain_split(splits: Splits) -> str:
    """The held-out retain rows if there are any, else the first evaluated retain rows."""
    names = [split.name for split in splits if split.role == "retain" and len(split)]
    held_out = [name for name in names if name == "retain_unseen" or splits[name].evaluated]
    chosen = sorted(held_out, key=lambda name: (name != "retain_unseen", name == RETAIN)) or names
    if not chosen:
        raise UserError(
            "there are no retain rows, so there is nothing to keep",
            "give rows that unlearning never saw: --retain FILE",
        )
    return chosen[0]


def _check_base(opened: Inputs) -> list[str]:
    """An adapter must stand on the target: what it says its base is, is compared. Raises UserError if it is another."""
    source, target = opened.models[0], opened.base
    assert target is not None
    if not isinstance(source, Adapter):
        return []
    if source.base is None:
        return [f"the adapter {source.label} does not say what its base is: the target is taken for it"]
    try:
        base = resolve(source.base, source.folder, source.revision)
    except UserError:
        return [f"the base of {source.label} ({source.base}) is not there: the target is taken for it"]
    if base.resolve() == target.folder.resolve():
        return []
    theirs = [file_digest(file) for file in sorted(base.glob("*.safetensors"))]
    if theirs != [file_digest(file) for file in target.files]:
        raise UserError(
            f"the adapter {source.label} was trained on {base}, which is not the target",
            f"give that as --target, or fold it first: expunge merge {source.label} --method linear -o FOLDED",
        )
    return []


def _digest(opened: Inputs, rows: CalibrationRows, evaluate: EvaluateConfig, exam: Exam) -> str:
    """sha256 of all that strengths depend on: weights, rows, dtype and convention."""
    about = {
        "models": [[file_digest(file) for file in source.files] for source in opened.sources],
        "configs": [_config(source.folder) for source in opened.sources],
        "rows": {name: rows_digest(some) for kind in (RETAIN, FORGET) for name, some in rows.of(kind).items()},
        "ids": [row.example.id for kind in (RETAIN, FORGET) for some in rows.of(kind).values() for row in some],
        "dtype": evaluate.dtype,
        "convention": repr(exam.convention),
    }
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _config(folder: Path) -> list[str]:
    return [file_digest(folder / name) for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]


def _most_rows(rows: CalibrationRows, settings: Settings) -> int:
    """Rows of all passes, should none be saved."""
    forget = len(rows.forget) + len(rows.paraphrase)
    return len(rows.retain) * (16 if settings.curve else 9) + forget * (10 if settings.curve else 3)


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Stored:
    """passes.json: strength per example by α and kind, written after every pass."""

    folder: Path | None
    digest: str

    def read(self) -> dict[tuple[float, str], np.ndarray]:
        """What an earlier try with the same models and rows has measured."""
        if self.folder is None or (content := _content(self.folder / PASSES)).get("inputs") != self.digest:
            return {}
        return {
            (float(entry["alpha"]), str(entry["kind"])): np.array(
                [np.nan if value is None else value for value in entry["values"]], dtype=np.float64
            )
            for entry in content["passes"]
        }

    def write(self, passes: Passes) -> None:
        """Keep all that is known by now."""
        if self.folder is None:
            return
        made = [
            {"alpha": alpha, "kind": kind, "values": values.tolist()}
            for (alpha, kind), values in sorted(passes.known.items(), key=lambda item: item[0])
        ]
        content = {"made_by": "expunge calibrate", "inputs": self.digest, "passes": made}
        write_json(self.folder / PASSES, content)


@contextmanager
def _stored(output: Path, digest: str) -> Iterator[_Stored]:
    """The folder for as long as it is written to; results of other inputs are removed."""
    with disk_errors(output):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output} can't be made: {error.strerror}", "choose another folder with -o") from None
        lock = FolderLock(output)
        try:
            if _content(output / PASSES).get("inputs") != digest:
                _remove_result(output)
                write_json(output / PASSES, {"made_by": "expunge calibrate", "inputs": digest, "passes": []})
            yield _Stored(output, digest)
        finally:
            lock.release()
            with suppress(OSError):
                (output / LOCK).unlink()


def _written(found: Calibration, opened: Inputs, output: Path, reporter: Reporter) -> Calibration:
    """The model, unless it is there already, and then the record that names it."""
    place = output / MODEL
    if not _is_there(found, output):
        _remove_result(output)
        if found.alpha > 0:
            with reporter.bar("calibrated model", 1) as tick:
                write_mixed(opened, found.alpha, place)
                tick(1)
    found = found.model_copy(update={"model": str(place) if found.alpha > 0 else None})
    write_json(output / NAME, found.to_json())
    return found


def write_mixed(opened: Inputs, alpha: float, place: Path) -> None:
    """θ(α) as a whole checkpoint, streamed tensor by tensor; 0 < α ≤ 1."""
    source, base = opened.models[0], opened.base
    assert base is not None
    if alpha == 1 and isinstance(source, Full):
        merge_models([source.folder], place, method="linear")  # bit by bit what it was: no difference is taken
        return
    options: dict[str, Any] = {"weights": [alpha], "parameters": {"normalize": False}}
    merge_models([source.folder], place, base=base.folder, method="linear", **options)


def _is_there(found: Calibration, output: Path) -> bool:
    """Whether the folder holds the result for the same models, rows and α."""
    try:
        earlier = read_calibration(output)
    except UserError:
        return False
    whole = (output / MODEL / MERGE_RECORD).is_file() == (found.alpha > 0)
    return whole and (earlier.inputs, earlier.alpha) == (found.inputs, found.alpha)


def _remove_result(output: Path) -> None:
    (output / NAME).unlink(missing_ok=True)
    if (output / MODEL).is_dir():
        check_output(output / MODEL)
        shutil.rmtree(output / MODEL)


def _check_place(output: Path) -> None:
    """Raises UserError if `output` is a file, or a folder that holds anything but an earlier calibration."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} is a file, not a folder", "choose another folder with -o")
    if not output.is_dir():
        return
    present = {entry.name for entry in output.iterdir() if not entry.name.startswith(".")}
    foreign = sorted(present - (_OURS if _content(output / PASSES) else set()))
    if foreign:
        raise UserError(f"{output} holds something else ({foreign[0]})", "choose a new or empty folder with -o")
    check_output(output / MODEL)


def _check_apart(opened: Inputs, output: Path) -> None:
    """Raises UserError if the result would lie in one of the models, or the other way round."""
    place = output.resolve()
    for source in opened.sources:
        folder = source.folder.resolve()
        if place == folder or folder in place.parents or place in folder.parents:
            raise UserError(
                f"{output} and the model {source.label} are in each other's way", "choose another folder with -o"
            )


def _content(path: Path) -> Mapping[str, Any]:
    """passes.json, empty where there is none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = isinstance(content, dict) and content.get("made_by") == "expunge calibrate"
    return content if ours and isinstance(content.get("passes"), list) else {}
