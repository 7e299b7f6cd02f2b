"""Effective unlearning loss: descend on the reciprocal of the forget loss (CCM at SemEval-2025, arXiv 2507.16263)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step

#: A float32 log-prob is 0 or further from it than this.
SMALLEST = 1e-7


@objective(
    name="eul",
    idea="shrink the reciprocal of the forget answers' loss",
    formula="E 1 / NLL(forget)",
    paper="2507.16263",
    kind="removes",
    nll=1.0,
    rates=(1e-4,),
)
class EUL(Objective):
    """Bounded ascent: its pull fades with the square of the loss, and is strongest where an answer is known best.

    The reciprocal is of each row's mean token NLL, so that a step does not depend on how rows share micro-batches
    (the authors' code takes it of the micro-batch's mean).
    """

    power: Literal[1, 2] = hyper(1, description="1/NLL, or its square", published="1, 2")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows of NLL^−power; a row of which the loss sees no token adds nothing."""
        rows = step.forget
        losses = rows.mean_per_row(-rows.token_logprobs).clamp(min=SMALLEST)
        seen = rows.sum_per_row(torch.ones_like(rows.token_logprobs)) > 0
        return {"forget": rows.mean_rows(seen / losses**self.power)}
