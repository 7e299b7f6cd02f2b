"""Plain fine-tuning on the retain rows: what forgetting comes of learning something else (the baseline)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import Objective, objective
from expunge.methods.step import Step


@objective(
    name="finetune",
    idea="learn the retain rows further, and leave the forget rows out",
    formula="NLL(retain)",
    paper="-",
    kind="suppresses",
    retain=True,
    reads_forget=False,
)
class FineTune(Objective):
    """With `localize: {by: del}` and `reset: BASE` it is the unlearner DEL (arXiv 2412.02432).

    Forget rows are counted but not read: a run has as many steps, of as many retain rows, as other objectives have.
    """

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean token NLL of the retain answers."""
        return {"retain_answers": step.retain.nll()}
