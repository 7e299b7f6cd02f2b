"""SatImp: ascent weighted by saturation and importance of the tokens (arXiv 2505.11953)."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="satimp",
    idea="ascent that spares tokens already forgotten and tokens too certain",
    formula="E_t sg[p^β₁ · (1 − p)^β₂] · log p",
    paper="2505.11953",
    kind="removes",
    nll=0.1,
    rates=(1e-5, 2e-5),
)
class SatImp(Objective):
    """p^β₁ is the saturation (what is left to forget), (1 − p)^β₂ the importance (what carries information)."""

    beta1: float = hyper(5.0, ge=0, description="power of p in the weight", published="5")
    beta2: float = hyper(1.0, ge=0, description="power of 1 − p in the weight", published="1")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Weighted mean log-prob of the forget tokens; the weight has no gradient."""
        logp = step.forget.token_logprobs
        known = logp.detach()
        weight = (self.beta1 * known).exp() * (-torch.expm1(known)) ** self.beta2
        return {"forget": step.forget.mean_tokens(weight * logp)}
