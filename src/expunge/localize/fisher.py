"""Fisher: the diagonal of the empirical Fisher information on the forget rows (as in SSD, arXiv 2308.07707)."""

from __future__ import annotations

from expunge.localize.base import Attribution, Saliency, attribution, setting
from expunge.localize.evidence import Evidence


@attribution(
    name="fisher",
    idea="diagonal Fisher information of the forget rows, row by row",
    formula="Σ_i (∇ℓ_i)² over forget rows [÷ the same over retain rows]",
    paper="2308.07707",
    needs=("forget",),
)
class Fisher(Attribution):
    """Squares are taken of each row's gradient, so that rows that pull in opposite directions do not cancel."""

    relative: bool = setting(False, description="divide by the squares on the retain rows, which are then needed")
    epsilon: float = setting(1e-12, gt=0, description="added to the retain rows' squares before the division")

    def saliency(self, evidence: Evidence) -> Saliency:
        """Sums of squared gradients, or their ratio, in the memory of one gradient."""
        if not self.relative:
            return evidence.squares("forget")
        retain = evidence.squares("retain", aside=True)
        found = evidence.squares("forget")
        for name, squares in found.items():
            squares /= retain[name].to(squares.device) + self.epsilon
        return found
