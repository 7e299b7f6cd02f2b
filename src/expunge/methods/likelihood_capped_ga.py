"""Ascent that ends at a loss: likelihood capping (arXiv 2406.09179)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="likelihood_capped_ga",
    idea="climb each forget answer's loss up to a cap, then stop",
    formula="E max(0, δ − NLL(forget))",
    paper="2406.09179",
    kind="removes",
    nll=1.0,
    rates=(1e-5, 2e-5),
)
class LikelihoodCappedGA(Objective):
    """The loss that is capped is the mean token NLL of each row: rows that have reached δ have no gradient."""

    cap: float = hyper(4.0, gt=0, description="δ, mean NLL per token at which a row is done", published="2 to 6")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows of what is left to the cap, in nats per token."""
        rows = step.forget
        return {"forget": rows.mean_rows((self.cap + rows.mean_per_row(rows.token_logprobs)).relu())}
