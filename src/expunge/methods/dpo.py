"""Direct preference optimisation of another answer over the forget answer (arXiv 2305.18290, 2404.05868)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="dpo",
    idea="prefer an answer that declines to the forget answer",
    formula="−(2/β) · E log σ(β · [log(p/p_start)(y_alt) − log(p/p_start)(y_forget)])",
    paper="2305.18290",
    kind="suppresses",
    reference=True,
    alternatives="idk",
    nll=1.0,
)
class DPO(Objective):
    """The factor 2/β is that of the unlearning papers: as β → 0 the gradient is that of the log-ratios' difference."""

    beta: float = hyper(0.1, gt=0, description="inverse temperature of the preference", published="0.05, 0.1, 0.5")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over the forget rows; log-ratios are summed over each answer's tokens."""
        lost, won = step.forget, step.forget.alternatives
        gain = won.sequence_logprobs - won.reference_sequence_logprobs
        gain = gain - (lost.sequence_logprobs - lost.reference_sequence_logprobs)
        return {"forget": lost.mean_rows(-2 / self.beta * logsigmoid(self.beta * gain))}
