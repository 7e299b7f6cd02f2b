"""WGA: gradient ascent weighted by the tokens' own probability (G-effect, arXiv 2502.19301)."""

from __future__ import annotations

from torch import Tensor

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="wga",
    idea="ascent that counts tokens by how likely they still are",
    formula="E_t sg[p^β] · log p",
    paper="2502.19301",
    kind="removes",
    nll=1.0,
    rates=(1e-5, 2e-5),
)
class WGA(Objective):
    """Tokens that have become unlikely lose their weight, which bounds the ascent; β = 0 is gradient ascent."""

    beta: float = hyper(1.0, ge=0, description="power of the probability in the weight", published="1, 5")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Weighted mean log-prob of the forget tokens; the weight has no gradient."""
        logp = step.forget.token_logprobs
        return {"forget": step.forget.mean_tokens((self.beta * logp.detach()).exp() * logp)}
