"""AltPO: preference for alternative answers that the start model itself gives (arXiv 2409.13474)."""

from __future__ import annotations

from expunge.methods.base import objective
from expunge.methods.dpo import DPO


@objective(
    name="altpo",
    idea="prefer sampled plausible answers to the forget answer",
    formula="−(2/β) · E log σ(β · [log(p/p_start)(y_sampled) − log(p/p_start)(y_forget)])",
    paper="2409.13474",
    kind="suppresses",
    reference=True,
    alternatives="sampled",
    nll=1.0,
)
class AltPO(DPO):
    """The loss of dpo; the winners are in-domain samples (5 per row in the paper) instead of refusals."""
