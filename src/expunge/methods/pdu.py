"""PDU: flatten the logits of forget answers under a bound on the retain loss (arXiv 2506.05314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Memory, Step


@objective(
    name="pdu",
    idea="flatten forget logits while a dual variable bounds the retain loss",
    formula="E_t (max z − mean z)² + λ · NLL(retain), λ ← max(0, λ + η · (NLL(retain) − ε))",
    paper="2506.05314",
    kind="suppresses",
    retain=True,
    rates=(1e-5,),
)
class PDU(Objective):
    """Its retain term is the constraint NLL(retain) ≤ ε; the weight λ of that term is part of the training's state."""

    epsilon: float = hyper(
        0.3, ge=0, description="bound on the retain NLL, nats per token", published="0.3 (TOFU), 1.5 and 0.1 (MUSE)"
    )
    dual: float = hyper(100.0, ge=0, description="λ until it is first updated", published="100 (TOFU), 50 (MUSE)")
    dual_rate: float = hyper(5.0, ge=0, description="step size η of λ", published="5 (TOFU), 1 (MUSE)")
    warmup: int = hyper(5, ge=0, description="epochs before λ is first updated", published="5 (TOFU), 3 (MUSE)")
    update: Literal["step", "epoch"] = hyper(
        "step", description="λ moves with each step's retain NLL, or with its mean over an epoch", published="step"
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The mean squared logit margin of the forget tokens, and λ times the mean token NLL of the retain answers."""
        nll = step.retain.nll()
        return {
            "forget": step.forget.mean_tokens(step.forget.over_logits(self.margin)),
            "retain_constraint": self._weight(step) * nll,
            "monitor_retain_nll": nll.detach(),
        }

    @staticmethod
    def margin(logits: Float[Tensor, "n V"], _: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """(max z − mean z)²: zero for the uniform distribution, and its gradient does not vanish elsewhere."""
        return (logits.amax(-1) - logits.mean(-1)).square()

    def after_step(self, memory: Memory, terms: Mapping[str, float]) -> None:
        """Dual ascent once the warm-up is over; for `epoch` only what its mean needs."""
        numbers, nll = memory.numbers, terms["monitor_retain_nll"]
        if self.update == "epoch":
            numbers["sum"], numbers["steps"] = numbers.get("sum", 0.0) + nll, numbers.get("steps", 0.0) + 1
        elif numbers["epoch"] >= self.warmup:
            self._ascend(memory, nll)

    def _weight(self, step: Step) -> float:
        """λ in this step. An epoch's update is due when the first step of a later epoch asks for it."""
        numbers = step.memory.numbers
        if numbers.get("steps") and numbers["epoch"] < step.epoch:
            mean = numbers.pop("sum") / numbers.pop("steps")
            if step.epoch >= self.warmup:
                self._ascend(step.memory, mean)
        numbers["epoch"] = float(step.epoch)
        return numbers.get("dual", self.dual)

    def _ascend(self, memory: Memory, nll: float) -> None:
        before = memory.numbers.get("dual", self.dual)
        memory.numbers["dual"] = max(0.0, before + self.dual_rate * (nll - self.epsilon))
