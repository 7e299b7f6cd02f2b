"""ME+GD: make the model uncertain of every token of the forget rows (arXiv 2410.08109)."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="max_entropy",
    idea="flatten the next-token distribution at every forget token",
    formula="0.1 · E_t KL(p ‖ uniform)",
    paper="2410.08109",
    kind="suppresses",
    span="sequence",
    nll=1.0,
    rates=(1e-5,),
)
class MaxEntropy(Objective):
    """Over prompt and answer by default, as published; zero where the model knows nothing, log V where it is sure."""

    coefficient: float = hyper(
        0.1, gt=0, description="weight beside the retain term; forget_weight multiplies it", published="0.1"
    )
    divergence: Literal["entropy", "uniform"] = hyper(
        "entropy", description="KL(p ‖ uniform) = log V − entropy (the paper), or KL(uniform ‖ p) (the authors' code)"
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget tokens of the divergence from the uniform distribution, in nats."""
        rows = step.forget
        return {"forget": self.coefficient * rows.mean_tokens(rows.over_logits(self.from_uniform))}

    def from_uniform(self, logits: Float[Tensor, "n V"], _: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Divergence of each distribution from the uniform one."""
        logp, size = logits.log_softmax(-1), math.log(logits.shape[-1])
        if self.divergence == "uniform":
            return -logp.mean(-1) - size
        return size + (logp.exp() * logp).sum(-1)
