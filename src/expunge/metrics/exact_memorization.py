"""How many tokens of an answer are the model's first choice."""

from __future__ import annotations

import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.tokens import entity_tokens, matched_tokens, per_example
from expunge.recipe.conventions import EXPUNGE, Convention

_PAPER = "arXiv:2205.10770"


@metric(
    "exact_memorization",
    summary="part of the answer's tokens that are the argmax, each after the true tokens before it",
    needs="scores",
    range=(0, 1),
    unit="part of the answer's tokens",
    paper=_PAPER,
)
def exact_memorization(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Mean of hits over the answer, terminator left out; NaN when T = 0.

    Template words and names copied from the prompt count as well: read it beside the reference's value.
    """
    tokens = matched_tokens(table, convention)
    return per_example(table, tokens.mean(tokens.hit))


@metric(
    "exact_memorization_entity",
    summary="part of the tokens of the answer's entities that are the argmax, each after the true tokens before it",
    needs="scores",
    range=(0, 1),
    unit="part of the entities' tokens",
    paper=_PAPER,
)
def exact_memorization_entity(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Mean of hits over the entities that the row names; NaN where it names none."""
    tokens = entity_tokens(matched_tokens(table, convention))
    return per_example(table, tokens.mean(tokens.hit))
