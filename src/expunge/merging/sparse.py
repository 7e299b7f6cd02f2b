"""One model's difference with a part of its elements set to 0, piece by piece: the largest, a middle, or by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.combine import Rows
from expunge.merging.draw import Draw
from expunge.merging.selection import CHUNK, cut, kept_count, trimmed

#: (start, end) → that piece of the sparse flat difference, fresh and the same whenever it is asked for.
Piece = Callable[[int, int], Tensor]

Rescale = Annotated[
    Literal["l1"] | bool,
    Field(description="multiply what is kept by 1/density (true), by what restores its sum of magnitudes (l1), or not"),
]


def largest(delta: Float[Tensor, "*shape"], density: float) -> Piece:
    """The largest magnitudes stay: `density` of all elements, exactly."""
    return between(delta, density, 0.0)


def between(delta: Float[Tensor, "*shape"], density: float, gamma: float) -> Piece:
    """`density` of all elements stay: the largest but for a part `gamma` of all, as far as so many may go."""
    flat = delta.reshape(-1)
    keep = kept_count(flat.numel(), density)
    outliers = min(kept_count(flat.numel(), gamma), flat.numel() - keep)
    low = cut(flat, keep + outliers)
    if outliers == 0:
        return lambda start, end: trimmed(flat[start:end], start, low)
    high = cut(flat, outliers)

    def piece(start: int, end: int) -> Tensor:
        values = flat[start:end]
        # the outliers are among what the lower cut keeps: x − x is 0
        return trimmed(values, start, low).sub_(trimmed(values, start, high))

    return piece


def dropped(delta: Float[Tensor, "*shape"], density: float, draw: Draw, model: int) -> Piece:
    """Every element stays with the probability `density`, by itself (arXiv:2311.03099)."""
    flat = delta.reshape(-1)
    if density >= 1:
        return lambda start, end: flat[start:end].clone()
    return lambda start, end: flat[start:end] * (draw.uniform(model, start, end, flat.device) < density)


def row_step(delta: Float[Tensor, "*shape"]) -> int:
    """Elements in pieces of whole rows: about CHUNK, and one row at least. A row is the last dimension."""
    columns = _columns(delta)
    return max(1, CHUNK // columns) * columns


def sampled(
    delta: Float[Tensor, "*shape"], density: float, epsilon: float, draw: Draw, model: int, *, unbiased: bool
) -> Piece:
    """Larger magnitudes of a row stay with higher probability: from density − ε to + ε by rank (arXiv:2406.11617).

    `unbiased` divides by that probability. Pieces must begin and end with a row. Raises UserError for an epsilon with
    which something would stay surely, or never.
    """
    flat = delta.reshape(-1)
    if density >= 1:
        return lambda start, end: flat[start:end].clone()
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise UserError(
            f"epsilon {epsilon:g} around density {density:g} leaves the probabilities between 0 and 1",
            f"give an epsilon below {min(density, 1 - density):g}, or density 1 to keep all",
        )
    columns = _columns(delta)
    lowest, slope = density - epsilon, 2 * epsilon / max(1, columns - 1)
    ranks = torch.arange(columns, dtype=torch.float32, device=flat.device)
    by_rank = ranks.mul_(slope).add_(lowest) if columns > 1 else ranks.fill_(density)

    def piece(start: int, end: int) -> Tensor:
        values = flat[start:end].view(-1, columns)
        order = values.abs().argsort(dim=1, stable=True)
        probability = torch.empty_like(values).scatter_(1, order, by_rank.expand_as(values))
        kept = values * (draw.uniform(model, start, end, flat.device).view_as(values) < probability)
        return (kept.div_(probability) if unbiased else kept).view(-1)

    return piece


def stacked(
    deltas: Sequence[Float[Tensor, "*shape"]],
    pieces: Sequence[Piece],
    density: Sequence[float],
    rescale: str | bool,
    step: int = CHUNK,
) -> Rows:
    """The models' pieces above each other, each rescaled as asked."""
    factors = [
        _factor(delta.reshape(-1), piece, part, rescale, step)
        for delta, piece, part in zip(deltas, pieces, density, strict=True)
    ]

    def rows(start: int, end: int) -> Tensor:
        found = [piece(start, end) for piece in pieces]
        return torch.stack(
            [row if factor == 1 else row.mul_(factor) for row, factor in zip(found, factors, strict=True)]
        )

    return rows


def _factor(flat: Tensor, piece: Piece, density: float, rescale: str | bool, step: int) -> float:
    if rescale is False or density >= 1:
        return 1.0
    if rescale is True:
        return 1 / density
    whole = kept = 0.0
    for start in range(0, flat.numel(), step):
        end = min(start + step, flat.numel())
        whole += float(flat[start:end].abs().sum())
        kept += float(piece(start, end).abs().sum())
    return whole / kept if kept > 0 else 1.0


def _columns(delta: Tensor) -> int:
    return max(1, delta.shape[-1]) if delta.dim() > 0 else 1
