"""UWC mixing: an unlearned model on its way back to the target."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.merging.registry import merge

Alpha = Annotated[
    float, Field(ge=0, le=1, description="part of the way from the target (0) to the unlearned model (1)")
]


@merge(
    "uwc_mix",
    summary="mix an unlearned model back towards its target, the base; expunge calibrate finds alpha",
    paper="arXiv:2406.09179",
    models=(1, 1),
    weighs=False,
    scopes=("tensor",),
)
def uwc_mix(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    alpha: Alpha = 1.0,
) -> Float[Tensor, "*shape"]:
    """α Δ of the one model, so that θ = θ_target + α Δ; neither weights nor density (arXiv:2406.09179)."""
    return deltas[0] * alpha
