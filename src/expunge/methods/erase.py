"""Erasing: the log-odds of forget tokens are pushed to a floor below what a model without the knowledge gives."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="erase",
    idea="push forget tokens' log-odds to a floor below what ignorance gives",
    formula="E_t max(0, logit p_t − [min(log p_lacking, c) − d])",
    paper="-",
    kind="removes",
    lacking=True,
    kl=4.0,
    retain_ratio=2,
    rates=(5e-5,),
)
class Erase(Objective):
    """Its slope is one at every token until the floor is reached, and then none: it neither fades early nor runs away.

    Where the tokens were chosen by a model that lacks the knowledge, each token's floor is below that model's.
    """

    depth: float = hyper(6.0, ge=0, description="nats below what the model without the knowledge gives")
    ceiling: float = hyper(-4.0, lt=0, description="no token's floor starts above this log-prob")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean distance of the forget tokens to their floors, in nats."""
        rows = step.forget
        odds = rows.over_logits(log_odds)
        known = rows.lacking_token_logprobs
        start = odds.new_full(odds.shape, self.ceiling) if known is None else known.to(odds).clamp(max=self.ceiling)
        return {"forget": rows.mean_tokens((odds - (start - self.depth)).clamp(min=0))}


def log_odds(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log p − log(1 − p) of the targets; exact where p is nearly 1, where the log-prob has no slope left."""
    own = logits.gather(-1, targets[:, None])[:, 0]
    others = logits.scatter(-1, targets[:, None], -torch.inf)
    return own - others.logsumexp(-1)
