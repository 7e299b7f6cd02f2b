"""What models must say before an unlearn entry can train: chosen tokens, sampled answers, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expunge.data.encode import Encoded
from expunge.pipeline.entries import Made, alternatives_of, fallen_tokens, knowledge_tokens, logprobs
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.resolve import rows_digest
from expunge.pipeline.samples import read_samples, write_samples
from expunge.pipeline.strangers import WORDS, plain_rows, stranger_rows
from expunge.recipe import TokenSelection, UnlearnConfig

if TYPE_CHECKING:
    from expunge.pipeline.stages import Stages, Variant

#: Name of a model that only chooses tokens and is not evaluated.
SELECTOR = "selector"


def beforehand(
    stages: Stages, entry: UnlearnConfig, model: Variant, lacking: Callable[[TokenSelection], Variant]
) -> Made:
    """All that an entry's training needs of models, made as stages of their own; `lacking` as in `Stages.job`."""
    objective, made = stages.resolved.objectives[entry.name], Made()
    without = lacking(entry.tokens) if entry.tokens.by == "knowledge" else None
    if without is not None:
        made.selection, known = _knowledge(stages, entry, model, without)
        made.lacking = known if objective.about.lacking else None
    if alternatives_of(entry, objective) == "sampled":
        made.sampled = _samples(stages, entry, model)
    if entry.neighbours is not None:
        made.strangers = _strangers(stages, entry, without or model)
    return made


def _strangers(stages: Stages, entry: UnlearnConfig, lacking: Variant) -> list[Encoded]:
    """Neighbours of the forget rows; a name is what surprises a model that lacks the knowledge, if there is one."""
    scored = stages.scores(lacking, {WORDS: plain_rows(stages.resolved)}, f"neighbours/{entry.name}")
    stages.release(lacking)
    made = stranger_rows(stages.resolved, entry, scored.path)
    if not made:
        note = f"{entry.name}: no forget prompt holds a name or a number, so that there are no neighbours"
        stages.reporter.line(f"  note: {note}")
        if stages.directory is not None:
            stages.directory.note(note)
    return made


def _knowledge(
    stages: Stages, entry: UnlearnConfig, model: Variant, lacking: Variant
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per forget row a mask of the tokens that carry the knowledge, and their log-probs under a model that lacks it."""
    if lacking.name == SELECTOR:
        known = stages.scores(lacking, {"forget": stages.resolved.rows["forget"]}, f"selection/{entry.name}")
    else:  # a variant that is evaluated anyway: its scores are made now and found later
        known = stages.scores(lacking, stages.resolved.asked.scores)
    stages.release(lacking)
    file = known.path / "forget.parquet"
    values = [found for found, _ in logprobs(file)]
    if entry.tokens.fall is None:
        return knowledge_tokens(file, entry.tokens.threshold), values
    target = stages.scores(model, stages.resolved.asked.scores)
    stages.release(model)
    return fallen_tokens(file, target.path / "forget.parquet", entry.tokens.fall), values


def _samples(stages: Stages, entry: UnlearnConfig, model: Variant) -> list[list[Encoded]]:
    """Other answers to the forget prompts, drawn from the model itself."""
    rows, settings, recipe = stages.resolved.rows["forget"], entry.alternatives, stages.resolved.recipe
    seed = recipe.seed if entry.seed is None else entry.seed
    asked = settings.model_dump(mode="json")
    inputs = {"model": model.digest, "rows": rows_digest(rows), "alternatives": asked, "seed": seed}
    config = LazyModel(model.config, recipe.evaluate.dtype)

    def work(folder: Path) -> None:
        with stages.reporter.bar(f"samples/{entry.name}", len(rows) * settings.count) as tick:
            write_samples(config, rows, settings, seed, folder / "out", tick)

    made = stages.stage(f"samples/{entry.name}", f"samples/{entry.name}", inputs, work)
    return read_samples(made.path, stages.resolved)
