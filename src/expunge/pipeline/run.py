"""A run from recipe to report: prepare → localize → unlearn ×N → merge → evaluate → metrics → report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.metrics.base import METRICS, Resampling
from expunge.pipeline.aggregates import official
from expunge.pipeline.beforehand import SELECTOR
from expunge.pipeline.entries import prepare_jobs
from expunge.pipeline.evaluate import FolderShelf, measure, not_measured
from expunge.pipeline.processes import barrier, process_rank
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.pipeline.resolve import Resolved, resolve
from expunge.pipeline.stages import Stages, Variant
from expunge.recipe import ModelConfig, Recipe, TokenSelection
from expunge.report.build import build_report
from expunge.report.card import model_card
from expunge.runs.atomic import write_bytes, write_json, write_text
from expunge.runs.store import RunDirectory


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, the report, every record, and whether all of it was there before."""

    path: Path
    model: Path
    report: Path
    metrics: list[dict[str, Any]]
    skipped_all: bool


def execute(recipe: Recipe, output: Path, reporter: Reporter | None = None) -> RunResult:
    """Do everything that the recipe says and that is not done yet. Raises UserError before anything is written."""
    quiet_libraries()
    resolved = resolve(recipe)
    recipe = resolved.recipe  # what `auto` became is part of what the run is
    output = output.absolute()
    if process_rank() != 0:
        _execute(Stages(resolved, None, output, Reporter(quiet=True)))
        barrier()
        return _read_result(output, True)
    reporter = reporter or Reporter()
    with RunDirectory(output, recipe) as directory:
        directory.record(data=resolved.data_record())
        for note in (*resolved.splits.notes, *resolved.notes()):
            directory.note(note)
            reporter.line(f"  note: {note}")
        stages = Stages(resolved, directory, output, reporter)
        variants = _execute(stages)
        digests = {v.name: {"source": v.config.id, "digest": v.digest} for v in variants}
        directory.record(
            models=digests, metrics={name: METRICS.get(name).describe() for name in resolved.asked.exam.metrics}
        )
        records = _write_metrics(resolved, variants, output)
        directory.finish()
        report = build_report(output)
        card = model_card(output)
        for place in (output, output / "model"):
            write_text(place / "README.md", card)
        barrier()
        return RunResult(output, output / "model", report, records, directory.skipped_all)


def _execute(stages: Stages) -> list[Variant]:
    """Every model, then every pass; the variants in the order in which the report shows them."""
    resolved = stages.resolved
    variants = _models(stages)
    for variant in variants:
        stages.scores(variant, resolved.asked.scores)
        if resolved.asked.generations:
            stages.generations(variant, resolved.asked.generations)
        stages.release(variant)
    return variants


def _models(stages: Stages) -> list[Variant]:
    resolved = stages.resolved
    recipe = resolved.recipe
    given = stages.given("original" if recipe.prepare else "target", recipe.model)
    taught = {
        name: stages.trained(f"prepare/{name}", f"models/{name}", job, given)
        for name, (_, job) in prepare_jobs(resolved).items()
    }
    target, reference = taught.get("target", given), taught.get("reference")
    if recipe.reference is not None:
        reference = stages.given("reference", recipe.reference)

    def lacking(tokens: TokenSelection) -> Variant:
        known = {"original": given if recipe.prepare else None, "reference": reference}
        return known.get(tokens.model) or stages.given(SELECTOR, ModelConfig(id=tokens.model))

    mask = stages.localized(target)
    unlearned = []
    for entry in recipe.unlearn:
        whole = recipe.merge is None and entry.lora is None
        made = stages.unlearned(entry, "model" if whole else f"models/{entry.name}", target, lacking, mask)
        unlearned.append(Variant(entry.name, made.config, made.digest))
    variants = [given] if target is given else [given, target]
    if recipe.merge is not None:
        chosen = recipe.merge.models or [entry.name for entry in recipe.unlearn]
        by_name = {variant.name: variant for variant in unlearned}
        unlearned.append(stages.merged([by_name[name] for name in chosen], target, reference))
    elif recipe.unlearn[0].lora is not None:
        unlearned = [stages.folded(unlearned[0])]
    for variant in unlearned:
        stages.landed(variant, target, mask)
    return [*variants, *unlearned, *([reference] if reference else [])]


def _write_metrics(resolved: Resolved, variants: Sequence[Variant], output: Path) -> list[dict[str, Any]]:
    exam, recipe = resolved.asked.exam, resolved.recipe
    names = [variant.name for variant in variants]
    resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
    records, values = measure(names, resolved.splits, FolderShelf(output), exam, resampling)
    write_json(output / "metrics.json", records)
    write_json(output / "aggregates.json", official(exam, names, resolved.splits, records, values))
    write_json(output / "left_out.json", not_measured(names, resolved.splits, FolderShelf(output), exam, records))
    sink = pa.BufferOutputStream()
    pq.write_table(values, sink)
    write_bytes(output / "values.parquet", sink.getvalue().to_pybytes())
    return records


def _read_result(output: Path, skipped: bool) -> RunResult:
    records = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return RunResult(output, output / "model", output / "report.html", records, skipped)
