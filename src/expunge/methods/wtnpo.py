"""TNPO and WTNPO: NPO's weight for each token instead of each answer (G-effect, arXiv 2502.19301)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="wtnpo",
    idea="ascent weighted per token by NPO's weight times its probability",
    formula="E_t sg[2p^(β+α) / (p^β + p_start^β)] · log p",
    paper="2502.19301",
    kind="removes",
    reference=True,
    nll=1.0,
    rates=(1e-5, 2e-5),
)
class WTNPO(Objective):
    """α = 0 is TNPO, whose weight is the factor that NPO's gradient has, taken per token."""

    beta: float = hyper(4.0, gt=0, description="inverse temperature of NPO's weight", published="4")
    alpha: float = hyper(1.5, ge=0, description="power of the probability beside it; 0 is TNPO", published="0, 1.5")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Weighted mean log-prob of the forget tokens; the weight has no gradient."""
        rows = step.forget
        weight = self.weight(rows.token_logprobs.detach(), rows.reference_token_logprobs)
        return {"forget": rows.mean_tokens(weight * rows.token_logprobs)}

    def weight(self, logp: Float[Tensor, " N"], start: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """2p^(β+α) / (p^β + p_start^β), from log-probs, so that tiny probabilities don't divide zero by zero."""
        return 2 * torch.exp((self.beta + self.alpha) * logp - torch.logaddexp(self.beta * logp, self.beta * start))
