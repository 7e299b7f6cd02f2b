"""Gradient ascent and gradient difference (arXiv 2401.06121, 2203.12817)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import Objective, objective
from expunge.methods.step import Step


@objective(
    name="grad_ascent",
    idea="climb the loss of the forget answers",
    formula="−NLL(forget)",
    paper="2401.06121",
    kind="removes",
)
class GradAscent(Objective):
    """Unbounded: it destroys the model unless something stops it."""

    def loss(self, step: Step) -> dict[str, Tensor]:
        """−mean token NLL of the forget answers."""
        return {"forget": -step.forget.nll()}


@objective(
    name="grad_diff",
    idea="climb on forget answers, descend on retain answers",
    formula="−NLL(forget) + NLL(retain)",
    paper="2203.12817",
    kind="removes",
    retain=True,
    nll=1.0,
)
class GradDiff(GradAscent):
    """Gradient ascent with the retain NLL by default; as unbounded as ascent itself."""
