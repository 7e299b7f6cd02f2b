"""KL minimisation: ascent held by the start model's distribution on retain rows (arXiv 2401.06121)."""

from __future__ import annotations

from expunge.methods.base import objective
from expunge.methods.grad_ascent import GradAscent


@objective(
    name="kl_min",
    idea="climb on forget answers, keep retain distributions where they were",
    formula="−NLL(forget) + KL(p_start ‖ p)(retain)",
    paper="2401.06121",
    kind="removes",
    retain=True,
    kl=1.0,
)
class KLMin(GradAscent):
    """Gradient ascent with the KL retain term by default; the KL is over the retain answers' tokens alone."""
