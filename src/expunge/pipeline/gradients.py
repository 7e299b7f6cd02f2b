"""Steps whose forget gradient is changed before the retain gradient is added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.recipe import RelearningConfig

#: Runs forward and backward of one side of a whole optimizer step; gradients are added up in `.grad`.
Backward = Callable[[str], None]


#: The side that teaches the forget rows again.
RELEARN = "relearn"


def two_sided(
    parameters: Sequence[Tensor],
    backward: Backward,
    *,
    rho: float | None = None,
    project: bool = False,
    relearning: RelearningConfig | None = None,
) -> None:
    """Leave in `.grad` the retain gradient plus the forget gradient as the wrappers change it.

    `rho`: the forget gradient is taken at θ + ρ·g/‖g‖ (sharpness-aware, arXiv 2502.05374). `project`: where it points
    against the retain gradient, that part is taken out of it (GRU, arXiv 2503.09117). `relearning`: it is taken where
    steps of −lr · sign(∇NLL(forget)) lead from θ, to first order (as tamper resistance does, arXiv 2408.00761).
    """
    _clear(parameters)
    before = _relearned(parameters, backward, relearning) if relearning is not None else []
    backward("forget")
    if rho is not None:
        _at_sharpest(parameters, backward, rho)
    with torch.no_grad():
        for parameter, start in zip(parameters, before, strict=False):
            parameter.copy_(start)
    if not project:
        backward("retain")
        return
    forget = [None if p.grad is None else p.grad.clone() for p in parameters]
    _clear(parameters)
    backward("retain")
    _add_without_conflict(parameters, forget)


@torch.no_grad()
def _relearned(parameters: Sequence[Tensor], backward: Backward, relearning: RelearningConfig) -> list[Tensor]:
    """Move the parameters to where a relearning leads, without gradients left behind; what they were before."""
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(relearning.steps):
        with torch.enable_grad():
            backward(RELEARN)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(relearning.lr * parameter.grad.sign())
        _clear(parameters)
    return before


@torch.no_grad()
def _at_sharpest(parameters: Sequence[Tensor], backward: Backward, rho: float) -> None:
    """Replace the forget gradient in `.grad` by the one a step of length ρ up its own direction."""
    moved = [(p, p.detach().clone(), p.grad) for p in parameters if p.grad is not None]
    norm = torch.stack([gradient.norm() for _, _, gradient in moved]).norm() if moved else torch.tensor(0.0)
    if not norm > 0:
        return
    for parameter, _, gradient in moved:
        parameter.add_(gradient * (rho / norm))
    _clear(parameters)
    with torch.enable_grad():
        backward("forget")
    for parameter, before, _ in moved:
        parameter.copy_(before)


@torch.no_grad()
def _add_without_conflict(parameters: Sequence[Tensor], forget: Sequence[Tensor | None]) -> None:
    """`.grad` (retain) += forget − min(0, ⟨forget, retain⟩)/‖retain‖² · retain, over all parameters as one vector."""
    pairs = [(p.grad, g) for p, g in zip(parameters, forget, strict=True) if p.grad is not None and g is not None]
    dot = sum(((g * r).sum(dtype=torch.float32) for r, g in pairs), torch.tensor(0.0))
    square = sum((p.grad.float().square().sum() for p in parameters if p.grad is not None), torch.tensor(0.0))
    conflict = (dot.clamp(max=0) / square) if square > 0 else torch.zeros_like(dot)
    for parameter, gradient in zip(parameters, forget, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(1 - conflict.to(parameter.grad.dtype))
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _clear(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        parameter.grad = None
