"""Activations: how much a unit writes into the residual stream on the forget rows (as in arXiv 2311.09060)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expunge.localize.base import Attribution, Saliency, attribution, setting
from expunge.localize.evidence import Evidence
from expunge.localize.readers import READ_UNITS, Reader, laid, readers_of, watched
from expunge.models.passes import Forward


@attribution(
    name="activations",
    idea="units that write most into the residual stream on the forget rows",
    formula="mean_t |m_i(t)| · ‖v_i‖; a head: mean_t ‖W_o,h z_h(t)‖",
    paper="2311.09060",
    needs=("forget",),
    units=READ_UNITS,
)
class Activations(Attribution):
    """m_i is what the last matrix of the MLP multiplies its column v_i with. A neuron has its value vector's score.

    A head's output z_h is several numbers: the norm is that of the vector that they write together.
    """

    tokens: Literal["answer", "all"] = setting(
        "answer", description="tokens that the mean is over: where an answer token is predicted, or prompts too"
    )

    @torch.no_grad()
    def saliency(self, evidence: Evidence) -> Saliency:
        """Scores of the columns that units write with; one sum per unit in memory, and heads' column products."""
        readers = readers_of(evidence)
        sums = [torch.zeros(reader.family.count, device=reader.linear.weight.device) for reader in readers]
        kernels = [_kernel(reader) for reader in readers]
        places = {reader.slab.parameter: place for place, reader in enumerate(readers)}
        total = 0
        with evidence.only(()):
            for forward in evidence.batches("forget", logits=False):
                where = self._positions(forward)
                total += len(where)

                def add(reader: Reader, inputs: Tensor, where: Tensor = where) -> None:
                    place = places[reader.slab.parameter]
                    own = reader.of_units(inputs.flatten(0, -2)[where.to(inputs.device)])
                    sums[place] += _lengths(own, kernels[place]).sum(0)

                with evidence.autocast(), watched(readers, forward, add):
                    _ = forward.logits
        return laid(readers, [own / total for own in sums])

    def _positions(self, forward: Forward) -> Tensor:
        """Flat positions in the lines of the tokens that count."""
        if self.tokens == "all":
            return forward.place
        return forward.place[forward.batch.supervised[forward.batch.attention_mask.bool()]]


def _kernel(reader: Reader) -> Tensor:
    """WᵀW of each unit's columns W, float32 [units, entries, entries]: ‖Wz‖² = zᵀ(WᵀW)z needs no vector per token."""
    columns = reader.columns()
    if columns.shape[-1] == 1:
        return torch.linalg.vector_norm(columns[..., 0], dim=1, dtype=torch.float32).square()[:, None, None]
    wide = columns.float()
    return wide.transpose(1, 2) @ wide


def _lengths(activations: Tensor, kernel: Tensor) -> Tensor:
    """‖W z‖ per token and unit, float32 [tokens, units], of activations [tokens, units, entries]."""
    if activations.shape[-1] == 1:
        return activations[..., 0].abs() * kernel[:, 0, 0].sqrt()
    across = activations.transpose(0, 1)
    return (across @ kernel).mul_(across).sum(-1).clamp_(min=0).sqrt_().T
