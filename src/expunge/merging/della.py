"""DELLA: drop elements at random, small ones sooner than large ones, then elect signs."""

from __future__ import annotations

from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.merging.combine import Election, Normalize, Votes, elect_or_add
from expunge.merging.draw import Draw
from expunge.merging.registry import merge
from expunge.merging.sparse import row_step, sampled, stacked

Epsilon = Annotated[
    float,
    Field(
        ge=0,
        lt=0.5,
        description="a row's elements stay with probability density − ε (smallest) to density + ε (largest)",
    ),
]
Rescale = Annotated[
    Literal["l1"] | bool,
    Field(description="divide what is kept by its probability (true), or restore its sum of magnitudes (l1), or not"),
]


@merge(
    "della",
    summary="keep elements by chance, the larger of a row more likely, rescale them, elect a sign and average",
    paper="arXiv:2406.11617",
    trims=True,
    scopes=("tensor",),
)
def della(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    draw: Draw,
    epsilon: Epsilon = 0.15,
    sign: Election = "total",
    votes: Votes = "weighted",
    normalize: Normalize = True,
    rescale: Rescale = True,
) -> Float[Tensor, "*shape"]:
    """Merged delta of one parameter; rescale=true divides by each element's own probability (arXiv:2406.11617).

    Raises UserError if epsilon does not fit the density, or weights that are to divide a plain sum cancel.
    """
    pieces = [
        sampled(delta, part, epsilon, draw, number, unbiased=rescale is True)
        for number, (delta, part) in enumerate(zip(deltas, density, strict=True))
    ]
    step = row_step(deltas[0])
    rows = stacked(deltas, pieces, density, rescale if rescale == "l1" else False, step)
    return elect_or_add(deltas[0], rows, weights, sign=sign, votes=votes, normalize=normalize, step=step)
