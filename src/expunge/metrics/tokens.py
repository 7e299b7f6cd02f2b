"""The answers of a scores table as flat arrays: one entry per answer token, terminator left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import Values


@dataclass(frozen=True)
class AnswerTokens:
    """Answer tokens of all examples, one after the other (N of them), and the T of each example."""

    logprob: NDArray[np.float64]  # [N] natural log
    hit: NDArray[np.bool_]  # [N]
    row: NDArray[np.int64]  # [N] the example that the token belongs to
    position: NDArray[np.int64]  # [N] 0 for an answer's first token
    length: NDArray[np.int64]  # [examples] T; 0 where nothing can be scored

    def sum(self, weights: NDArray) -> Values:
        """Per-example sum [examples] of one number per token [N]."""
        return np.bincount(self.row, weights=weights, minlength=len(self.length)).astype(np.float64)

    def mean(self, weights: NDArray) -> Values:
        """Per-example mean [examples] of one number per token [N]; NaN where T = 0."""
        return _divide(self.sum(weights), self.length)

    def part(self, count: NDArray) -> Values:
        """count / T [examples]; NaN where T = 0."""
        return _divide(count.astype(np.float64), self.length)


def answer_tokens(table: pa.Table) -> AnswerTokens:
    """Read the answers of a SCORES table.

    An example with a NaN log-probability (a broken model) counts as T = 0: a model that fails to compute has not
    forgotten, so its examples are unscored instead of perfect.
    """
    logprobs = table.column("logprob").combine_chunks()
    lengths = np.asarray(logprobs.value_lengths(), dtype=np.int64)
    length = np.asarray(table.column("answer_tokens"), dtype=np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = position < length[row]
    logprob = np.asarray(logprobs.flatten(), dtype=np.float64)[keep]
    # a token that the model rules out altogether: enormous, but every sum stays a number
    logprob = np.maximum(logprob, np.finfo(np.float32).min)
    hit = table.column("hit").combine_chunks().flatten().to_numpy(zero_copy_only=False)[keep]
    row, position = row[keep], position[keep]

    broken = np.zeros(len(lengths), dtype=bool)
    broken[row[np.isnan(logprob)]] = True
    sound = ~broken[row]
    return AnswerTokens(logprob[sound], hit[sound], row[sound], position[sound], np.where(broken, 0, length))


def _divide(count: Values, length: NDArray[np.int64]) -> Values:
    return np.divide(count, length, out=np.full(len(length), np.nan), where=length > 0)
