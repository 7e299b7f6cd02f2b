"""Adaptive RMU: the steering length follows the norm of each sample's own states (arXiv 2408.06223)."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from expunge.methods.base import hyper, objective
from expunge.methods.steering import Steering
from expunge.methods.step import Memory, Step


@objective(
    name="adaptive_rmu",
    idea="RMU with a length that scales with each sample's frozen states",
    formula="MSE(h_ℓ(forget), β·‖h_ℓ_start(forget)‖·u) + α · MSE(h_ℓ(retain), h_ℓ_start(retain))",
    paper="2408.06223",
    kind="suppresses",
    retain=True,
    rates=(5e-5,),
)
class AdaptiveRMU(Steering):
    """β times the mean token norm of a sample under the start model, so that one β serves every layer.

    `drift` is not the published algorithm: it is what a SemEval-2025 submission ran (arXiv 2506.16548), where the
    goal moves away from the states by a factor of about β with every epoch. It is here to be studied.
    """

    layer: int = hyper(7, ge=0, description="decoder layer ℓ whose output is steered (0-based)", published="3 to 31")
    beta: float = hyper(5.0, gt=0, description="length of the goal over that of the frozen states", published="2 to 10")
    drift: bool = hyper(
        False, description="for study only: from the second epoch on, measure the length on the model in training"
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Forget states to β·‖h_start‖·u, retain states to themselves."""
        terms = self.steered(step.forget, step.retain, self.lengths(step))
        if self.drift:
            terms["monitor_norm"] = step.forget.mean_tokens(step.forget.hidden.detach().norm(dim=-1))
        return terms

    def lengths(self, step: Step) -> Float[Tensor, " B"]:
        """Length of the goal of each forget row."""
        frozen = step.forget.mean_per_row(step.forget.frozen_hidden.norm(dim=-1))
        if not self.drift or step.epoch == 0:  # before its first epoch, the model in training is the frozen one
            return self.beta * frozen
        numbers = step.memory.numbers
        if numbers.get("epoch") != step.epoch:
            numbers.update(epoch=step.epoch, length=self.beta * numbers["norm"])
        return frozen.new_full(frozen.shape, numbers["length"])

    def after_step(self, memory: Memory, terms: Mapping[str, float]) -> None:
        """Remember the norm of the step that was made: the next epoch starts from it."""
        if self.drift:
            memory.numbers["norm"] = terms["monitor_norm"]

    def frozen_forget(self) -> bool:
        """The forget rows' frozen states give the lengths."""
        return True
