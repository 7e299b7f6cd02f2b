"""Taking one direction out of the hidden states: the one in which the unlearned model differs on the forget prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.attacks.base import ModelAttack, Point, World, attack, setting
from expunge.attacks.states import last_of_prompt, layer_states, prompt, remembered, replaced_states
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import decoder_layers

#: Label → part of the layers that is ablated, counted from the last one.
_DEPTHS = {"last-third": 1 / 3, "last-two-thirds": 2 / 3, "all": 1.0}
#: States whose distance to the reference's is this many standard deviations above the mean are left out.
_OUTLIER = 3.0
#: A difference this small beside the states themselves is rounding: there is no direction in it.
_NOTHING = 1e-5


@attack(
    name="direction_ablation",
    idea="project out the direction that unlearning added to the hidden states",
    paper="2409.18025",
    kind="behaviour",
    budget="part of the layers ablated",
    needs=("forget",),
)
class DirectionAblation(ModelAttack):
    """h ← h − (h·d̂ − c)d̂ after each decoder layer, d = mean h_u − mean h_reference on the forget prompts.

    c is the reference's mean along d̂: with the published c = 0 the part goes in which all hidden states agree, and a
    small model breaks on every row. Without a reference, its place is taken by the model's own mean on retain prompts.
    Answers are never shown. On the reference itself d is 0 and nothing is ablated.
    """

    to: Literal["mean", "zero"] = setting(
        "mean", description="what is left along the direction: the reference's mean, or nothing", published="zero"
    )
    tokens: Literal["prompt", "last"] = setting(
        "prompt", description="states that the means are over: the whole prompt, or the last token before the answer"
    )
    rows: int = setting(128, description="prompts of each split that the means are over", gt=0)

    def points(self) -> list[Point]:
        """The upper third of the layers, the upper two thirds, all of them."""
        return [Point(label, part, {"depth": part}) for label, part in _DEPTHS.items()]

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the directions are projected out. Raises UserError for an architecture without a list of layers,
        a reference of another shape, or if there is neither a reference nor a retain row."""
        depth = len(decoder_layers(model))
        directions = remembered(self, model, world, lambda: self._directions(model, world))
        first = depth - ceil(depth * point.settings["depth"])
        with replaced_states(model, {layer: directions[layer] for layer in range(first, depth)}):
            yield model

    def _directions(self, model: nn.Module, world: World) -> list[Ablation]:
        """What is done after each layer."""
        own = self._states(model, world.rows.get("forget", ()))
        if world.open_reference is not None:
            with world.open_reference() as reference:
                other = self._states(reference, world.rows.get("forget", ()))
            if [states.shape for states in own] != [states.shape for states in other]:
                raise UserError(
                    "the reference has another number of layers or another width, so directions can't be compared",
                    "leave the reference out: the model's own retain rows take its place",
                )
            return [self._ablation(*without_outliers(a, b.to(a))) for a, b in zip(own, other, strict=True)]
        if not world.rows.get("retain"):
            raise UserError("direction ablation needs a reference model or retain rows", "name one: --reference MODEL")
        return [self._ablation(a, b) for a, b in zip(own, self._states(model, world.rows["retain"]), strict=True)]

    def _ablation(self, states: Float[Tensor, "N d"], others: Float[Tensor, "M d"]) -> Ablation:
        along = direction(states, others)
        left = float(others.float().mean(0) @ along) if self.to == "mean" else 0.0
        return Ablation(along, left)

    def _states(self, model: nn.Module, rows: Sequence[Encoded]) -> list[Tensor]:
        where = last_of_prompt if self.tokens == "last" else prompt
        return layer_states(model, rows[: self.rows], range(len(decoder_layers(model))), where).layers


@dataclass(frozen=True)
class Ablation:
    """h ← h − (h·d̂ − c)d̂, in float32, given back in the dtype of h."""

    direction: Float[Tensor, " d"]  # of length 1; zeros: nothing is done
    left: float

    def __call__(self, states: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        wide = states.float()
        direction = self.direction.to(wide)
        return (wide - (wide @ direction - self.left)[..., None] * direction).to(states.dtype)


def direction(states: Float[Tensor, "N d"], others: Float[Tensor, "M d"]) -> Float[Tensor, " d"]:
    """The unit vector between the two means, float32; zeros if they are equal but for rounding."""
    own, other = states.float().mean(0), others.float().mean(0)
    difference = own - other
    length = difference.norm()
    return difference / length if length > _NOTHING * own.norm() else torch.zeros_like(difference)


def without_outliers(
    states: Float[Tensor, "N d"], others: Float[Tensor, "N d"]
) -> tuple[Float[Tensor, "M d"], Float[Tensor, "M d"]]:
    """Both without the positions at which they are unusually far apart: a few tokens would set the mean."""
    distance = (states.float() - others.float()).abs().mean(1)
    spread = distance.std() if len(distance) > 1 else torch.zeros(())
    usual = distance - distance.mean() <= _OUTLIER * spread
    return states[usual], others[usual]
