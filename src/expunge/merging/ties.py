"""TIES: trim, elect a sign, average the differences that agree."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import Normalize, Sign, Votes, elect
from expunge.merging.registry import merge
from expunge.merging.sparse import Rescale, largest, stacked


@merge(
    "ties",
    summary="keep the largest part of each difference, elect a sign per weight, average what agrees with it",
    paper="arXiv:2306.01708",
    trims=True,
)
def ties(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    sign: Sign = "total",
    votes: Votes = "weighted",
    normalize: Normalize = True,
    rescale: Rescale = False,
) -> Float[Tensor, "*shape"]:
    """Merged delta of one parameter; `density[i]` of the elements of `deltas[i]` take part (arXiv:2306.01708)."""
    pieces = [largest(delta, part) for delta, part in zip(deltas, density, strict=True)]
    rows = stacked(deltas, pieces, density, rescale)
    return elect(deltas[0], rows, weights, sign=sign, votes=votes, normalize=normalize)
