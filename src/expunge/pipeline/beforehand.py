"""What models must say before an unlearn entry can train: chosen tokens, sampled answers, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expunge.data.encode import Encoded
from expunge.pipeline.entries import (
    Made,
    alternatives_of,
    fallen_tokens,
    knowledge_tokens,
    knowledge_with_prompts,
    logprobs,
)
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.resolve import rows_digest
from expunge.pipeline.samples import read_samples, write_samples
from expunge.pipeline.strangers import WORDS, asked_of_strangers, names, plain_rows, stranger_rows, words_of_their_own
from expunge.recipe import STRANGERS, TokenSelection, UnlearnConfig

if TYPE_CHECKING:
    from expunge.pipeline.stages import Stages, Variant

#: Name of a model that only chooses tokens and is not evaluated.
SELECTOR = "selector"


def beforehand(
    stages: Stages, entry: UnlearnConfig, model: Variant, lacking: Callable[[TokenSelection], Variant]
) -> Made:
    """All that an entry's training needs of models, made as stages of their own; `lacking` as in `Stages.job`."""
    objective, made = stages.resolved.objectives[entry.name], Made()
    by_knowledge, alone = entry.tokens.by == "knowledge", entry.tokens.model == STRANGERS
    without = lacking(entry.tokens) if by_knowledge and not alone else model
    if entry.tokens.prompts:
        made.selection, known, made.whole = _with_prompts(stages, entry, model, without)
        made.lacking = known if objective.about.lacking else None
    if made.whole:
        _note(stages, f"{entry.name}: prompts were learnt with their answers, so that whole rows go, without strangers")
    with_strangers = entry.neighbours is not None and not made.whole
    words = _names(stages, entry, without) if with_strangers or (by_knowledge and alone) else set()
    if by_knowledge and not entry.tokens.prompts:
        scored = _of_strangers(stages, entry, model, words) if alone else _without(stages, entry, without)
        made.selection = _knowledge(stages, entry, model, scored)
        made.lacking = [values for values, _ in logprobs(scored)] if objective.about.lacking else None
    if without is model:  # what the target knows by heart surprises it in no answer
        words |= words_of_their_own(stages.resolved)
    if alternatives_of(entry, objective) == "sampled":
        made.sampled = _samples(stages, entry, model)
    if entry.neighbours is not None:
        made.strangers = _strangers(stages, entry, words) if with_strangers else []
    return made


def _note(stages: Stages, note: str) -> None:
    """Say it, and leave it in the folder."""
    stages.reporter.line(f"  note: {note}")
    if stages.directory is not None:
        stages.directory.note(note)


def _names(stages: Stages, entry: UnlearnConfig, lacking: Variant) -> set[str]:
    """Names and their like: what surprises a model that lacks the knowledge, or else the target."""
    scored = stages.scores(lacking, {WORDS: plain_rows(stages.resolved)}, f"neighbours/{entry.name}")
    stages.release(lacking)
    return names(stages.resolved, scored.path)


def _strangers(stages: Stages, entry: UnlearnConfig, words: set[str]) -> list[Encoded]:
    """Neighbours of the forget rows; that there are none is said."""
    made = stranger_rows(stages.resolved, entry, words)
    if not made:
        _note(stages, f"{entry.name}: no forget prompt holds a name or a number, so that there are no neighbours")
    return made


def _without(stages: Stages, entry: UnlearnConfig, lacking: Variant) -> Path:
    """The scores of the forget rows under a model that lacks the knowledge."""
    if lacking.name == SELECTOR:
        known = stages.scores(lacking, {"forget": stages.resolved.rows["forget"]}, f"selection/{entry.name}")
    else:  # a variant that is evaluated anyway: its scores are made now and found later
        known = stages.scores(lacking, stages.resolved.asked.scores)
    stages.release(lacking)
    return known.path / "forget.parquet"


def _of_strangers(stages: Stages, entry: UnlearnConfig, model: Variant, words: set[str]) -> Path:
    """The scores of the forget answers where the target is asked about strangers."""
    rows = asked_of_strangers(stages.resolved, entry, words)
    known = stages.scores(model, {"forget": rows}, f"selection/{entry.name}")
    stages.release(model)
    return known.path / "forget.parquet"


def _knowledge(stages: Stages, entry: UnlearnConfig, model: Variant, known: Path) -> list[np.ndarray]:
    """Per forget row a mask of the tokens that carry the knowledge, from scores of what lacks it."""
    if entry.tokens.fall is None:
        return knowledge_tokens(known, entry.tokens.threshold)
    target = stages.scores(model, stages.resolved.asked.scores)
    stages.release(model)
    return fallen_tokens(known, target.path / "forget.parquet", entry.tokens.fall)


def _with_prompts(
    stages: Stages, entry: UnlearnConfig, model: Variant, lacking: Variant
) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Tokens of the knowledge, their log-probs without it, and whether they are of whole rows: prompts have some."""
    rows = stages.resolved.rows["forget"]
    whole = {"forget": [row.whole() for row in rows]}

    def passed(variant: Variant, name: str) -> Path:
        scored = stages.scores(variant, whole, f"selection/{entry.name}-{name}")
        stages.release(variant)
        return scored.path / "forget.parquet"

    return knowledge_with_prompts(rows, passed(lacking, "lacking"), passed(model, "target"), entry.tokens.threshold)


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
