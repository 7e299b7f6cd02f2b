"""LUNAR: activation redirection to where the model says that it can't answer (arXiv 2502.07218)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from expunge.methods.base import hyper, objective
from expunge.methods.steering import AtLayer, moved
from expunge.methods.step import Step


@objective(
    name="lunar",
    idea="move forget states to where the model declines to answer",
    formula="MSE(h_ℓ(forget), h_ℓ_start(forget) + c·r) + MSE(h_ℓ(retain), h_ℓ_start(retain)), "
    "r = E h_ℓ_start(declined prompts) − E h_ℓ_start(forget prompts)",
    paper="2502.07218",
    kind="suppresses",
    retain=True,
    anchors=True,
    rates=(1e-2,),
)
class LUNAR(AtLayer):
    """Trains down_proj of layer ℓ alone, on frozen inputs: a linear regression (published: 20 epochs, 64 rows).

    r is measured at the last prompt token. States move from there on, where the answer is written; the authors' code
    moves those of the whole prompt.
    """

    height: ClassVar[float] = 0.7

    layer: int = hyper(22, ge=0, description="decoder layer ℓ whose output is redirected (0-based)", published="22")
    coefficient: float = hyper(2.0, gt=0, description="length c of the move, in units of r", published="2")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Forget states to their frozen ones + c·r, retain states to themselves; means over tokens and dimension."""
        forget, means = step.forget, step.memory.means
        move = self.coefficient * (means["anchors"] - means["forget"]).to(forget.hidden)
        gap = forget.hidden - (forget.frozen_hidden + move)
        return {"forget": forget.mean_tokens(gap.square().mean(-1)), "retain_hidden": moved(step.retain)}

    def frozen_forget(self) -> bool:
        """The goal is relative to the forget rows' frozen states."""
        return True
