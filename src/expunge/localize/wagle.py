"""WAGLE: what a weight does for the forget rows, against what it does for the retain rows (arXiv 2410.17509)."""

from __future__ import annotations

import torch

from expunge.localize.base import Attribution, Saliency, attribution, setting
from expunge.localize.evidence import Evidence


@attribution(
    name="wagle",
    idea="weights that act on the forget rows, corrected by the retain rows' gradient",
    formula="|(θ − g_r/μ) ⊙ g_f|",
    paper="2410.17509",
    needs=("forget", "retain"),
)
class WAGLE(Attribution):
    """The answer of a bilevel problem in which μ stands for the curvature of the retain loss; g sums over all rows."""

    mu: float = setting(
        1e-6, gt=0, description="scale of the retain loss's Hessian; it grows with the retain rows", published="1e-6"
    )

    @torch.no_grad()
    def saliency(self, evidence: Evidence) -> Saliency:
        """|(weight − retain gradient / μ) · forget gradient|; the retain gradient waits outside the working memory."""
        retain = evidence.gradient("retain", aside=True)
        found = evidence.gradient("forget")
        for name, weight in evidence.parameters.items():
            shift = retain[name].to(weight.device)
            found[name].mul_(torch.sub(weight.float(), shift, alpha=1 / self.mu)).abs_()
        return found
