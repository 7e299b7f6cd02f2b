"""How well a mask, the scores of units, or an update find a region that is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.localize.choose import unit_scores
from expunge.localize.masks import Mask
from expunge.localize.units import Family

#: Parameter name → its shape in the model: a mask alone does not say how many weights one of its bits stands for.
Shapes = Mapping[str, Sequence[int]]

#: Units that are compared with the region's at once; bounds the memory beside the scores.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Agreement:
    """How two masks overlap, counted in weights."""

    both: int  # inside the mask and the truth
    mask: int  # inside the mask
    truth: int  # inside the truth

    @property
    def precision(self) -> float:
        """Part of the mask that is inside the truth, in [0, 1]; 0 for an empty mask."""
        return self.both / self.mask if self.mask else 0.0

    @property
    def recall(self) -> float:
        """Part of the truth that the mask holds, in [0, 1]; 0 for an empty truth."""
        return self.both / self.truth if self.truth else 0.0

    @property
    def overlap(self) -> float:
        """Jaccard index: weights in both over weights in either, in [0, 1]; 0 where both are empty."""
        either = self.mask + self.truth - self.both
        return self.both / either if either else 0.0


def agreement(mask: Mask, truth: Mask, shapes: Shapes) -> Agreement:
    """Weights inside both masks and inside each. Raises UserError if one is not of a model with these shapes."""
    for one in (mask, truth):
        _check(one, shapes)
    both = 0
    for name in mask.inside.keys() & truth.inside.keys():
        both += _weights(mask.inside[name] & truth.inside[name].to(mask.inside[name].device), shapes[name])
    own, true = (sum(_weights(bits, shapes[name]) for name, bits in one.inside.items()) for one in (mask, truth))
    return Agreement(both, own, true)


def precision(mask: Mask, truth: Mask, shapes: Shapes) -> float:
    """Part of the mask's weights that are inside the truth, in [0, 1]. Raises UserError as `agreement`."""
    return agreement(mask, truth, shapes).precision


def recall(mask: Mask, truth: Mask, shapes: Shapes) -> float:
    """Part of the truth's weights that are inside the mask, in [0, 1]. Raises UserError as `agreement`."""
    return agreement(mask, truth, shapes).recall


def overlap(mask: Mask, truth: Mask, shapes: Shapes) -> float:
    """Jaccard index of two masks by weights, in [0, 1]. Raises UserError as `agreement`."""
    return agreement(mask, truth, shapes).overlap


def auc(scores: Sequence[Tensor | None], truth: Mask, families: Sequence[Family]) -> float | None:
    """Probability that a unit of the truth scores higher than one outside it, in [0, 1]; ties count half.

    A unit is of the truth if most of its weights are. None where all units, or none, are: then nothing can be told.
    Only the scores of the truth's units are sorted; the others are looked up among them piece by piece.
    """
    labels = inside(truth, families)
    pairs = [(own.flatten().cpu(), label) for own, label in zip(scores, labels, strict=True) if own is not None]
    high = torch.cat([own[label] for own, label in pairs] or [torch.empty(0)]).sort().values
    beaten, outside = 0.0, 0
    for own, label in pairs:
        for piece in own[~label].split(_PIECE):
            right = torch.searchsorted(high, piece, right=True)
            left = torch.searchsorted(high, piece)
            # above: high[right:]; equal: high[left:right], which count half
            beaten += float(len(high) * len(piece)) - float((right + left).sum()) / 2
            outside += len(piece)
    return beaten / (len(high) * outside) if len(high) and outside else None


def inside(truth: Mask, families: Sequence[Family]) -> list[Tensor]:
    """Per family, which units have most of their weights inside the truth, bool [count]."""
    parts = unit_scores(families, _parts(truth, families), "mean")
    return [
        torch.zeros(family.count, dtype=torch.bool) if part is None else part.cpu() > 0.5
        for family, part in zip(families, parts, strict=True)
    ]


def touched(region: Mask, families: Sequence[Family]) -> list[Tensor]:
    """Per family, which units have any weight inside the region, bool [count]."""
    parts = unit_scores(families, _parts(region, families), "mean")
    return [
        torch.zeros(family.count, dtype=torch.bool) if part is None else part.cpu() > 0
        for family, part in zip(families, parts, strict=True)
    ]


def check_region(region: Mask, families: Sequence[Family], unit: str) -> None:
    """Raises UserError for a region of which no whole unit of this kind could be a part."""
    if not any(slab.parameter in region.inside for family in families for slab in family.slabs):
        made_of = region.about.get("unit")
        whose = f": it is made of {str(made_of).replace('_', ' ')}s" if made_of else ""
        raise UserError(
            f"the known region has no weight of any {unit}{whose}",
            "choose the unit that the region was made of" + (f": --unit {made_of}" if made_of else ""),
        )


def energy_inside(changes: Iterable[tuple[str, Tensor, Tensor]], region: Mask) -> float | None:
    """‖Δθ inside the region‖² / ‖Δθ‖² over (name, before, after), in [0, 1]; None if nothing has changed.

    One parameter is held at a time. Raises UserError if the region is of another model.
    """
    within, whole = 0.0, 0.0
    for name, before, after in changes:
        squares = (after.detach().float() - before.detach().to(after.device).float()).square_()
        whole += float(squares.sum(dtype=torch.float64))
        if name in region.inside:
            bits = region.inside[name].to(squares.device)
            _check_shape(name, bits, squares.shape)
            within += float(squares.mul_(bits).sum(dtype=torch.float64))
    return within / whole if whole > 0 else None


def _parts(truth: Mask, families: Sequence[Family]) -> dict[str, Tensor]:
    """1 inside, 0 outside, for every parameter of the families: one that the truth lacks is all outside."""
    found = {}
    for slab in (slab for family in families for slab in family.slabs):
        bits = truth.inside.get(slab.parameter)
        if bits is not None:
            _check_shape(slab.parameter, bits, slab.shape)
        found[slab.parameter] = torch.zeros([1] * len(slab.shape)) if bits is None else bits
    return found


def _weights(bits: Tensor, shape: Sequence[int]) -> int:
    """How many weights the bits stand for once they are broadcast."""
    return int(bits.sum()) * (math.prod(shape) // bits.numel()) if bits.numel() else 0


def _check(mask: Mask, shapes: Shapes) -> None:
    for name, bits in mask.inside.items():
        if name not in shapes:
            raise UserError(f"the mask is of another model: this one has no {name}", "compare masks of one model")
        _check_shape(name, bits, shapes[name])


def _check_shape(name: str, bits: Tensor, shape: Sequence[int]) -> None:
    fits = bits.ndim == len(shape) and all(own in (1, wanted) for own, wanted in zip(bits.shape, shape, strict=True))
    if not fits:
        raise UserError(
            f"the mask is of another model: {name} is {tuple(shape)} here", "compare with a mask of this model"
        )
