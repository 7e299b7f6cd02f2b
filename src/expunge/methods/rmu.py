"""RMU: representation misdirection for unlearning (arXiv 2403.03218)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import hyper, objective
from expunge.methods.steering import Steering
from expunge.methods.step import Step


@objective(
    name="rmu",
    idea="steer forget states at one layer to a fixed random direction",
    formula="MSE(h_ℓ(forget), c·u) + α · MSE(h_ℓ(retain), h_ℓ_start(retain))",
    paper="2403.03218",
    kind="suppresses",
    retain=True,
    rates=(5e-5,),
)
class RMU(Steering):
    """Updates down_proj of layers ℓ−2..ℓ. Fails where states are longer than c, as in later layers (2408.06223)."""

    layer: int = hyper(7, ge=0, description="decoder layer ℓ whose output is steered (0-based)", published="5 to 15")
    coefficient: float = hyper(6.5, gt=0, description="length c of the steering vector", published="1 to 100")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Forget states to c·u, retain states to themselves."""
        return self.steered(step.forget, step.retain, self.coefficient)
