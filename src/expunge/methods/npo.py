"""Negative preference optimisation (arXiv 2404.05868)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="npo",
    idea="push forget answers below the start model's likelihood, with saturation",
    formula="−(2/β) · E log σ(−β · log(p/p_start))",
    paper="2404.05868",
    kind="suppresses",
    reference=True,
    nll=1.0,
)
class NPO(Objective):
    """Bounded ascent: its gradient fades where the answer has become less likely than at the start."""

    beta: float = hyper(0.1, gt=0, description="inverse temperature; → 0 is gradient ascent", published="0.05 to 0.5")
    level: Literal["sequence", "mean", "token"] = hyper(
        "sequence",
        description="log-ratio summed per answer (the paper), averaged per answer, or per token",
        published="sequence; mean (ZJUKLAB at SemEval-2025), token (Atyaephyra there, β 0.5)",
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows (or tokens) of the saturating ascent."""
        rows = step.forget
        if self.level == "token":
            ratio = rows.token_logprobs - rows.reference_token_logprobs
            return {"forget": rows.mean_tokens(-2 / self.beta * logsigmoid(-self.beta * ratio))}
        ratio = rows.sequence_logprobs - rows.reference_sequence_logprobs
        if self.level == "mean":
            ratio = ratio / rows.lengths
        return {"forget": rows.mean_rows(-2 / self.beta * logsigmoid(-self.beta * ratio))}
