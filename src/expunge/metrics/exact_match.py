"""Whether the generated text is the answer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.texts import answers_and_outputs
from expunge.recipe.conventions import EXPUNGE, Convention


@metric(
    "exact_match",
    summary="1 if the generated text equals the answer, case and outer blanks aside, else 0",
    needs="generations",
    range=(0, 1),
    unit="part of the examples",
    paper="arXiv:1606.05250",
)
def exact_match(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Equality after strip and lower, as SemEval-2025 Task 4 scores knowledge; NaN where the answer is blank."""
    pairs = [(_plain(answer), _plain(said)) for answer, said in answers_and_outputs(table, convention)]
    same = np.array([answer == said if answer else np.nan for answer, said in pairs], dtype=np.float64)
    return Examples.of(table).mean(same)


def _plain(text: str) -> str:
    return text.strip().lower()
