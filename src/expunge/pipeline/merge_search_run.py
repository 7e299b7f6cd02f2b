"""`expunge merge --search`: models and rows are checked, merges are measured and kept, and the best one is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import expunge
from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.errors import UserError
from expunge.merging.inputs import Full, Inputs, open_inputs
from expunge.merging.run import MergeResult, check_apart, merge_models
from expunge.merging.writer import check_output, check_room
from expunge.pipeline.merge_search import Found, Goal, Searching, named
from expunge.pipeline.merge_search_bench import Bench, Journal, inputs_digest
from expunge.pipeline.merge_search_rows import SearchRows, search_rows
from expunge.pipeline.merge_search_space import Space, check_alone
from expunge.pipeline.preflight import check_context, check_same_tokens, open_candidate
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.recipe import DataConfig, EvaluateConfig, MergeConfig, ModelConfig
from expunge.report.search_page import setting_words, write_search_page
from expunge.report.search_record import NAME, PAGE, Search, Tried
from expunge.report.text import human, number, percent
from expunge.runs.atomic import disk_errors, write_json
from expunge.runs.lock import NAME as LOCK
from expunge.runs.lock import FolderLock

#: Beside OUT, what the search has measured and found: a search that is started again goes on from there.
FOLDER, JOURNAL = ".search", "trials.jsonl"
_OURS = {NAME, PAGE, JOURNAL, LOCK}


@dataclass(frozen=True)
class Question:
    """What is to be merged, and on which rows it is searched."""

    models: Sequence[str]
    base: str | None
    reference: ModelConfig | None
    merge: MergeConfig  # with `search`
    model: ModelConfig  # permissions of loading
    data: DataConfig
    evaluate: EvaluateConfig
    seed: int  # of a benchmark that is generated
    options: Mapping[str, Any]  # of the merge that is written, beside the plan


def search_merge(question: Question, output: Path, reporter: Reporter) -> tuple[Search, MergeResult]:
    """Search, and write the best merge to `output` with its record and page; what was measured is kept beside it.

    Raises UserError for models, rows and places that don't fit, before anything is measured.
    """
    quiet_libraries()
    check_alone()
    check_output(output)
    space = Space(question.merge, len(question.models))
    splits = load_splits(question.data, question.seed)
    opened = open_inputs(question.models, question.base)
    try:
        if opened.base is None:
            raise UserError("a search needs the model before unlearning", "say it with --base")
        check_apart(opened, output)
        check_room(output, sum(info.nbytes for info in opened.tensors().values()))
        rows = _rows(question, splits, opened)
        place = output.absolute().with_name(f"{output.absolute().name}{FOLDER}")
        names = [str(model) for model in question.models]
        with _kept(place):
            found = choose(space, opened, rows, question.model, question.reference, place, reporter, names)
            for note in found.notes:
                reporter.line(f"  note: {note}")
            with reporter.bar("merge", 1) as tick:
                made = write_chosen(found, question.models, output, str(opened.base.folder), place, question.options)
                tick(1)
    finally:
        opened.close()
    return found, made


def choose(
    space: Space, opened: Inputs, rows: SearchRows, base: ModelConfig, reference: ModelConfig | None, folder: Path,
    reporter: Reporter, names: Sequence[str],
) -> Search:  # fmt: skip
    """Measure and choose; journal, record and page are written into `folder`. Raises UserError."""
    inputs = inputs_digest(opened, rows, reference)
    journal = Journal(folder / JOURNAL, inputs)
    search = space.search
    each = sum(map(len, rows.rows.values()))
    merges = 1 + space.models + (6 if space.has_line else 0) + search.trials
    with reporter.bar("search", each * (merges + rows.needs_reference)) as tick:
        bench = Bench(opened, rows, base, reference, journal, tick, search.memory, search.seed)
        beside = bench.reference() if rows.needs_reference else None
        found = Searching(space, rows, bench.measure, beside).run()
        bench.close()
    record = _record(found, space, opened, rows, reference, names, inputs)
    write_json(folder / NAME, record.to_json())
    write_search_page(folder, record)
    return record


def write_chosen(
    record: Search, models: Sequence[str | Path], output: Path, base: str, folder: Path, options: Mapping[str, Any]
) -> MergeResult:
    """The chosen merge as a checkpoint, with what `choose` wrote into `folder` beside it."""
    best = record.best
    return merge_models(
        models,
        output,
        base=base,
        method=best.method,
        weights=best.weights,
        density=best.density,
        parameters=best.parameters,
        beside=[folder / NAME, folder / PAGE],
        **options,
    )


def _rows(question: Question, splits: Splits, opened: Inputs) -> SearchRows:
    """The rows in the base's tokens. Raises UserError where a model would read them otherwise."""
    assert opened.base is not None
    assert question.merge.search is not None
    candidate = open_candidate(question.model.model_copy(update={"id": str(opened.base.folder), "revision": None}))
    for source in opened.models:
        if isinstance(source, Full) and (source.folder / "tokenizer_config.json").is_file():
            other = question.model.model_copy(update={"id": str(source.folder), "revision": None})
            check_same_tokens(candidate, other, "the model")
    if question.reference is not None:
        check_same_tokens(candidate, question.reference, "the reference")
    rows = search_rows(
        question.merge.search, splits, candidate.tokenizer, question.data, question.evaluate,
        question.reference is not None,
    )  # fmt: skip
    check_context(candidate, rows.rows)
    return rows


def _record(
    found: Found, space: Space, opened: Inputs, rows: SearchRows, reference: ModelConfig | None, names: Sequence[str],
    inputs: str,
) -> Search:  # fmt: skip
    assert opened.base is not None
    search = space.search
    return Search(
        expunge=expunge.__version__,
        base=opened.base.label,
        models=list(names),
        reference=reference.id if reference is not None and rows.needs_reference else None,
        aims=[str(aim) for aim in rows.aims],
        keep=[str(keep) for keep in rows.keep],
        wanted=dict(found.goal.wanted),
        least=found.goal.least,
        methods=space.methods,
        over=list(search.over) if search.trials else ["weights"],
        rows={name: len(some) for name, some in rows.rows.items()},
        against=rows.against,
        unused=list(rows.unused),
        tried=found.tried,
        chosen=found.chosen,
        line=found.line,
        trials=search.trials,
        minutes=search.minutes,
        seed=search.seed,
        dtype=rows.evaluate.dtype,
        convention=rows.convention.name,
        notes=[*rows.notes, *found.notes],
        answer=_answer(found.tried[found.chosen], found.goal, names),
        inputs=inputs,
    )


def _answer(best: Tried, goal: Goal, names: Sequence[str]) -> str:
    """What was found, in a sentence."""
    aims, keeps = [], []
    for aim in goal.rows.aims:
        side = "" if aim.side == "=" else f"{aim.side} "
        found, wanted = best.values[named(aim)].value, goal.wanted[named(aim)]
        aims.append(f"{_words(aim.split, aim.metric)} is {number(found)} (aim: {side}{number(wanted)})")
    for keep in goal.rows.keep:
        part = percent(best.kept[named(keep)])
        keeps.append(f"{part} of the target's {_words(keep.split, keep.metric)} (wanted: {percent(keep.part)})")
    merge = setting_words(best, names)
    if best.met:
        return f"{merge}: {', '.join(aims)}, and it keeps {', '.join(keeps)}"
    return (
        f"no merge that was tried keeps enough; the nearest to it, {merge}, keeps {', '.join(keeps)}: {', '.join(aims)}"
    )


def _words(split: str, metric: str) -> str:
    return f"{human(split).lower()} {human(metric).lower()}"


@contextmanager
def _kept(place: Path) -> Iterator[None]:
    """The folder beside the output, for as long as it is written to. Raises UserError if it holds something else."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"{place} is in the way", "move it, or choose another folder with -o")
    if place.is_dir():
        foreign = sorted({entry.name for entry in place.iterdir() if not entry.name.endswith(".tmp")} - _OURS)
        if foreign:
            raise UserError(f"{place} holds something else ({foreign[0]})", "choose another folder with -o")
    with disk_errors(place.parent):
        made = not place.exists()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{place} can't be made: {error.strerror}", "choose another folder with -o") from None
    lock = FolderLock(place)
    try:
        yield
    except BaseException:
        if made and not (place / JOURNAL).exists():
            shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        lock.release()
        with suppress(OSError):
            (place / LOCK).unlink()
