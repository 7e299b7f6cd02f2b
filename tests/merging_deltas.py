"""Differences for the tests of the merge methods."""

from __future__ import annotations

import torch

from expunge.merging.draw import Draw
from expunge.merging.selection import CHUNK

SHAPES = [(40, 50), (10,), (2 * CHUNK + 10,), (1, 20), (5, 4, 6)]

#: The chance of one parameter.
DRAW = Draw(42, "model.layers.0.mlp.up_proj.weight")


def random_deltas(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Standard normal numbers, one tensor per model."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]
