"""Magnitude pruning: the largest part of each difference, added up."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import Mean, add_up
from expunge.merging.registry import merge
from expunge.merging.sparse import Rescale, largest, stacked


@merge(
    "magnitude_prune",
    summary="keep the largest part of each difference, add up the differences by weight",
    paper="arXiv:1506.02626",
    trims=True,
)
def magnitude_prune(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    normalize: Mean = False,
    rescale: Rescale = False,
) -> Float[Tensor, "*shape"]:
    """Σ w·Δ of what stays of one parameter. Raises UserError if weights that are to divide it sum to 0."""
    pieces = [largest(delta, part) for delta, part in zip(deltas, density, strict=True)]
    return add_up(deltas[0], stacked(deltas, pieces, density, rescale), weights, normalize=normalize)
