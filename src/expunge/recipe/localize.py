"""Where in a model the knowledge is looked for, and how much of the model may be changed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from expunge.recipe.base import Density, Frozen

Unit = Literal["weight", "value_vector", "neuron", "head", "module", "layer"]
Strata = Literal["model", "layer", "tensor"]


class LocalizeConfig(Frozen):
    """Which part of the model unlearning may change: chosen by an attribution, or read from a mask file."""

    by: str = Field("wagle", description="an attribution (expunge list attributions)")
    parameters: dict[str, Any] = Field(default_factory=dict, description="settings of the attribution")
    unit: Unit = Field("value_vector", description="what is chosen: whole units of this kind")
    density: Density = Field(0.1, description="part of the units that is chosen")
    strata: Strata = Field(
        "model", description="where the density holds: over the whole model, or in each layer or tensor by itself"
    )
    against: str | None = Field(
        None,
        description="a mask of the known region: what oracle and complement take, and what the choice is compared with",
    )
    mask: str | None = Field(None, description="a mask file (expunge localize) instead of an attribution")
    limit: int | None = Field(None, gt=0, description="rows per split that the attribution reads; all when absent")
    batch_size: int = Field(8, gt=0, description="rows of one pass of the attribution")

    @model_validator(mode="after")
    def _one_origin(self) -> LocalizeConfig:
        if self.mask is None:
            return self
        fields = type(self).model_fields.items()
        # what stands at its default was not given: a recipe that was written in full is read again
        usual = {name: field.get_default(call_default_factory=True) for name, field in fields}
        given = sorted(name for name in usual if name != "mask" and getattr(self, name) != usual[name])
        if given:
            raise ValueError(f"`mask` names a mask that is there already; leave out {', '.join(given)}")
        return self
