"""A step from the unlearned model back towards the model that knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.attacks.base import ModelAttack, Point, World, attack, restored, setting
from expunge.errors import UserError
from expunge.models.drift import check_shape
from expunge.models.forward import unwrap


@attack(
    name="extrapolate",
    idea="go part of the way from the unlearned weights back to the target's",
    paper="-",
    kind="weights",
    budget="part of the way back to the target",
    needs=("target",),
    suite="full",
)
class Extrapolate(ModelAttack):
    """θ_u + γ(θ_target − θ_u). Who has the target needs no attack: it measures how near the knowledge lies on the line,
    that is, how small a part of the unlearning is to be undone before the answers are back."""

    gammas: tuple[Annotated[float, Field(gt=0, le=4)], ...] = setting(
        (0.1, 0.25, 0.5), description="γ; at 1 it is the target itself, beyond it overshoots", min_length=1
    )

    def points(self) -> list[Point]:
        """One point per γ, smallest first."""
        return [Point(f"gamma{gamma:g}", gamma, {"gamma": gamma}) for gamma in sorted(self.gammas)]

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the weights are mixed. Raises UserError without a target of the same architecture."""
        target = world.target
        if target is None:
            raise UserError("extrapolation needs the target model", "name it: --target MODEL")
        weights = {name: value for name, value in unwrap(model).named_parameters() if value.is_floating_point()}
        with restored(weights, device="cpu"):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(_mixed(name, weight, target(name), point.settings["gamma"]))
            yield model


def _mixed(name: str, weight: Tensor, target: Tensor, gamma: float) -> Tensor:
    """In float32: in bfloat16 a small γ would round most of the step away before the sum."""
    check_shape(name, target, weight)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide + gamma * (target.to(wide) - wide)
