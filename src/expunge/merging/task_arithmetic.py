"""Task arithmetic: add and subtract task vectors."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import Mean, weighted_sum
from expunge.merging.registry import merge


@merge(
    "task_arithmetic",
    summary="weighted sum of the differences; a negative weight takes away what that model learnt",
    paper="arXiv:2212.04089",
)
def task_arithmetic(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    normalize: Mean = False,
) -> Float[Tensor, "*shape"]:
    """Σ w·Δ of one parameter; `density` is not used. Raises UserError if weights that are to divide it sum to 0."""
    return weighted_sum(deltas, weights, normalize=normalize)
