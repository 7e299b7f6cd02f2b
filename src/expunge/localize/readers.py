"""Where units meet the residual stream: the linear layer that takes a unit's activation and writes what it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.localize.base import Saliency
from expunge.localize.evidence import Evidence
from expunge.localize.random_ import lay
from expunge.localize.units import Family, Slab
from expunge.models.passes import Forward
from expunge.models.quantization import LinearWeight, linear_weights

#: Units whose activation enters a linear layer of their own columns.
READ_UNITS = ("value_vector", "neuron", "head")


@dataclass(frozen=True)
class Reader:
    """The columns of a linear layer that take the activations of a family's units, `slab.size` per unit."""

    family: Family
    slab: Slab
    linear: LinearWeight

    def of_units(self, inputs: Tensor) -> Tensor:
        """[tokens, inputs of the layer] → [tokens, units, entries per unit], float32."""
        owned = inputs.narrow(-1, self.slab.start, self.family.count * self.slab.size)
        return owned.reshape(-1, self.family.count, self.slab.size).float()

    def columns(self) -> Tensor:
        """What the units write per entry of their activation: [units, out, entries per unit], in the weight's dtype."""
        weight = self.linear.oriented(self.linear.weight.detach())
        owned = weight.narrow(1, self.slab.start, self.family.count * self.slab.size)
        return owned.unflatten(1, (self.family.count, self.slab.size)).transpose(0, 1)


def readers_of(evidence: Evidence) -> list[Reader]:
    """One reader per family, in their order. Raises UserError for a family whose activations enter no linear layer."""
    linears = linear_weights(evidence.model)
    found = []
    for family in evidence.families:
        own = [
            slab
            for slab in family.slabs
            if slab.parameter in linears and slab.axis == (0 if linears[slab.parameter].transposed else 1)
        ]
        if len(own) != 1:
            raise UserError(
                f"the activations of {family.name} can't be read", f"units that can be: {', '.join(READ_UNITS)}"
            )
        found.append(Reader(family, own[0], linears[own[0].parameter]))
    return found


def over(evidence: Evidence, split: str, rows: Sequence[Encoded]) -> Evidence:
    """The same evidence with other rows in one split."""
    other = copy.copy(evidence)
    other.rows = {**evidence.rows, split: rows}
    return other


def laid(readers: Sequence[Reader], scores: Sequence[Tensor]) -> Saliency:
    """Scores [units] per family as scores of the columns that read the units; their other weights have none, so that
    a unit's mean is its score."""
    found: dict[str, Tensor] = {}
    for reader, own in zip(readers, scores, strict=True):
        lay(found, reader.slab, own.cpu())
    return found


@contextmanager
def watched(
    readers: Sequence[Reader], forward: Forward, see: Callable[[Reader, Tensor], None], *, slopes: bool = False
) -> Iterator[None]:
    """Within it, the forward pass of this batch hands every reader's inputs [..., in], token by token, to `see`.

    With `slopes` the inputs require a gradient, so that `see` can hook on to it. Raises UserError where a layer does
    not see every token once, as in a mixture of experts.
    """

    def hook(reader: Reader, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        # OPT hands its MLPs all lines as one
        if not args or args[0].shape[:-1] not in (forward.shape, (math.prod(forward.shape),)):
            raise UserError(
                f"{reader.slab.parameter} does not take every token once: its units' activations can't be added up",
                "choose an attribution by gradients of weights, e.g. gradient",
            )
        if slopes and not args[0].requires_grad:
            args[0].requires_grad_()  # the lowest layer: below it nothing asks for a gradient
        with torch.autocast(args[0].device.type, enabled=False):
            see(reader, args[0])

    handles = [reader.linear.module.register_forward_pre_hook(partial(hook, reader)) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
