"""RMU: representation misdirection for unlearning (arXiv 2403.03218)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step
from expunge.models.forward import decoder_layers


@objective(
    name="rmu",
    idea="steer forget states at one layer to a fixed random direction",
    formula="MSE(h_ℓ(forget), c·u) + α · MSE(h_ℓ(retain), h_ℓ_start(retain))",
    paper="2403.03218",
    kind="suppresses",
    retain=True,
)
class RMU(Objective):
    """Updates down_proj of layers ℓ−2..ℓ; layers above ℓ do not even run in training."""

    layer: int = hyper(7, ge=0, description="decoder layer ℓ whose output is steered (0-based)")
    coefficient: float = hyper(6.5, gt=0, description="length c of the steering vector")
    alpha: float = hyper(1200.0, ge=0, description="weight of keeping the retain states where they were")
    seed: int = hyper(0, ge=0, description="seed of the direction u")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Both terms are means over the supervised tokens and the hidden dimension."""
        forget, retain = step.forget, step.retain
        goal = self.coefficient * self.direction(forget.hidden.shape[-1]).to(forget.hidden.device)
        kept = (retain.hidden - retain.frozen_hidden).square().mean(-1)
        return {
            "forget": forget.mean_tokens((forget.hidden - goal).square().mean(-1)),
            "retain_hidden": self.alpha * retain.mean_tokens(kept),
        }

    def direction(self, width: int) -> Float[Tensor, " d"]:
        """The unit vector u: uniform in [0, 1)^d, normalised, as in the authors' code."""
        generator = torch.Generator().manual_seed(self.seed)
        return nn.functional.normalize(torch.rand(width, generator=generator), dim=0)

    def check(self, model: nn.Module) -> None:
        """Raise UserError if the model has no layer ℓ."""
        depth = len(decoder_layers(model))
        if self.layer >= depth:
            raise UserError(
                f"rmu: layer {self.layer} does not exist; the model has layers 0 to {depth - 1}",
                f"--set unlearn.0.parameters.layer={depth // 4}",
            )

    def hidden_layer(self) -> int:
        """The steered layer."""
        return self.layer

    def trainable(self) -> list[str]:
        """down_proj of the steered layer and the two below it."""
        numbers = "|".join(str(layer) for layer in range(max(self.layer - 2, 0), self.layer + 1))
        return [rf"\.({numbers})\.mlp\.down_proj\."]
