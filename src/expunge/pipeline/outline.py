"""What a run would do, in words: the dry run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from expunge.pipeline.entries import prepare_jobs, unlearn_job
from expunge.pipeline.merge_search_space import Space
from expunge.pipeline.resolve import Resolved
from expunge.report.provenance import localized, switches


def outline(resolved: Resolved, output: Path) -> Iterator[str]:
    """One line per stage in order, with rows and steps."""
    recipe = resolved.recipe
    yield f"model      {recipe.model.id} ({recipe.model.dtype})"
    for split in resolved.splits:
        rows = resolved.rows[split.name]
        tokens = sum(row.supervised_tokens for row in rows)
        yield f"data       {split.name}: {len(rows)} rows, {tokens} supervised tokens, role {split.role}"
    for note in resolved.notes():
        yield f"note       {note}"
    for name, (splits, job) in prepare_jobs(resolved).items():
        yield f"prepare    {name}: {' + '.join(splits)}, {job.plan().steps} steps"
    if recipe.localize is not None:
        yield f"localize   {localized(recipe.localize)}"
    for entry in recipe.unlearn:
        job = unlearn_job(resolved, entry, recipe.model)
        left_out = () if job.reads_forget else ("forget",)
        terms = " + ".join(f"{w:g}·{term}" for term, w in job.term_weights.items() if w and term not in left_out)
        adapters = f", LoRA of rank {entry.lora.rank}" if entry.lora else ""
        trainings = len(resolved.objectives[entry.name].variations(entry.train))
        steps = f"{job.plan().steps} steps" + (f" in each of {trainings} trainings" if trainings > 1 else "")
        yield f"unlearn    {entry.name}: {entry.method} ({terms or 'retain rows alone'}){adapters}, {steps}"
        for switch in switches(entry):
            yield f"           {switch}"
    if recipe.merge is not None:
        names = recipe.merge.models or [entry.name for entry in recipe.unlearn]
        searched = recipe.merge.search
        if searched is None or resolved.search is None:
            yield f"merge      {' + '.join(names)} by {recipe.merge.method}, density {recipe.merge.density}"
        else:
            methods = Space(recipe.merge, len(names)).methods
            yield f"merge      {' + '.join(names)}: {', '.join(methods)}, searched in {searched.trials} trials"
            yield f"           aims: {', '.join(map(str, resolved.search.aims))}"
            yield f"           keeps: {', '.join(map(str, resolved.search.keep))}"
            yield f"           on {', '.join(f'{name} ({len(rows)})' for name, rows in resolved.search.rows.items())}"
    generation = " and generation" if recipe.evaluate.generate is not None else ""
    yield f"evaluate   scores{generation} in {recipe.evaluate.dtype}, metrics, report"
    yield f"output     {output}"
