"""What merge methods have in common: weighted sums and means of differences, and the election of signs.

Work goes piece by piece through the flat tensor, so that beside inputs and result only a few pieces are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.ahead import room
from expunge.merging.selection import CHUNK

#: (start, end) → what each model contributes to that piece of the flat tensor: models × (end − start), fresh.
Rows = Callable[[int, int], Tensor]

Sign = Annotated[
    Literal["total", "frequency"],
    Field(description="elect the sign of the sum of the values (total) or of the sum of their signs; 0 counts as +"),
]
Election = Annotated[
    Literal["none", "total", "frequency"],
    Field(description="elect a sign as ties does, by the sum of the values or of their signs, or sum up all (none)"),
]
Votes = Annotated[
    Literal["weighted", "equal"],
    Field(description="whether the weights already count when the sign is elected"),
]
Normalize = Annotated[
    Literal["count"] | bool,
    Field(description="divide the sum of what agrees by the sum of its weights (true), by its number (count), or not"),
]
Mean = Annotated[bool, Field(description="divide by the sum of the weights: a mean (true) or a sum (false)")]

_FEW = 8
_TINY = torch.finfo(torch.float32).tiny  # where nobody agrees the sum is 0 as well


def elect(
    like: Float[Tensor, "*shape"],
    rows: Rows,
    weights: Sequence[float],
    *,
    sign: str,
    votes: str,
    normalize: str | bool,
    step: int = CHUNK,
) -> Float[Tensor, "*shape"]:
    """Elect a sign per element and sum or average what agrees with it (arXiv:2306.01708), in pieces of `step`."""
    factors = torch.tensor(weights, dtype=torch.float32, device=like.device).unsqueeze(1)
    # a factor of 1 changes no bit, and is what most merges have
    weighted_votes, equal = votes == "weighted", all(weight == 1 for weight in weights)
    shares = None if normalize == "count" or all(abs(weight) == 1 for weight in weights) else factors.abs()
    merged = _space(like)
    for start in range(0, merged.numel(), step):  # in place within a piece, so that all of it stays in the cache
        end = min(start + step, merged.numel())
        values = rows(start, end)
        if weighted_votes and not equal:
            values.mul_(factors)
        ballot = _over_models(values if sign == "total" else values.sign())
        elected = ballot.ge_(0).mul_(2).sub_(1)
        values.mul_(elected).clamp_(min=0)  # what points the elected way, and 0 for the rest
        total = _over_models(values if weighted_votes or equal else values * factors).mul_(elected)
        if normalize:
            # |w|: a negative weight turns its difference round; it must not turn the average round as well
            agreeing = values.sign_() if shares is None else values.sign_().mul_(shares)
            total.div_(_over_models(agreeing).clamp_(min=_TINY))
        merged[start:end] = total
    return merged.view_as(like)


def _space(like: Tensor) -> Float[Tensor, " n"]:
    """An uninitialised flat tensor of that size, on its device."""
    return room((like.numel(),)) if like.device.type == "cpu" else like.new_empty(like.numel())


def _over_models(values: Float[Tensor, "models n"]) -> Float[Tensor, " n"]:
    """`values.sum(0)` to the bit, but four times as fast where there are few models."""
    if len(values) > _FEW:
        return values.sum(0)
    total = values[0] + 0.0  # −0 becomes 0, as in a sum
    for row in values[1:]:
        total.add_(row)
    return total


def add_up(
    like: Float[Tensor, "*shape"],
    rows: Rows,
    weights: Sequence[float],
    *,
    normalize: str | bool = False,
    step: int = CHUNK,
) -> Float[Tensor, "*shape"]:
    """Weighted sum of the rows, divided by the sum of all weights (true) or the number of models (count), or not.

    Raises UserError for weights that cancel.
    """
    divisor = len(weights) if normalize == "count" else sum_of(weights) if normalize else 1.0
    factors = torch.tensor([weight / divisor for weight in weights], dtype=torch.float32, device=like.device)
    merged = _space(like)
    for start in range(0, merged.numel(), step):
        end = min(start + step, merged.numel())
        torch.mv(rows(start, end).t(), factors, out=merged[start:end])
    return merged.view_as(like)


def elect_or_add(
    like: Float[Tensor, "*shape"],
    rows: Rows,
    weights: Sequence[float],
    *,
    sign: str,
    votes: str,
    normalize: str | bool,
    step: int = CHUNK,
) -> Float[Tensor, "*shape"]:
    """`add_up` for the sign "none", else `elect`. Raises UserError for weights that cancel."""
    if sign == "none":
        return add_up(like, rows, weights, normalize=normalize, step=step)
    return elect(like, rows, weights, sign=sign, votes=votes, normalize=normalize, step=step)


def weighted_sum(
    deltas: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, normalize: bool = False
) -> Float[Tensor, "*shape"]:
    """Σ w·Δ, divided by Σ w if wanted, as a fresh tensor, one model after the other. Raises UserError if Σ w is 0."""
    divisor = sum_of(weights) if normalize else 1.0
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta, alpha=weight)
    return merged.div_(divisor) if normalize else merged


def sum_of(weights: Sequence[float]) -> float:
    """The sum of the weights as a divisor. Raises UserError if it is 0."""
    divisor = sum(weights)
    if abs(divisor) < 1e-8:
        raise UserError(
            "the differences can't be divided by the sum of the weights, which is 0", "add: --set normalize=false"
        )
    return divisor


def inner_products(deltas: Sequence[Float[Tensor, "*shape"]]) -> Float64[Tensor, "models models"]:
    """⟨Δ_i, Δ_j⟩ over the whole tensor, on the CPU; in float32 within a piece, in float64 over the pieces."""
    flats = [delta.reshape(-1) for delta in deltas]
    total = torch.zeros(len(flats), len(flats), dtype=torch.float64)
    for start in range(0, flats[0].numel(), CHUNK):
        rows = torch.stack([flat[start : start + CHUNK] for flat in flats])
        total += (rows @ rows.t()).cpu()
    return total
