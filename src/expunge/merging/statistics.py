"""What a merge did, in numbers that are summed up tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.merging.selection import CHUNK


class Statistics:
    """Norms of the differences, direction of the merged one, and the share of weights that are pulled both ways."""

    def __init__(self, models: int) -> None:
        self._squares = [0.0] * models
        self._merged = 0.0
        self._mean = 0.0
        self._along = 0.0
        self._changed = 0
        self._conflict = 0

    def add(self, deltas: Sequence[Float[Tensor, "*shape"]], merged: Float[Tensor, "*shape"]) -> None:
        """Take in one parameter: the inputs' deltas and the merged delta."""
        flats = [delta.reshape(-1) for delta in deltas]
        whole = merged.reshape(-1)
        for start in range(0, whole.numel(), CHUNK):
            rows = torch.stack([flat[start : start + CHUNK] for flat in flats])
            piece = whole[start : start + CHUNK]
            mean = rows.mean(0)
            sums = [*(row.dot(row) for row in rows), piece.dot(piece), mean.dot(mean), piece.dot(mean)]
            low, high = rows.amin(0), rows.amax(0)
            signs = low.sign_().add_(high.sign_().mul_(2))  # 1: one down, one up; 0: unchanged by all
            counts = [(signs == 1).sum(), signs.count_nonzero()]
            values = torch.stack([*sums, *(count.to(torch.float32) for count in counts)]).tolist()
            for index in range(len(flats)):
                self._squares[index] += values[index]
            self._merged += values[-5]
            self._mean += values[-4]
            self._along += values[-3]
            self._conflict += int(values[-2])
            self._changed += int(values[-1])

    def summary(self) -> dict[str, Any]:
        """`delta_norms`, `merged_norm` (L2), `cosine_to_mean`, `sign_conflict` (share of the weights that change)."""
        across = math.sqrt(self._merged) * math.sqrt(self._mean)
        return {
            "delta_norms": [math.sqrt(square) for square in self._squares],
            "merged_norm": math.sqrt(self._merged),
            "cosine_to_mean": self._along / across if across > 0 else None,
            "sign_conflict": self._conflict / self._changed if self._changed else None,
        }
