"""NegMerge: subtract what several fine-tunings on the forget rows agree on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.merging.registry import merge
from expunge.merging.selection import CHUNK
from expunge.models.consensus import unanimous_mean


@merge(
    "negmerge",
    summary="subtract the mean of the differences where all have one sign; the models were fine-tuned on forget rows",
    paper="arXiv:2410.05583",
    models=(2, None),
    weighs=False,
    scopes=("tensor",),
)
def negmerge(
    deltas: list[Float[Tensor, "*shape"]], weights: list[float], density: list[float]
) -> Float[Tensor, "*shape"]:
    """−mean Δ at elements where all agree in sign, 0 elsewhere; neither weights nor density (arXiv:2410.05583)."""
    flats = [delta.reshape(-1) for delta in deltas]
    merged = torch.empty_like(flats[0])
    for start in range(0, merged.numel(), CHUNK):
        merged[start : start + CHUNK] = unanimous_mean(flat[start : start + CHUNK] for flat in flats).neg_()
    return merged.view_as(deltas[0])
