"""DARE: drop elements of each difference at random and rescale the rest, then sum them up or elect signs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import Mean, Normalize, Rows, Sign, Votes, add_up, elect
from expunge.merging.draw import Draw
from expunge.merging.registry import merge
from expunge.merging.sparse import Rescale, dropped, stacked

# Chance has no threshold, so none can go through the whole model.
_SCOPES = ("tensor", "factor")


@merge(
    "dare_linear",
    summary="keep each element of a difference by chance, rescale what stays, add up the differences by weight",
    paper="arXiv:2311.03099",
    trims=True,
    scopes=_SCOPES,
)
def dare_linear(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    draw: Draw,
    normalize: Mean = False,
    rescale: Rescale = True,
) -> Float[Tensor, "*shape"]:
    """Merged delta; an element of `deltas[i]` stays with probability `density[i]` (arXiv:2311.03099).

    Raises UserError if weights that are to divide it sum to 0.
    """
    return add_up(deltas[0], _rows(deltas, density, draw, rescale), weights, normalize=normalize)


@merge(
    "dare_ties",
    summary="keep each element of a difference by chance, rescale what stays, elect a sign and average as ties does",
    paper="arXiv:2311.03099",
    trims=True,
    scopes=_SCOPES,
)
def dare_ties(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    draw: Draw,
    sign: Sign = "total",
    votes: Votes = "weighted",
    normalize: Normalize = True,
    rescale: Rescale = True,
) -> Float[Tensor, "*shape"]:
    """Merged delta; an element of `deltas[i]` stays with probability `density[i]` (arXiv:2311.03099, 2306.01708)."""
    rows = _rows(deltas, density, draw, rescale)
    return elect(deltas[0], rows, weights, sign=sign, votes=votes, normalize=normalize)


def _rows(deltas: list[Tensor], density: list[float], draw: Draw, rescale: str | bool) -> Rows:
    pieces = [
        dropped(delta, part, draw, number) for number, (delta, part) in enumerate(zip(deltas, density, strict=True))
    ]
    return stacked(deltas, pieces, density, rescale)
