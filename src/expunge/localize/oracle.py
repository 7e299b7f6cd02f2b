"""Oracle: the region that is known to hold the knowledge, as the score that no attribution can beat."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence


@attribution(
    name="oracle",
    idea="the known region: control",
    formula="1 inside the region, 0 outside",
    paper="2505.16252",
    needs=("region",),
    control=True,
    side="inside",
)
class Oracle(Attribution):
    """A unit scores the part of its weights that is inside; more units than have any can't be asked for."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """The region as numbers, as broadcast as its mask is. Raises UserError as `known_region`."""
        return {name: bits.float() for name, bits in known_region(evidence).items()}


def known_region(evidence: Evidence) -> dict[str, Tensor]:
    """Per parameter that units are made of, what is inside the region, bool that broadcasts to it.

    Raises UserError if there is no region, if it is of another model, or has no weight of any unit.
    """
    if evidence.region is None:
        raise UserError("the attribution needs a region that is known", "give a mask of it: --against mask.safetensors")
    bound = evidence.region.bound(evidence.model)
    if not bound.keys() & evidence.parameters.keys():
        raise UserError(
            f"the known region has no weight of any {evidence.unit}", "choose the unit that the region was made of"
        )
    outside = torch.zeros((), dtype=torch.bool)
    return {
        name: bound[name] if name in bound else outside.reshape([1] * parameter.ndim)
        for name, parameter in evidence.parameters.items()
    }
