"""What a merge did, in numbers that are summed up tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.merging.selection import CHUNK, count

_AFTER_SQUARES = 5  # merged, mean, along, conflict, changed


class Statistics:
    """Norms of the differences, direction of the merged one, and the share of weights that are pulled both ways.

    One row of sums per parameter: parameters may come in any order and from several threads, and rows may be kept.
    """

    def __init__(self, models: int) -> None:
        self.rows: dict[str, list[float]] = {}
        """Parameter → |Δ|² of each input, |merged|², |mean|², merged · mean, weights in conflict, changed weights."""
        self._models = models

    def add(self, name: str, deltas: Sequence[Float[Tensor, "*shape"]], merged: Float[Tensor, "*shape"]) -> None:
        """Take in one parameter: the inputs' deltas and the merged delta."""
        flats, whole = [delta.reshape(-1) for delta in deltas], merged.reshape(-1)
        self.rows[name] = [0.0] * (self._models + _AFTER_SQUARES)
        for start in range(0, whole.numel(), CHUNK):
            sums = _sums([flat[start : start + CHUNK] for flat in flats], whole[start : start + CHUNK])
            self.rows[name] = [one + other for one, other in zip(self.rows[name], sums, strict=True)]

    def restore(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Rows of an earlier merge of the same."""
        self.rows.update({name: list(row) for name, row in rows.items()})

    def summary(self) -> dict[str, Any]:
        """`delta_norms`, `merged_norm` (L2), `cosine_to_mean`, `sign_conflict` (share of the weights that change)."""
        # fsum: the same whatever the order in which the threads were done
        empty = [0.0] * (self._models + _AFTER_SQUARES)
        sums = [math.fsum(column) for column in zip(*self.rows.values(), strict=True)] or empty
        merged, mean, along, conflict, changed = sums[self._models :]
        across = math.sqrt(merged) * math.sqrt(mean)
        return {
            "delta_norms": [math.sqrt(square) for square in sums[: self._models]],
            "merged_norm": math.sqrt(merged),
            "cosine_to_mean": along / across if across > 0 else None,
            "sign_conflict": conflict / changed if changed else None,
        }


def _sums(rows: Sequence[Float[Tensor, " n"]], merged: Float[Tensor, " n"]) -> list[float]:
    """The row of a piece that the processor's cache holds."""
    mean = rows[0] / len(rows)
    for row in rows[1:]:
        mean.add_(row, alpha=1 / len(rows))
    products = [*(row.dot(row) for row in rows), merged.dot(merged), mean.dot(mean), merged.dot(mean)]
    return [*torch.stack(products).tolist(), *_pulled(rows)]


def _pulled(rows: Sequence[Float[Tensor, " n"]]) -> tuple[float, float]:
    """How many weights are pulled both ways, and how many at all."""
    # numpy compares and counts many times as fast as torch; on a GPU the same words mean torch's
    own: list[Any] = [row.numpy() if row.device.type == "cpu" else row for row in rows]
    down, up = own[0] < 0, own[0] > 0
    for row in own[1:]:
        down |= row < 0
        up |= row > 0
    return float(count(down & up)), float(count(down | up))
