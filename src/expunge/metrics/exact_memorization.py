"""How many tokens of an answer are the model's first choice."""

from __future__ import annotations

import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.tokens import answer_tokens


@metric(
    "exact_memorization",
    summary="part of the answer's tokens that are the argmax, each after the true tokens before it",
    needs="scores",
    range=(0, 1),
    unit="part of the answer's tokens",
    paper="arXiv:2205.10770",
)
def exact_memorization(table: pa.Table) -> Values:
    """Mean of hits over the answer, terminator left out; NaN when T = 0.

    Template words and names copied from the prompt count as well: read it beside the reference's value.
    """
    answers = answer_tokens(table)
    return answers.mean(answers.hit)
