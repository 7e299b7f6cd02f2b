"""UNDIAL: distil the start model with the forget token's logit lowered (arXiv 2402.10052)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="undial",
    idea="distil the start model with the answer tokens' logits lowered",
    formula="E_t CE(softmax(z_start − β · e_y), p)",
    paper="2402.10052",
    kind="suppresses",
    distribution=True,
    rates=(1e-5, 1e-4, 3e-4),
)
class Undial(Objective):
    """The goal is fixed and reachable, so training is stable without a retain term; only answer tokens are about it."""

    beta: float = hyper(
        10.0, ge=0, description="by how much the answer token's logit is lowered", published="3, 10, 30"
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget tokens of the cross-entropy against the adjusted start distribution."""
        rows = step.forget
        return {"forget": rows.mean_tokens(rows.over_logits(self.distil, reference=True))}

    def distil(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], start: Float[Tensor, "n V"]
    ) -> Float[Tensor, " n"]:
        """Cross-entropy of each distribution against the start model's without (some of) the answer token."""
        lowered = start.scatter_add(-1, targets[:, None], start.new_full((len(targets), 1), -self.beta))
        return -(lowered.softmax(-1) * logits.log_softmax(-1)).sum(-1)
