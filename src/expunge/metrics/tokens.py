"""The tokens of a scores table as flat arrays, one entry per token that a convention counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import Values
from expunge.metrics.examples import Examples
from expunge.recipe.conventions import Convention


@dataclass(frozen=True)
class AnswerTokens:
    """The counted tokens of all rows, one after the other (N of them), and the T of each row."""

    logprob: NDArray[np.float64]  # [N] natural log
    hit: NDArray[np.bool_]  # [N]
    row: NDArray[np.int64]  # [N] the row that the token belongs to
    position: NDArray[np.int64]  # [N] 0 for a row's first counted token
    length: NDArray[np.int64]  # [rows] T; 0 where nothing can be scored
    place: NDArray[np.int64]  # [N] where the token stands in the flattened list columns
    table: pa.Table

    def sum(self, weights: NDArray) -> Values:
        """Per-row sum [rows] of one number per token [N]."""
        return np.bincount(self.row, weights=weights, minlength=len(self.length)).astype(np.float64)

    def mean(self, weights: NDArray) -> Values:
        """Per-row mean [rows] of one number per token [N]; NaN where T = 0."""
        return _divide(self.sum(weights), self.length)

    def part(self, count: NDArray) -> Values:
        """count / T [rows]; NaN where T = 0."""
        return _divide(count.astype(np.float64), self.length)

    def column(self, name: str) -> Values:
        """[N]: another list column of the table at these tokens."""
        return _flat(self.table, name)[self.place].astype(np.float64)

    def lowest(self, numbers: Values, part: float) -> Values:
        """Per-row mean [rows] of the lowest `part` of one number per token [N], of one token at least.

        NaN where T = 0 or a number is NaN.
        """
        order = np.lexsort((numbers, self.row))  # rows stay where they are, their tokens are sorted
        count = np.maximum(np.floor(self.length * part), self.length > 0)
        chosen = self.position < count[self.row]
        lowest = np.where(chosen, numbers[order], 0.0)
        broken = np.zeros(len(self.length), dtype=bool)
        broken[self.row[np.isnan(numbers)]] = True
        return np.where(broken, np.nan, _divide(self.sum(lowest), count))

    def only(self, chosen: NDArray[np.bool_]) -> AnswerTokens:
        """The chosen tokens [N] alone, counted anew: T is their number."""
        row = self.row[chosen]
        length = np.bincount(row, minlength=len(self.length)).astype(np.int64)
        position = np.arange(len(row)) - (np.cumsum(length) - length)[row]
        return AnswerTokens(
            self.logprob[chosen], self.hit[chosen], row, position, length, self.place[chosen], self.table
        )


def answer_tokens(table: pa.Table) -> AnswerTokens:
    """The answers of a SCORES table, terminator left out.

    A row with a NaN log-probability (a broken model) counts as T = 0: a model that fails to compute has not forgotten,
    so its rows are unscored instead of perfect.
    """
    return _first_tokens(table, np.asarray(table.column("answer_tokens"), dtype=np.int64))


def likelihood_tokens(table: pa.Table, convention: Convention) -> AnswerTokens:
    """What probability, perplexity and truth ratio count: the answer, or the whole label span with its terminator."""
    return _first_tokens(table, _labels(table)) if convention.scores_terminator else answer_tokens(table)


def matched_tokens(table: pa.Table, convention: Convention) -> AnswerTokens:
    """What hits and Min-K% count: the answer, or every label but the last."""
    if not convention.matches_labels_but_last:
        return answer_tokens(table)
    return _first_tokens(table, np.maximum(_labels(table) - 1, 0))


def entity_tokens(tokens: AnswerTokens) -> AnswerTokens:
    """Those that belong to entities that rows name; T = 0 where a row names none."""
    marks, labels = _lengths(tokens.table, "entity"), _labels(tokens.table)
    named = marks == labels  # else the row has no marks, because it names nothing
    inside = np.zeros(labels.sum(), dtype=bool)
    inside[np.repeat(named, labels)] = _flat(tokens.table, "entity")[np.repeat(named, marks)]
    return tokens.only(inside[tokens.place])


def mean_logprobs(table: pa.Table, convention: Convention) -> Values:
    """[rows]: log-probability per token of each answer, −NLL / T; NaN where T = 0."""
    tokens = likelihood_tokens(table, convention)
    return tokens.mean(tokens.logprob)


def per_example(table: pa.Table, values: Values) -> Values:
    """[rows] → [examples]: mean over the candidates of each example."""
    return Examples.of(table).mean(values)


def _first_tokens(table: pa.Table, length: NDArray[np.int64]) -> AnswerTokens:
    """The first `length` [rows] of each row's tokens."""
    lengths = _labels(table)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.flatnonzero(position < length[row])
    # a token that the model rules out altogether: enormous, but every sum stays a number
    logprob = np.maximum(_flat(table, "logprob")[place].astype(np.float64), np.finfo(np.float32).min)
    row = row[place]

    broken = np.zeros(len(lengths), dtype=bool)
    broken[row[np.isnan(logprob)]] = True
    sound = ~broken[row]
    row, place = row[sound], place[sound]
    hit = _flat(table, "hit")[place]
    return AnswerTokens(logprob[sound], hit, row, position[place], np.where(broken, 0, length), place, table)


def _labels(table: pa.Table) -> NDArray[np.int64]:
    """[rows]: supervised tokens, terminator included."""
    return _lengths(table, "logprob")


def _lengths(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(table.column(name).combine_chunks().value_lengths(), dtype=np.int64)


def _flat(table: pa.Table, name: str) -> NDArray:
    flat: NDArray = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat


def _divide(count: Values, length: NDArray) -> Values:
    return np.divide(count, length, out=np.full(len(length), np.nan), where=length > 0)
