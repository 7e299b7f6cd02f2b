"""Random: units drawn by lot, which is what every attribution has to beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence
from expunge.localize.units import FLAT, Family, Slab


@attribution(
    name="random",
    idea="units by lot: the control",
    formula="u ~ U(0, 1) per unit",
    paper="-",
    control=True,
)
class Random(Attribution):
    """One number per unit, which all its weights carry, so that units of any size have the same chance."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """The numbers depend on the seed and the family's name alone: not on the order, the device, or other units."""
        found: dict[str, Tensor] = {}
        for family in evidence.families:
            drawn = draw(family, evidence.seed)
            for slab in family.slabs:
                lay(found, slab, drawn)
        return found


def draw(family: Family, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [units of the family]."""
    key = hashlib.sha256(f"{seed}/{family.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    return torch.rand(family.count, generator=generator)


def lay(found: dict[str, Tensor], slab: Slab, values: Tensor) -> None:
    """Give every entry of a slab the number of its unit, in a tensor that broadcasts to the parameter."""
    if slab.axis == FLAT:
        found[slab.parameter] = values.view(slab.shape)
        return
    shape = [1] * len(slab.shape)
    if slab.axis is not None:
        shape[slab.axis] = slab.shape[slab.axis]
    whole = found.setdefault(slab.parameter, torch.zeros(shape))
    if slab.axis is None:
        whole.fill_(values[0])
        return
    of_entries = values.repeat_interleave(slab.size)
    shape[slab.axis] = len(of_entries)
    whole.narrow(slab.axis, slab.start, len(of_entries)).copy_(of_entries.view(shape))
