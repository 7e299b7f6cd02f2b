"""Rows and examples: several rows (candidates) of a table may belong to one example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import Values


@dataclass(frozen=True)
class Examples:
    """The examples of a table in the order in which they first stand there, and how their rows' numbers become one.

    Rows that are NaN are left out; an example that has no other is NaN.
    """

    ids: tuple[str, ...]
    row: NDArray[np.int64]  # [rows] the example that the row belongs to

    @classmethod
    def of(cls, table: pa.Table) -> Examples:
        """The examples of a table with the column example_id."""
        encoded = table.column("example_id").combine_chunks().dictionary_encode()
        row = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(tuple(encoded.dictionary.to_pylist()), row)

    def mean(self, values: Values) -> Values:
        """[rows] → [examples]: mean over the rows of each."""
        scored, row = self._scored(values)
        total, count = self._sum(row, scored), self._sum(row)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)

    def largest(self, values: Values) -> Values:
        """[rows] → [examples]: the largest of each."""
        scored, row = self._scored(values)
        found = np.full(len(self.ids), np.nan)
        np.fmax.at(found, row, scored)
        return found

    def log_sum_exp(self, values: Values) -> Values:
        """[rows] → [examples]: log Σ exp(value)."""
        largest = self.largest(values)
        scored, row = self._scored(values)
        total = self._sum(row, np.exp(scored - largest[row]))
        return largest + np.log(total, out=np.full(len(total), np.nan), where=total > 0)

    def log_mean_exp(self, values: Values) -> Values:
        """[rows] → [examples]: log of the mean of exp(value)."""
        count = self._sum(self._scored(values)[1])
        return self.log_sum_exp(values) - np.log(count, out=np.full(len(count), np.nan), where=count > 0)

    def align(self, values: Values, others: Examples) -> Values:
        """[others] → [examples]: the numbers that another table gives these examples; NaN where it has none."""
        if self.ids == others.ids:
            return values
        place = {name: index for index, name in enumerate(others.ids)}
        index = np.array([place.get(name, len(others.ids)) for name in self.ids], dtype=np.int64)
        return np.append(values, np.nan)[index]

    def among(self, others: Examples) -> NDArray[np.bool_]:
        """[examples]: whether another table has rows of the example."""
        known = set(others.ids)
        return np.array([name in known for name in self.ids], dtype=bool)

    def _sum(self, row: NDArray[np.int64], weights: Values | None = None) -> Values:
        return np.bincount(row, weights=weights, minlength=len(self.ids)).astype(np.float64)

    def _scored(self, values: Values) -> tuple[Values, NDArray[np.int64]]:
        scored = ~np.isnan(values)
        return values[scored], self.row[scored]
