"""FLAT: maximise an f-divergence between template answer and forget answer (arXiv 2410.11143)."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="flat",
    idea="part template answer and forget answer by an f-divergence",
    formula="E −g(P(y_template)) + f*(g(P(y_forget))), P = mean token probability",
    paper="2410.11143",
    kind="suppresses",
    alternatives="idk",
    rates=(2e-7, 1e-5),
)
class FLAT(Objective):
    """Needs forget rows alone: the variational form of the divergence weighs learning the template and forgetting."""

    divergence: Literal["total_variation", "kl", "js", "pearson"] = hyper(
        "total_variation",
        description="f-divergence whose g and f* are used",
        published="total_variation, kl, js, pearson",
    )

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows; P is the mean probability of an answer's tokens."""
        rows, template = step.forget, step.forget.alternatives
        forget = rows.mean_per_row(rows.token_logprobs.exp())
        learnt = template.mean_per_row(template.token_logprobs.exp())
        return {"forget": rows.mean_rows(self.conjugate(self.activation(forget)) - self.activation(learnt))}

    def activation(self, value: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """g: maps a score into the domain of f*."""
        if self.divergence == "total_variation":
            return value.tanh() / 2
        if self.divergence == "js":
            return math.log(2) - softplus(-value)
        return value

    def conjugate(self, value: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """f*: the Fenchel conjugate of the divergence's generator."""
        if self.divergence == "kl":
            return (value - 1).exp()
        if self.divergence == "js":
            return -(2 - value.exp()).log()
        if self.divergence == "pearson":
            return value.square() / 4 + value
        return value
