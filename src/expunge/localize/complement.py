"""Complement: units by lot among those that have nothing in the known region."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.choose import unit_scores
from expunge.localize.evidence import Evidence
from expunge.localize.oracle import known_region
from expunge.localize.random_ import draw, lay


@attribution(
    name="complement",
    idea="units by lot outside the known region: control",
    formula="u ~ U(0, 1) per unit outside the region, u − 1 for others",
    paper="2505.16252",
    needs=("region",),
    control=True,
    side="outside",
)
class Complement(Attribution):
    """Disjoint from the region: more units than lie outside can't be asked for. The lots are not those of `random`."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """The number of its unit for every weight. Raises UserError as `known_region`."""
        region = {name: bits.float() for name, bits in known_region(evidence).items()}
        found: dict[str, Tensor] = {}
        for family in evidence.families:
            (parts,) = unit_scores([family], region, "mean")
            assert parts is not None, "every parameter of the units is in the region's mapping"
            drawn = draw(replace(family, name=f"outside/{family.name}"), evidence.seed) - (parts > 0).float()
            for slab in family.slabs:
                lay(found, slab, drawn)
        return found
