"""What an unlearning may break beside its subject: general knowledge, and whether a model still writes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.data.encode import Encoded
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground

#: Splits whose prompts are continued, and how far.
CONTINUED, NEW_TOKENS = ("forget", "retain_unseen"), 32


@dataclass(frozen=True)
class Beside:
    """Accuracy on general knowledge; of greedy texts, the repetition, and their perplexity under another model."""

    general: float | None
    repetition: float | None
    perplexity: float | None


def beside(ground: Ground, name: str, model: Variant, limit: int) -> Beside:
    """Of at most `limit` rows of a split; texts are read by the reference, or by the target where there is none."""
    from expunge.data.benchmarks.general import general_knowledge
    from expunge.pipeline.resolve import rows_digest

    reader = ground.variants.get("reference", ground.variants["target"])
    prompts = [row for split in CONTINUED for row in ground.resolved.rows[split][:limit]]
    inputs = {
        "models": [model.digest, reader.digest],
        "rows": [rows_digest(prompts), len(general_knowledge())],
        "tokens": NEW_TOKENS,
        "dtype": ground.whole.recipe.evaluate.dtype,
    }

    def work(folder: Path) -> Mapping[str, Any]:
        (folder / "out").mkdir()
        said, found = _read(ground, model, prompts)
        return {**found, "perplexity": _perplexity(ground, reader, said)}

    return Beside(**ground.directory.stage(f"beside/{name}", f"beside/{name}", inputs, work).outputs)


def _read(ground: Ground, model: Variant, prompts: Sequence[Encoded]) -> tuple[list[Encoded], dict[str, float | None]]:
    """What a model goes on to say, as rows; how much of it repeats itself, and its general knowledge."""
    from expunge.data.benchmarks.general import CONVENTION, METRIC, general_knowledge
    from expunge.data.encode import encode
    from expunge.data.template import resolve_template
    from expunge.data.views import viewed
    from expunge.pipeline.evaluate import LazyModel
    from expunge.recipe.conventions import convention_of
    from expunge.scoring.scores import score

    recipe, tokenizer = ground.whole.recipe, ground.resolved.tokenizer
    lazy, size = LazyModel(model.config, recipe.evaluate.dtype), recipe.evaluate.batch_size
    said = lazy.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=size)
    texts = said.column("generated").to_pylist()
    answered = [replace(row.example, answer=text) for row, text in zip(prompts, texts, strict=True) if text.strip()]
    facts, convention = general_knowledge(), convention_of(CONVENTION)
    plain, length = resolve_template("raw", tokenizer), recipe.data.max_length
    sides = [encode(rows, tokenizer, plain, length, convention) for rows in (facts, viewed(facts, "perturbed_answer"))]
    table = score(lazy.loaded.model, [row for side in sides for row in side], batch_size=size)
    right, wrong = table.slice(0, len(sides[0])), table.slice(len(sides[0]))
    found = {
        "general": _mean(METRIC, [right, right.slice(0, 0), wrong], CONVENTION),
        "repetition": _mean("repetition", [said]),
    }
    return encode(answered, tokenizer, ground.resolved.template, length), found


def _perplexity(ground: Ground, reader: Variant, said: Sequence[Encoded]) -> float | None:
    """Of texts under the model that reads them."""
    from expunge.pipeline.evaluate import LazyModel
    from expunge.scoring.scores import score

    if not said:
        return None
    evaluate = ground.whole.recipe.evaluate
    table = score(LazyModel(reader.config, evaluate.dtype).loaded.model, said, batch_size=evaluate.batch_size)
    return _mean("perplexity", [table])


def _mean(metric: str, tables: Sequence[Any], convention: str = "expunge") -> float | None:
    """The metric's own mean over rows; None without any value."""
    import numpy as np

    from expunge.metrics.base import METRICS, mean
    from expunge.recipe.conventions import convention_of

    entry = METRICS.get(metric)
    values = np.asarray(entry.compute(list(tables), convention_of(convention)))
    return mean(values[~np.isnan(values)], entry.average)
