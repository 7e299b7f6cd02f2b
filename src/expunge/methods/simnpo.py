"""SimNPO: negative preference optimisation without a reference (arXiv 2410.07163)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="simnpo",
    idea="push the forget answers' per-token likelihood down, without a reference",
    formula="−(2/β) · E log σ(−(β/|y|) · log p − γ)",
    paper="2410.07163",
    kind="suppresses",
    nll=1.0,
)
class SimNPO(Objective):
    """The margin γ stands outside the product with β, as in the paper (public code uses β·δ; γ = β·δ)."""

    beta: float = hyper(4.5, gt=0, description="inverse temperature")
    gamma: float = hyper(0.0, ge=0, description="margin")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows of the length-normalised saturating ascent."""
        rows = step.forget
        per_token = rows.sequence_logprobs / rows.lengths
        return {"forget": rows.mean_rows(-2 / self.beta * logsigmoid(-self.beta * per_token - self.gamma))}
