"""updates.json: where the weights of an unlearned model differ from those of the model that it was made from.

A run holds one for each model that it unlearned or merged, in `updates/MODEL/`. Sums are taken in float64 over all
elements of a tensor. `energy` is ‖Δ‖², `before` is ‖θ‖² of the model that unlearning started from; both models are read
in the dtype in which the run loads them, so that rounding a checkpoint on loading is no update.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.base import Frozen

FOLDER, NAME = "updates", "updates.json"


class InsideMask(Frozen):
    """The part of a tensor that the mask lets change."""

    weights: int
    energy: float | None = Field(description="None: not a finite number")
    changed: int


class TensorUpdate(Frozen):
    """How much one tensor changed."""

    tensor: str
    layer: int | None = Field(description="decoder layer, if it lies in one")
    module: str = Field(description="self_attn.q_proj, embed_tokens, …")
    weights: int
    energy: float | None = Field(description="‖Δ‖²; None: not a finite number")
    before: float | None = Field(description="‖θ‖²; None: not a finite number")
    changed: int = Field(description="elements that are another number than before")
    inside: InsideMask | None = Field(None, description="absent where no mask was asked for")


class Updates(Frozen):
    """All tensors of a model, or the reason why they could not be compared."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.updates/1"] = Field("expunge.updates/1", alias="schema")
    tensors: list[TensorUpdate] = Field(default_factory=list)
    mask: str | None = Field(None, description="digest of the mask, if there was one")
    problem: str = Field("", description="why nothing was compared")

    @property
    def energy(self) -> float:
        """‖Δ‖² of the whole model, of what is finite."""
        return total(tensor.energy for tensor in self.tensors)

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖θ‖ of the whole model; 0 where θ is 0."""
        return relative(self.tensors)

    @property
    def changed(self) -> float:
        """Part of the weights that changed at all."""
        return sum(tensor.changed for tensor in self.tensors) / max(1, sum(tensor.weights for tensor in self.tensors))

    @property
    def inside(self) -> float | None:
        """Part of the energy that lies inside the mask; None without a mask or an update."""
        if self.mask is None or not self.energy:
            return None
        return total(tensor.inside.energy for tensor in self.tensors if tensor.inside is not None) / self.energy

    @property
    def changed_outside(self) -> int:
        """Weights that changed though they lie outside the mask; 0 without a mask."""
        known = [(tensor.changed, tensor.inside) for tensor in self.tensors]
        return sum(changed - (inside.changed if inside else 0) for changed, inside in known) if self.mask else 0

    @property
    def masked(self) -> float | None:
        """Part of the weights that lies inside the mask."""
        if self.mask is None:
            return None
        inside = sum(tensor.inside.weights for tensor in self.tensors if tensor.inside is not None)
        return inside / max(1, sum(tensor.weights for tensor in self.tensors))

    def part(self, tensors: Iterable[TensorUpdate]) -> float:
        """Part of the energy that these tensors hold; 0 where nothing changed."""
        return total(tensor.energy for tensor in tensors) / self.energy if self.energy else 0.0


def total(values: Iterable[float | None]) -> float:
    """Sum of what is finite."""
    return sum(value for value in values if value is not None)


def relative(tensors: Iterable[TensorUpdate]) -> float:
    """‖Δ‖ / ‖θ‖ of these tensors; 0 where θ is 0."""
    known = list(tensors)
    before = total(tensor.before for tensor in known)
    return float((total(tensor.energy for tensor in known) / before) ** 0.5) if before else 0.0


def read_updates(run: Path) -> dict[str, Updates]:
    """Model → its updates, by name; empty for a run without any. Raises UserError where a file can't be read."""
    found = {}
    for path in sorted((Path(run) / FOLDER).glob(f"*/{NAME}")):
        try:
            found[path.parent.name] = Updates.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            raise UserError(f"{path} can't be read", "run the same recipe again: it writes the file anew") from None
    return found
