"""Erasing: the log-odds of forget tokens are pushed down to a floor, which may follow a model without the knowledge."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step

#: Where floors start unless another model says otherwise: a probability of 5 %.
_FLOOR = -3.0


@objective(
    name="erase",
    idea="push forget tokens' log-odds down to a floor, and no further",
    formula="E_t max(x, −pull·x), x = logit p_t − [clamp(logit p_lacking, b, c) − d]",
    paper="-",
    kind="removes",
    lacking=True,
    kl=4.0,
    retain_ratio=2,
    rates=(5e-5,),
    documents={"ceiling": 20.0, "bottom": -30.0, "pull": 1.0},
)
class Erase(Objective):
    """Its slope is one at every token until the floor is reached, and then none: it neither fades early nor runs away.

    At its defaults every token has one floor. With a lower `bottom`, a token's floor follows what a model without the
    knowledge gives it, where one chose the tokens, and with a high `ceiling` is just that; `depth` goes below it.
    Deeper is harder to relearn, and costs more of what was never shown. With a `pull` tokens are held at their floors
    from below as well: rows that push each other down leave them where a model without the knowledge has them.
    """

    ceiling: float = hyper(_FLOOR, description="no token's floor starts above these log-odds …")
    bottom: float = hyper(_FLOOR, lt=0, description="… or below these")
    depth: float = hyper(0.0, ge=0, description="nats between where the floor starts and the floor")
    pull: float = hyper(0.0, ge=0, description="slope back up, below the floor: tokens are held at it, not only above")

    def check(self, model: nn.Module) -> None:
        """Raises UserError for a bottom above the ceiling."""
        if self.bottom > self.ceiling:
            raise UserError(
                f"bottom {self.bottom:g} is above ceiling {self.ceiling:g}",
                f"--set unlearn.0.parameters.bottom={self.ceiling:g}",
            )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean distance of the forget tokens to their floors, in nats."""
        rows = step.forget
        odds = rows.over_logits(log_odds)
        known = rows.lacking_token_logprobs
        start = torch.full_like(odds, _FLOOR) if known is None else _log_odds_of(known.to(odds))
        start = start.clamp(min=self.bottom, max=self.ceiling)
        above = odds - (start - self.depth)
        return {"forget": rows.mean_tokens(torch.maximum(above, -self.pull * above))}


def _log_odds_of(logprobs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log p − log(1 − p); infinite where the probability is one."""
    return logprobs - torch.log(-torch.expm1(logprobs))


def log_odds(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log p − log(1 − p) of the targets; exact where p is nearly 1, where the log-prob has no slope left."""
    own = logits.gather(-1, targets[:, None])[:, 0]
    others = logits.scatter(-1, targets[:, None], -torch.inf)
    return own - others.logsumexp(-1)
