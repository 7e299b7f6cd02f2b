"""Model stock: how far to go from the base to the mean of the models, by the angle between them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from expunge.merging.combine import inner_products, weighted_sum
from expunge.merging.registry import merge


@merge(
    "model_stock",
    summary="mean of the differences, shortened per tensor by how little they point the same way",
    paper="arXiv:2403.19522",
    models=(2, None),
    weighs=False,
    scopes=("tensor",),
)
def model_stock(
    deltas: list[Float[Tensor, "*shape"]], weights: list[float], density: list[float]
) -> Float[Tensor, "*shape"]:
    """t · mean Δ with t = N cos θ / (1 + (N−1) cos θ), cos θ the mean over all pairs (arXiv:2403.19522).

    Differences that point away from each other on average (cos θ ≤ 0) have nothing in common: the base stays.
    """
    count = len(deltas)
    products = inner_products(deltas)
    norms = products.diagonal().sqrt()
    cosines = products / norms.outer(norms).clamp_(min=1e-300)  # of a model that changes nothing: 0
    cosine = (float(cosines.sum()) - float(cosines.trace())) / (count * (count - 1))
    t = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
    return weighted_sum(deltas, [t / count] * count)
