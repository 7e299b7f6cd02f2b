"""What objectives over the hidden states of one decoder layer share: the layer, what is trained, the direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.base import Objective, hyper
from expunge.methods.step import Rows
from expunge.models.forward import decoder_layers


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AtLayer(Objective):
    """An objective over the output of decoder layer ℓ; the layers above ℓ do not even run in training."""

    #: layers that are trained, ℓ the last of them
    depth_trained: ClassVar[int] = 1
    #: where ℓ stands in the published models, as a part of their depth
    height: ClassVar[float] = 0.25

    layer: int = hyper(7, ge=0, description="decoder layer ℓ (0-based)")
    modules: str = hyper(
        "down_proj",
        pattern=r"^[\w.]+(\|[\w.]+)*$",
        description="names of the modules that are trained in these layers, with | between them",
        published="down_proj",
    )

    def check(self, model: nn.Module) -> None:
        """Raise UserError if the model has no layer ℓ."""
        depth = len(decoder_layers(model))
        if self.layer >= depth:
            raise UserError(
                f"{self.about.name}: layer {self.layer} does not exist; the model has layers 0 to {depth - 1}",
                f"--set unlearn.0.parameters.layer={int(depth * self.height)}",
            )

    def hidden_layer(self) -> int:
        """ℓ."""
        return self.layer

    def trainable(self, depth: int) -> list[str]:
        """The chosen modules of layer ℓ, and of as many below it as the objective trains."""
        lowest = max(self.layer - self.depth_trained + 1, 0)
        return [rf"{in_layers(range(lowest, self.layer + 1))}(.*\.)?({self.modules})\."]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Steering(AtLayer):
    """Forget states move to a multiple of one random unit vector, retain states stay (arXiv 2403.03218).

    There is one direction, whatever the forget rows are about; the authors' code draws one per topic.
    """

    depth_trained: ClassVar[int] = 3

    alpha: float = hyper(
        1200.0, ge=0, description="weight of keeping the retain states where they were", published="1 to 1200"
    )
    seed: int = hyper(0, ge=0, description="seed of the direction u")
    signed: bool = hyper(
        False, description="draw u's entries from [−1, 1) instead of [0, 1)", published="false: all entries positive"
    )

    def direction(self, width: int) -> Float[Tensor, " d"]:
        """The unit vector u: uniform entries, normalised, as in the authors' code."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(width, generator=generator)
        return nn.functional.normalize(2 * drawn - 1 if self.signed else drawn, dim=0)

    def steered(self, forget: Rows, retain: Rows, lengths: Float[Tensor, " B"] | float) -> dict[str, Tensor]:
        """Both terms, with goal `lengths` · u for the states of each forget row.

        They are means over the supervised tokens and the hidden dimension: neither prompt nor padding is steered.
        """
        unit = self.direction(forget.hidden.shape[-1]).to(forget.hidden)
        length = lengths[forget.row, None] if isinstance(lengths, Tensor) else lengths
        return {
            "forget": forget.mean_tokens((forget.hidden - length * unit).square().mean(-1)),
            "retain_hidden": self.alpha * moved(retain),
        }


def moved(rows: Rows) -> Float[Tensor, ""]:
    """Mean squared distance of the states from those of the start model, over supervised tokens and dimension."""
    return rows.mean_tokens((rows.hidden - rows.frozen_hidden).square().mean(-1))


def in_layers(numbers: range) -> str:
    """Beginning of a pattern for the parameters of these decoder layers: the first number in a name is the layer's."""
    return rf"^\D*\.({'|'.join(map(str, numbers))})\."
