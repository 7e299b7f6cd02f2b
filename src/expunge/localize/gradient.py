"""SalUn's saliency: the weights that the forget rows' loss is most sensitive to (arXiv 2310.12508)."""

from __future__ import annotations

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence


@attribution(
    name="gradient",
    idea="weights that the forget rows' loss is steepest in (SalUn)",
    formula="|g_f|",
    paper="2310.12508",
    needs=("forget",),
)
class Gradient(Attribution):
    """g_f is the gradient of the forget answers' negative log-likelihood; its absolute value is that of the sum."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """Absolute gradients, in the memory of the gradient."""
        return {name: gradient.abs_() for name, gradient in evidence.gradient("forget").items()}
