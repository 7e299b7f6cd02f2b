"""IDK+AP: decline the forget prompts, and prefer to answer the retain prompts (arXiv 2410.08109)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.step import Step


@objective(
    name="idk_ap",
    idea="decline forget prompts, but prefer answering to declining on retain",
    formula="NLL(y_idk | forget prompts) − (1/β) · E_retain log σ(β · [log p(y) − log p(y_idk)])",
    paper="2410.08109",
    kind="suppresses",
    retain=True,
    reads_forget=False,
    alternatives="idk",
    retain_alternatives=True,
    rates=(1e-5,),
)
class IdkAP(Objective):
    """Answer preservation is its own retain term: it needs no start model, and an NLL term may be added to it."""

    beta: float = hyper(0.1, gt=0, description="inverse temperature of the answer preservation", published="0.1")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean token NLL of declining forget prompts; mean over the retain rows, log-probs summed over answers."""
        retain = step.retain
        margin = retain.sequence_logprobs - retain.alternatives.sequence_logprobs
        return {
            "forget": step.forget.alternatives.nll(),
            "retain_preservation": retain.mean_rows(-1 / self.beta * logsigmoid(self.beta * margin)),
        }
