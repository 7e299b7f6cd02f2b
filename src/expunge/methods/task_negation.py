"""Task negation: learn the forget rows better, then go the other way (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.methods.base import WeightObjective, hyper, objective


def negated(start: Tensor, change: Tensor, alpha: float) -> Tensor:
    """start − α · change, computed in float32 at least."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return (start.to(wide) - alpha * change.to(wide)).to(start.dtype)


def difference(start: Tensor, trained: Tensor) -> Tensor:
    """trained − start, computed in float32 at least: in bfloat16 a small change would be lost."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return trained.to(wide) - start.to(wide)


@objective(
    name="task_negation",
    idea="fine-tune on the forget answers, then subtract what changed",
    formula="θ − α · (θ_ft − θ), θ_ft = argmin NLL(forget)",
    paper="2212.04089",
    kind="suppresses",
)
class TaskNegation(WeightObjective):
    """Retain terms would be learnt and subtracted as well: leave them at none."""

    alpha: float = hyper(
        5.0, gt=0, description="how much of the change is subtracted", published="0.05 to 1 (paper), 5 (MUSE)"
    )

    def combine(self, start: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """θ − α(θ_ft − θ)."""
        return negated(start, difference(start, trained[0]), self.alpha)
