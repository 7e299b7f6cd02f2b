"""Model breadcrumbs: leave out the smallest and the very largest elements of each difference, then add up."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.merging.combine import Election, Normalize, Votes, elect_or_add
from expunge.merging.registry import merge
from expunge.merging.sparse import Rescale, between, stacked

Gamma = Annotated[
    float, Field(ge=0, lt=1, description="part of the elements, the largest, that is cut off; at most 1 − density")
]


@merge(
    "breadcrumbs",
    summary="leave out the smallest elements and the outliers of each difference, add up the differences by weight",
    paper="arXiv:2312.06795",
    trims=True,
    scopes=("tensor",),
)
def breadcrumbs(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    gamma: Gamma = 0.01,
    sign: Election = "none",
    votes: Votes = "weighted",
    normalize: Normalize = False,
    rescale: Rescale = False,
) -> Float[Tensor, "*shape"]:
    """Merged delta of one parameter; `density[i]` of the elements stay, below the largest ones (arXiv:2312.06795).

    Raises UserError if weights that are to divide a plain sum cancel.
    """
    pieces = [between(delta, part, gamma) for delta, part in zip(deltas, density, strict=True)]
    rows = stacked(deltas, pieces, density, rescale)
    return elect_or_add(deltas[0], rows, weights, sign=sign, votes=votes, normalize=normalize)
