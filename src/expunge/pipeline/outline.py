"""What a run would do, in words: the dry run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from expunge.pipeline.plan import make_plan
from expunge.pipeline.resolve import Resolved, retain_weights
from expunge.recipe import TrainConfig


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
    if recipe.prepare is not None:
        taught = [name for name in ("forget", "retain", "retain_unseen") if name in resolved.splits]
        for name, splits in (("target", taught), ("reference", [name for name in taught if name != "forget"])):
            count = sum(len(resolved.rows[split]) for split in splits)
            if count:
                yield f"prepare    {name}: {' + '.join(splits)}, {_steps(count, recipe.prepare.train)} steps"
    for entry in recipe.unlearn:
        weights = retain_weights(entry, resolved.objectives[entry.name], "retain" in resolved.rows)
        terms = " + ".join(f"{weight:g}·{term}" for term, weight in weights.items() if weight)
        adapters = f", LoRA of rank {entry.lora.rank}" if entry.lora else ""
        steps = _steps(len(resolved.rows["forget"]), entry.train)
        yield f"unlearn    {entry.name}: {entry.method} ({terms}), tokens {entry.tokens.by}{adapters}, {steps} steps"
    if recipe.merge is not None:
        names = recipe.merge.models or [entry.name for entry in recipe.unlearn]
        yield f"merge      {' + '.join(names)} by {recipe.merge.method}, density {recipe.merge.density}"
    generation = " and generation" if recipe.evaluate.generate is not None else ""
    yield f"evaluate   scores{generation} in {recipe.evaluate.dtype}, metrics, report"
    yield f"output     {output}"


def _steps(rows: int, train: TrainConfig) -> int:
    return make_plan([], [1] * rows, train.model_copy(update={"accumulation": 1}), None, 0).steps
