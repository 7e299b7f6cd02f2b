"""TIES: trim, elect a sign, average the differences that agree."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.merging.registry import merge
from expunge.merging.selection import CHUNK, cut, kept_count, trimmed

Sign = Annotated[
    Literal["total", "frequency"],
    Field(description="elect the sign of the sum of the values (total) or of the sum of their signs; 0 counts as +"),
]
Votes = Annotated[
    Literal["weighted", "equal"],
    Field(description="whether the weights already count when the sign is elected"),
]
Normalize = Annotated[
    Literal["count"] | bool,
    Field(description="divide the sum of agreeing values by the sum of their weights (true), by their number, or not"),
]


_TINY = torch.finfo(torch.float32).tiny  # where nobody agrees the sum is 0 as well


@merge(
    "ties",
    summary="keep the largest part of each difference, elect a sign per weight, average what agrees with it",
    paper="arXiv:2306.01708",
    trims=True,
)
def ties(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    sign: Sign = "total",
    votes: Votes = "weighted",
    normalize: Normalize = True,
) -> Float[Tensor, "*shape"]:
    """Merged delta of one parameter; `density[i]` of the elements of `deltas[i]` take part (arXiv:2306.01708)."""
    flats = [delta.reshape(-1) for delta in deltas]
    cuts = [cut(flat, kept_count(flat.numel(), part)) for flat, part in zip(flats, density, strict=True)]
    factors = torch.tensor(weights, dtype=torch.float32, device=deltas[0].device).unsqueeze(1)
    weighted_votes, shares = votes == "weighted", None if normalize == "count" else factors.abs()
    merged = torch.empty_like(flats[0])
    for start in range(0, merged.numel(), CHUNK):  # in place within a chunk, so that all of it stays in the cache
        end = start + CHUNK
        rows = torch.stack([trimmed(flat[start:end], start, at) for flat, at in zip(flats, cuts, strict=True)])
        if weighted_votes:
            rows.mul_(factors)
        ballot = rows.sum(0) if sign == "total" else rows.sign().sum(0)
        elected = ballot.ge_(0).mul_(2).sub_(1)
        rows.mul_(elected).clamp_(min=0)  # what points the elected way, and 0 for the rest
        total = (rows if weighted_votes else rows * factors).sum(0).mul_(elected)
        if normalize:
            # |w|: a negative weight turns its difference round; it must not turn the average round as well
            agreeing = rows.sign_() if shares is None else rows.sign_().mul_(shares)
            total.div_(agreeing.sum(0).clamp_(min=_TINY))
        merged[start:end] = total
    return merged.view_as(deltas[0])
