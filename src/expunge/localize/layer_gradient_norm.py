"""Relative gradient norm of layers: which layers the forget rows move more than others do (arXiv 2411.04448)."""

from __future__ import annotations

import torch

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence
from expunge.models.names import layer_of


@attribution(
    name="layer_gradient_norm",
    idea="layers whose gradient is large on the forget rows, relative to the retain rows",
    formula="‖g_f‖ / ‖g_r‖ per layer",
    paper="2411.04448",
    needs=("forget", "retain"),
    units=("layer",),
)
class LayerGradientNorm(Attribution):
    """g is the gradient of the mean negative log-likelihood per token; the paper trains layers above the mean."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """The ratio of the layer, for each of its parameters; nothing of the gradients stays but their norms."""
        retain, forget = _norms(evidence, "retain"), _norms(evidence, "forget")
        ratio = {layer: norm / max(retain[layer], 1e-30) for layer, norm in forget.items()}
        return {
            name: torch.full([1] * parameter.ndim, ratio[layer_of(name)])
            for name, parameter in evidence.parameters.items()
        }


def _norms(evidence: Evidence, split: str) -> dict[int | None, float]:
    """Decoder layer → norm of its gradient on a split."""
    squares: dict[int | None, float] = {}
    for name, gradient in evidence.gradient(split, mean=True).items():
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + float(gradient.norm()) ** 2
    return {layer: total**0.5 for layer, total in squares.items()}
