"""SLERP: from one model to another along the arc between them."""

from __future__ import annotations

import math
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.combine import inner_products, sum_of, weighted_sum
from expunge.merging.registry import merge

# Below this sine of the angle the arc is straight to float32, or, between opposites, could go anywhere.
_STRAIGHT = 1e-3

Place = Annotated[
    float | None,
    Field(ge=0, le=1, description="place between the first model (0) and the second (1); none: by the weights"),
]


@merge(
    "slerp",
    summary="go from one model to another along the arc between their differences, or, without a base, between them",
    paper="doi:10.1145/325165.325242",
    needs_base=False,
    models=(2, 2),
    scopes=("tensor",),
)
def slerp(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    t: Place = None,
) -> Float[Tensor, "*shape"]:
    """sin((1−t)Ω)/sin Ω · Δ₁ + sin(tΩ)/sin Ω · Δ₂ with the angle Ω between them; straight if they are (anti)parallel.

    t = w₂/(w₁+w₂) unless it is given; `density` is not used. Raises UserError for weights that say no place.
    """
    if t is None:
        if min(weights) < 0:
            raise UserError(
                f"slerp goes between two models, and the weight {min(weights):g} is negative", "add: --set t=0.5"
            )
        t = weights[1] / sum_of(weights)
    products = inner_products(deltas)
    norms = math.sqrt(float(products[0, 0]) * float(products[1, 1]))
    cosine = max(-1.0, min(1.0, float(products[0, 1]) / norms)) if norms > 0 else 1.0
    sine = math.sqrt(1 - cosine * cosine)
    if sine < _STRAIGHT:
        return weighted_sum(deltas, [1 - t, t])
    angle = math.acos(cosine)
    return weighted_sum(deltas, [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine])
