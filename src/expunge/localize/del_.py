"""DEL: the output channels whose removal would change the forget rows' loss most (arXiv 2412.02432)."""

from __future__ import annotations

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence
from expunge.localize.gradient_times_weight import removal


@attribution(
    name="del",
    idea="units by the strongest tenth of their weights' effect on the forget rows",
    formula="mean of the largest 10 % of |Σ θ ⊙ ∇ℓ_f| in a unit",
    paper="2412.02432",
    needs=("forget",),
    pool="top",
)
class DEL(Attribution):
    """Per weight it is `gradient_times_weight`; a unit counts by its largest tenth, so that few strong weights do."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """|weight · gradient|; the pool does the rest."""
        return removal(evidence)
