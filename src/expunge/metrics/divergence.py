"""How far a model has moved from the target in what it says next."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples

#: A token that the model rules out altogether: enormous, but every mean stays a number.
_LARGEST = float(np.finfo(np.float32).max)


@metric(
    "kl_drift",
    summary="KL divergence of the model's next-token distributions from the target's, mean over the answer's tokens",
    needs="divergence",
    range=(0, np.inf),
    unit="nats per token",
    paper="arXiv:2406.09179",
    learnt=None,
    roles=("forget", "retain", "utility", "holdout"),
    anchors=False,
    good={"retain": "lower", "utility": "lower"},
)
def kl_drift(table: pa.Table) -> Values:
    """Mean of KL(target ‖ model) over the answer's tokens, terminator left out; NaN when T = 0 or the model gives NaN.

    Question and padding do not count; losses of public code average over them too and so come out smaller. On rows to
    be forgotten no end is good: collapse and forgetting both move far.
    """
    lists = table.column("kl").combine_chunks()
    lengths = np.asarray(lists.value_lengths(), dtype=np.int64)
    answer = np.minimum(np.asarray(table.column("answer_tokens"), dtype=np.int64), lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = position < answer[row]
    # it is never negative but for rounding
    kl = np.clip(np.asarray(lists.flatten(), dtype=np.float64)[kept], 0, _LARGEST)
    total = np.bincount(row[kept], weights=kl, minlength=len(lengths))
    mean = np.divide(total, answer, out=np.full(len(lengths), np.nan), where=answer > 0)
    return Examples.of(table).mean(mean)
