"""SimNPO: negative preference optimisation without a reference (arXiv 2410.07163)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="simnpo",
    idea="push the forget answers' per-token likelihood down, without a reference",
    formula="−0.125 · (2/β) · E log σ(−(β/|y|) · log p − γ)",
    paper="2410.07163",
    kind="suppresses",
    nll=1.0,
)
class SimNPO(Objective):
    """The margin γ stands outside the product with β, as in the paper (public code uses β·δ; γ = β·δ)."""

    beta: float = hyper(
        4.5, gt=0, description="inverse temperature", published="3.5, 4.5 (TOFU forget10), 2.5 (forget05), 0.7 (MUSE)"
    )
    gamma: float = hyper(0.0, ge=0, description="margin", published="0")
    coefficient: float = hyper(
        0.125,
        gt=0,
        description="weight beside the retain term; forget_weight multiplies it",
        published="0.125 (TOFU forget10), 0.1375 (forget05), 0.25, 1 beside 0.1·nll (MUSE)",
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows of the length-normalised saturating ascent."""
        rows = step.forget
        per_token = rows.mean_per_row(rows.token_logprobs)
        losses = -2 / self.beta * logsigmoid(-self.beta * per_token - self.gamma)
        return {"forget": self.coefficient * rows.mean_rows(losses)}
