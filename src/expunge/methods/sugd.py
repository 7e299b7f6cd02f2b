"""SUGD: sequential descent–ascent over chunks of the forget rows (arXiv 2503.02443)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from expunge.methods.base import Objective, hyper, objective
from expunge.methods.steering import in_layers
from expunge.methods.step import Rows, Step
from expunge.models.forward import decoder_layers


@objective(
    name="sugd",
    idea="ascend on one chunk of forget rows after another, among retain rows",
    formula="(−Σ_forget CE + φ · Σ_retain CE) / rows of the step, CE a row's mean token NLL",
    paper="2503.02443",
    kind="removes",
    retain=True,
    retain_ratio=7,
    rates=(1e-5,),
)
class SUGD(Objective):
    """First in SemEval-2025 Task 4. As submitted: batch_size 1 (beside 7 retain rows), 7 epochs per chunk.

    Each chunk has a fresh optimizer and schedule. The ascent is unbounded: only the length of a chunk ends it.
    """

    chunk: int = hyper(32, gt=0, description="forget rows that are trained on together", published="32, 64")
    positive_factor: float = hyper(0.5, ge=0, description="weight φ of a retain row", published="0.5, 1")
    layers: int = hyper(8, gt=0, description="last decoder layers, which alone are trained", published="8")

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Mean over all rows of the step of factor · mean token NLL; the factor is −1 for forget rows."""
        return {"forget": -_part(step.forget, step), "retain": self.positive_factor * _part(step.retain, step)}

    def check(self, model: nn.Module) -> None:
        """Raise UserError if the decoder layers can't be found."""
        decoder_layers(model)

    def chunk_rows(self) -> int:
        """Forget rows of a chunk."""
        return self.chunk

    def trainable(self, depth: int) -> list[str]:
        """Every parameter of the last layers; neither embeddings nor the final norm."""
        return [in_layers(range(max(depth - self.layers, 0), depth))]


def _part(rows: Rows, step: Step) -> Float[Tensor, ""]:
    """Sum over rows of their mean token NLL, over all rows of the step."""
    share = rows.total_rows / max(step.forget.total_rows + step.retain.total_rows, 1)
    return share * rows.mean_rows(-rows.sequence_logprobs / rows.lengths)
