"""A matrix as the product of two thin ones: the best of a rank, by exact or randomised SVD, with what it loses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_EXACT = 256  # up to this side an exact SVD takes milliseconds
_OVERSAMPLING = 16
_POWER = 3
_PIECE = 1 << 22  # elements of the residual that are in memory at once


@torch.no_grad()
def factorise(
    delta: Float[Tensor, "out in"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], float]:
    """A and B with B·A ≈ delta, and ‖delta − B·A‖ / ‖delta‖ (Frobenius; 0 for a delta of zeros).

    The rank is at most the smaller side's. Both factors carry the root of each singular value. Large matrices are
    decomposed by a randomised range finder with power iterations (arXiv:0909.4061, algorithm 4.4).
    """
    rank = min(rank, *delta.shape)
    u, s, vh = _svd(delta.to(torch.float32), rank, generator)
    roots = s[:rank].sqrt()
    a, b = (roots.unsqueeze(1) * vh[:rank]).contiguous(), (u[:, :rank] * roots).contiguous()
    return a, b, _relative_error(delta, a, b)


def _svd(delta: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    sides, sample = min(delta.shape), rank + _OVERSAMPLING
    if sides <= _EXACT or 2 * sample >= sides:
        exact: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(delta, full_matrices=False)
        return exact
    start = torch.randn(delta.shape[1], sample, generator=generator, device=delta.device)
    basis = torch.linalg.qr(delta @ start).Q
    for _ in range(_POWER):
        # orthonormal after each product, or the small singular values drown in the rounding of the large ones
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ u, s, vh


def _relative_error(delta: Tensor, a: Tensor, b: Tensor) -> float:
    """From the residual itself: a difference of squared norms could not tell 1e-7 from 1e-4."""
    lost = whole = 0.0
    height = max(1, _PIECE // delta.shape[1])
    for rows, left in zip(delta.split(height), b.split(height), strict=True):
        lost += float((rows - left @ a).norm()) ** 2
        whole += float(rows.norm()) ** 2
    return (lost / whole) ** 0.5 if whole else 0.0
