"""Everything that can be wrong is found here, before the first step: data, tokenizer, methods, metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.data.encode import Encoded, encode, truncation_note
from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.merging.plan import plan_merge
from expunge.methods.base import Objective, build_objective
from expunge.pipeline.asked import Asked, ask, exam_of
from expunge.pipeline.auto import Given, decided
from expunge.pipeline.entries import Beside, beside, check_entry, prepare_jobs, unlearn_job
from expunge.pipeline.job import Job
from expunge.pipeline.localize_check import check_recipe as check_localize
from expunge.pipeline.masked import widest_mask
from expunge.pipeline.merge_search_rows import SearchRows, search_rows
from expunge.pipeline.merge_search_space import Space, check_alone
from expunge.pipeline.preflight import check_context, check_job, check_same_tokens, open_candidate
from expunge.recipe import STRANGERS, MergeConfig, ModelConfig, Recipe, UnlearnConfig


@dataclass(frozen=True)
class Resolved:
    """A recipe with its rows in tokens and its objectives built."""

    recipe: Recipe
    splits: Splits
    rows: Mapping[str, Sequence[Encoded]]
    objectives: Mapping[str, Objective]
    beside: Mapping[str, Beside]
    tokenizer: Any
    template: Any
    asked: Asked  # what every model is asked in the end
    search: SearchRows | None = None  # what the merge is searched on, if it is
    mask: Mask | None = None  # what may change, where the recipe names a file of it
    decisions: Sequence[str] = ()  # what was chosen for entries that say `auto`

    def data_record(self) -> dict[str, dict[str, Any]]:
        """Rows, role, digest and cuts of each split, for run.json."""
        return {
            split.name: {
                "rows": len(split),
                "role": split.role,
                "digest": rows_digest(self.rows[split.name]),
                "truncated": sum(row.truncated > 0 for row in self.rows[split.name]),
            }
            for split in self.splits
        }

    def notes(self) -> list[str]:
        """Sentences on what was cut."""
        noted = ((name, truncation_note(rows)) for name, rows in self.rows.items())
        return [*(f"{name}: {note}" for name, note in noted if note), *self.decisions]


def resolve(recipe: Recipe) -> Resolved:
    """Check and encode everything. Raises one UserError that lists all problems found."""
    problems: list[UserError] = []

    def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except UserError as error:
            problems.append(error)
            return None

    splits = attempt(load_splits, recipe.data, recipe.seed)
    model = attempt(open_candidate, recipe.model)
    counts = {split.name: len(split) for split in splits} if splits is not None else {}
    parameters = model.parameters if model is not None else 0
    recipe, decisions = decided(recipe, Given(counts.get("forget", 1), counts.get("retain", 0), parameters))
    for role, config in _others(recipe) if model is not None else []:
        attempt(check_same_tokens, model, config, role)
    tokenizer = model.tokenizer if model is not None else None
    template = attempt(resolve_template, recipe.data.template, tokenizer) if model is not None else None
    objectives = {entry.name: attempt(build_objective, entry.method, entry.parameters) for entry in recipe.unlearn}
    if recipe.merge is not None:
        attempt(_check_merge, recipe.merge, len(recipe.merge.models or recipe.unlearn))
    exam = attempt(exam_of, recipe.evaluate, recipe.data.benchmark)
    search = attempt(_search, recipe, splits, tokenizer) if splits is not None and template is not None else None
    if recipe.evaluate.lm_eval:
        hint = "run them on the result: expunge eval OUT/model --set evaluate.lm_eval=[mmlu]"
        problems.append(UserError("evaluate.lm_eval: a run does not run lm-eval's tasks", hint))
    mask = None
    if splits is not None and model is not None:
        mask = attempt(check_localize, recipe, [split.name for split in splits], model.skeleton)
    for entry in recipe.unlearn if splits is not None else []:
        attempt(_check_retain, entry, objectives[entry.name], "retain" in splits or bool(entry.neighbours))
    rows: dict[str, list[Encoded]] = {}
    for split in splits if splits is not None and template is not None else []:
        rows[split.name] = attempt(encode, split.examples, tokenizer, template, recipe.data.max_length) or []
    if rows:
        attempt(check_context, model, rows if search is None else {**rows, **search.rows})
    for entry in recipe.unlearn if rows else []:
        attempt(check_entry, entry, rows)
    _raise_all(problems)
    built = {
        entry.name: attempt(beside, entry, objectives[entry.name], recipe, rows, tokenizer, template)
        for entry in recipe.unlearn
    }
    _raise_all(problems)
    assert splits is not None
    asked = ask(exam, splits, tokenizer, recipe.data)
    resolved = Resolved(recipe, splits, rows, objectives, built, tokenizer, template, asked, search, mask, decisions)
    for job in _jobs(resolved):
        attempt(check_job, job, recipe.model)
    _raise_all(problems)
    return resolved


def rows_digest(rows: Sequence[Encoded]) -> str:
    """sha256 over the tokens of every row and where its answer begins."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(np.array([len(row.input_ids), row.prompt_tokens, row.answer_tokens], dtype=np.int64).tobytes())
        whole.update(np.ascontiguousarray(row.input_ids, dtype=np.int32).tobytes())
    return whole.hexdigest()


def _others(recipe: Recipe) -> list[tuple[str, ModelConfig]]:
    """Models that are given beside the one to unlearn from."""
    others = [("the reference", recipe.reference)] if recipe.reference is not None else []
    for entry in recipe.unlearn:
        if entry.tokens.by == "knowledge" and entry.tokens.model not in ("original", "reference", STRANGERS):
            others.append((f"unlearn.{entry.name}.tokens.model", ModelConfig(id=entry.tokens.model)))
    return others


def _jobs(resolved: Resolved) -> list[Job]:
    """Every training run of a recipe, with stand-ins where a stage decides (selection, samples, mask)."""
    recipe, mask = resolved.recipe, resolved.mask
    if recipe.localize is not None and recipe.localize.mask is None:
        mask = widest_mask(recipe.localize.unit, recipe.model)
    jobs = [unlearn_job(resolved, entry, recipe.model, mask=mask) for entry in recipe.unlearn]
    return [*(job for _, job in list(prepare_jobs(resolved).values())[:1]), *jobs]


def _check_retain(entry: UnlearnConfig, objective: Objective | None, has_retain: bool) -> None:
    if objective is None or has_retain:
        return
    asked = [term for term in ("nll", "kl") if (getattr(entry.retain, term) or 0) > 0]
    if objective.about.retain or asked:
        what = f"method {entry.method}" if objective.about.retain else f"retain.{asked[0]}"
        raise UserError(
            f"unlearn '{entry.name}': {what} needs retain rows, and there are none",
            "give them: --retain FILE, or data.retain in the recipe",
        )


def _check_merge(merge: MergeConfig, count: int) -> None:
    if merge.search is not None:
        check_alone()
        Space(merge, count)
    else:
        plan_merge(merge.method, count, merge.weights, merge.density, merge.parameters)


def _search(recipe: Recipe, splits: Splits, tokenizer: Any) -> SearchRows | None:
    """What a merge is searched on. Raises UserError for aims and constraints that no row can answer."""
    if recipe.merge is None or recipe.merge.search is None:
        return None
    has_reference = recipe.reference is not None or recipe.prepare is not None
    return search_rows(recipe.merge.search, splits, tokenizer, recipe.data, recipe.evaluate, has_reference)


def _raise_all(problems: Sequence[UserError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        messages = list(dict.fromkeys(problem.message for problem in problems))
        hints = list(dict.fromkeys(problem.hint for problem in problems if problem.hint))
        raise UserError("; ".join(messages), "; ".join(hints))
