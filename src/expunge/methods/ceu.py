"""CE-U: cross-entropy against the model's own distribution without the forget token (arXiv 2503.01224)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="ceu",
    idea="learn the model's own distribution with the forget token struck out",
    formula="E_t CE(softmax(sg[z], z_y = −∞), p)",
    paper="2503.01224",
    kind="suppresses",
    rates=(2e-6, 1e-5),
)
class CEU(Objective):
    """Its gradient neither vanishes at a certain token nor explodes at an unlikely one; no start model, no retain."""

    skip: int = hyper(
        0, ge=0, description="leading tokens of each answer that are left alone", published="1 (TOFU, Llama-2)"
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget tokens; skipped ones add nothing to it but count as tokens."""
        rows = step.forget
        losses = rows.over_logits(self.without_target)
        if self.skip:
            place = torch.arange(len(losses), device=losses.device) - rows.first[rows.row]
            losses = losses * (place >= self.skip)
        return {"forget": rows.mean_tokens(losses)}

    @staticmethod
    def without_target(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Cross-entropy of each distribution against itself without its target; the latter has no gradient."""
        goal = logits.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
        return -(goal * logits.log_softmax(-1)).sum(-1)
