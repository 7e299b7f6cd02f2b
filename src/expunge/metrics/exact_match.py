"""Whether the generated text is the answer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric


@metric(
    "exact_match",
    summary="1 if the generated text equals the answer, case and outer spaces aside, else 0",
    needs="generations",
    range=(0, 1),
    unit="part of the examples",
    paper="arXiv:1606.05250",
)
def exact_match(table: pa.Table) -> Values:
    """Equality after strip and casefold; NaN where the answer is blank."""
    pairs = zip(table.column("answer").to_pylist(), table.column("generated").to_pylist(), strict=True)
    same = [_plain(answer) == _plain(generated) if _plain(answer) else np.nan for answer, generated in pairs]
    return np.array(same, dtype=np.float64)


def _plain(text: str) -> str:
    return text.strip().casefold()
