"""Inverted hinge loss of LoKU (arXiv 2408.06621)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, objective
from expunge.methods.step import Step


@objective(
    name="ihl",
    idea="let the runner-up token overtake the forget token",
    formula="E_t 1 + p(y) − max_{v≠y} p(v)",
    paper="2408.06621",
    kind="removes",
    nll=1.0,
    rates=(1e-4,),
)
class IHL(Objective):
    """Bounded between 0 and 2. LoKU's other half, the initialisation FILA of the adapters, is not part of it."""

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget tokens."""
        rows = step.forget
        return {"forget": rows.mean_tokens(rows.over_logits(self.hinge))}

    @staticmethod
    def hinge(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 + p(target) − the largest other probability."""
        probabilities, place = logits.softmax(-1), targets[:, None]
        others = probabilities.scatter(-1, place, 0.0)
        return 1 + probabilities.gather(-1, place)[:, 0] - others.amax(-1)
