"""Linear merging: the weighted sum or mean of the differences, or of the checkpoints themselves."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.registry import merge

Normalize = Annotated[bool, Field(description="divide by the sum of the weights: a mean (true) or a sum (false)")]


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
    normalize: Normalize = True,
) -> Float[Tensor, "*shape"]:
    """Weighted mean of the deltas of one parameter; `density` is not used. Raises UserError if the weights sum to 0."""
    divisor = sum(weights) if normalize else 1.0
    if abs(divisor) < 1e-8:
        raise UserError("linear can't divide by the sum of the weights, which is 0", "add: --set normalize=false")
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta, alpha=weight)
    return merged.div_(divisor)
