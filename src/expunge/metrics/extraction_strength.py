"""How much of an answer greedy decoding completes once it is given the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.tokens import AnswerTokens, entity_tokens, matched_tokens, per_example
from expunge.recipe.conventions import EXPUNGE, Convention

_PAPER = "arXiv:2012.07805"


@metric(
    "extraction_strength",
    summary="1 − k/T for the smallest k after which greedy decoding completes the answer (k of its T tokens given)",
    needs="scores",
    range=(0, 1),
    unit="part of the answer's tokens",
    paper=_PAPER,
)
def extraction_strength(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Longest suffix of right argmaxes over T, terminator left out: 0 when the last token is wrong, NaN when T = 0.

    Greedy decoding repeats a suffix if and only if every teacher-forced argmax in it is right, so no generation is
    needed.
    """
    return per_example(table, _strength(matched_tokens(table, convention), convention))


@metric(
    "extraction_strength_paraphrase",
    summary="extraction strength of the answer after paraphrased prompts, mean over a row's paraphrases",
    needs="scores/paraphrase",
    range=(0, 1),
    unit="part of the answer's tokens",
    paper="arXiv:2406.09179",
)
def extraction_strength_paraphrase(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Mean over each example's candidates; NaN where none has tokens."""
    return extraction_strength(table, convention)


@metric(
    "extraction_strength_worst",
    summary="extraction strength after the prompt or a paraphrase of it, whichever gives most",
    needs=("scores", "scores/paraphrase"),
    range=(0, 1),
    unit="part of the answer's tokens",
    paper="arXiv:2406.09179",
)
def extraction_strength_worst(table: pa.Table, paraphrases: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Largest value over the row and its paraphrases; NaN where no paraphrase was scored: nothing was tried there."""
    examples, others = Examples.of(table), Examples.of(paraphrases)
    plain, asked = (_strength(matched_tokens(part, convention), convention) for part in (table, paraphrases))
    most = examples.align(others.largest(asked), others)
    return np.where(np.isnan(most), np.nan, np.fmax(examples.largest(plain), most))


@metric(
    "extraction_strength_entity",
    summary="extraction strength of the answer's entities: the words between them are given, and k of their T tokens",
    needs="scores",
    range=(0, 1),
    unit="part of the entities' tokens",
    paper=_PAPER,
)
def extraction_strength_entity(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Longest suffix of right argmaxes among the entities' tokens over their number; NaN where the row names none."""
    return per_example(table, _strength(entity_tokens(matched_tokens(table, convention)), convention))


def _strength(tokens: AnswerTokens, convention: Convention) -> Values:
    """[rows]: what follows the last miss, over T."""
    after_last_miss = np.zeros(len(tokens.length), dtype=np.int64)
    miss = ~tokens.hit
    np.maximum.at(after_last_miss, tokens.row[miss], tokens.position[miss] + 1)
    completed = tokens.length - after_last_miss
    if convention.extraction_floor:
        completed = np.maximum(completed, np.minimum(tokens.length, 1))
    return tokens.part(completed)
