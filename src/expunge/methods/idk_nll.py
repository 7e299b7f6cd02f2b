"""Fine-tuning on answers that decline, TOFU's preference optimisation (arXiv 2401.06121)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import Objective, objective
from expunge.methods.step import Step


@objective(
    name="idk_nll",
    idea="learn to decline the forget prompts",
    formula="NLL(y_idk | forget prompts)",
    paper="2401.06121",
    kind="suppresses",
    reads_forget=False,
    alternatives="idk",
    nll=1.0,
)
class IdkNLL(Objective):
    """Forget and retain terms are each a mean over their own tokens, as in the paper (its code pools both)."""

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean token NLL of the answers that decline."""
        return {"forget": step.forget.alternatives.nll()}
