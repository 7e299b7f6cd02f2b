"""How much of an answer greedy decoding completes once it is given the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.tokens import answer_tokens


@metric(
    "extraction_strength",
    summary="1 − k/T for the smallest k after which greedy decoding completes the answer (k of its T tokens given)",
    needs="scores",
    range=(0, 1),
    unit="part of the answer's tokens",
    paper="arXiv:2012.07805",
)
def extraction_strength(table: pa.Table) -> Values:
    """Longest suffix of right argmaxes over T, terminator left out: 0 when the last token is wrong, NaN when T = 0.

    Greedy decoding repeats a suffix if and only if every teacher-forced argmax in it is right, so no generation is
    needed.
    """
    answers = answer_tokens(table)
    after_last_miss = np.zeros(len(answers.length), dtype=np.int64)
    miss = ~answers.hit
    np.maximum.at(after_last_miss, answers.row[miss], answers.position[miss] + 1)
    return answers.part(answers.length - after_last_miss)
