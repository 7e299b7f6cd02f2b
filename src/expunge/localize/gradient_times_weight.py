"""Gradient × weight: what setting a weight to zero would change, to first order (SNIP, arXiv 1810.02340)."""

from __future__ import annotations

import torch

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence


@attribution(
    name="gradient_times_weight",
    idea="weights whose removal changes the forget rows' loss most, to first order",
    formula="|θ ⊙ g_f|",
    paper="1810.02340",
    needs=("forget",),
)
class GradientTimesWeight(Attribution):
    """The same as `gradient`, weighed by what there is to remove."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """|weight · gradient|, in the memory of the gradient."""
        return removal(evidence)


@torch.no_grad()
def removal(evidence: Evidence) -> Saliency:
    """Per weight |θ · Σ over forget rows of its gradient|: |change of the loss without it| to first order."""
    gradients = evidence.gradient("forget")
    return {name: gradients[name].mul_(weight).abs_() for name, weight in evidence.parameters.items()}
