"""Linear merging: the weighted sum or mean of the differences, or of the checkpoints themselves."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import Mean, weighted_sum
from expunge.merging.registry import merge


@merge(
    "linear",
    summary="weighted mean of the differences (with normalize=false their weighted sum)",
    paper="arXiv:2203.05482",
    needs_base=False,
)
def linear(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    normalize: Mean = True,
) -> Float[Tensor, "*shape"]:
    """Weighted mean of the deltas of one parameter; `density` is not used. Raises UserError if the weights sum to 0."""
    return weighted_sum(deltas, weights, normalize=normalize)
