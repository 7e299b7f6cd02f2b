"""SCE: select what differs most between the models, calculate their weights, erase minority signs."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from expunge.merging.combine import Rows, Sign, elect
from expunge.merging.registry import merge
from expunge.merging.selection import CHUNK, cut, kept_count

TopK = Annotated[
    float, Field(gt=0, le=1, description="part of the elements that takes part: those whose variance is largest")
]


@merge(
    "sce",
    summary="select the elements that vary most, weigh each model by its sum of squares, average what agrees in sign",
    paper="arXiv:2408.07990",
    models=(2, None),
    weighs=False,
    scopes=("tensor",),
)
def sce(
    deltas: list[Float[Tensor, "*shape"]],
    weights: list[float],
    density: list[float],
    *,
    select_topk: TopK = 1.0,
    sign: Sign = "total",
) -> Float[Tensor, "*shape"]:
    """Merged delta of one parameter; the weights are found, and `density` is not used (arXiv:2408.07990)."""
    rows = _selected([delta.reshape(-1) for delta in deltas], select_topk)
    numel = deltas[0].numel()
    energies = torch.zeros(len(deltas), dtype=torch.float64)
    for start in range(0, numel, CHUNK):
        energies += rows(start, min(start + CHUNK, numel)).square_().sum(1).cpu()
    total = float(energies.sum())
    shares = [float(energy) / total if total > 0 else 1 / len(deltas) for energy in energies]
    return elect(deltas[0], rows, shares, sign=sign, votes="equal", normalize=True)


def _selected(flats: list[Tensor], part: float) -> Rows:
    """The rows with 0 in the columns that vary little between the models."""

    def all_of(start: int, end: int) -> Tensor:
        return torch.stack([flat[start:end] for flat in flats])

    if part >= 1:
        return all_of
    numel = flats[0].numel()
    spread = torch.empty_like(flats[0])
    for start in range(0, numel, CHUNK):
        end = min(start + CHUNK, numel)
        values = all_of(start, end)
        spread[start:end] = values.sub_(values.mean(0)).square_().sum(0)  # its order is that of the variance
    at = cut(spread, kept_count(numel, part))

    def rows(start: int, end: int) -> Tensor:
        values = spread[start:end]
        place = torch.arange(start, end, device=values.device)
        chosen = (values > at.threshold) | ((values == at.threshold) & (place <= at.last))
        return all_of(start, end).mul_(chosen)

    return rows
