"""From scores of weights to scores of units to a mask: exact densities, family by family, without sorting anything.

All temporaries are blocks of `BLOCK` weights, so that a choice among all weights of a model holds no second copy of
their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Shaped
from torch import Tensor

from expunge.errors import UserError
from expunge.localize.base import Pool, Saliency
from expunge.localize.masks import Mask
from expunge.localize.units import FLAT, Family, Slab
from expunge.recipe import Strata

#: Weights that are looked at at once.
BLOCK = 1 << 20
#: Of the weights of a unit, `top` takes the mean of one in this many, rounded up.
_TENTH = 10
_HALF = 1 << 15


def unit_scores(families: Sequence[Family], saliency: Saliency, pool: Pool) -> list[Float[Tensor, " units"] | None]:
    """Per family the scores of its units, float32, or None if none of its parameters has scores.

    mean: over all weights that the unit owns in parameters with scores; top: over the largest tenth of them (rounded
    up). Units of one weight keep their scores, without a copy unless they have to be broadcast. Raises UserError if a
    score is infinite or not a number.
    """
    return [_pooled(family, saliency, pool) for family in families]


def choose(
    families: Sequence[Family], scores: Sequence[Shaped[Tensor, " units"] | None], density: float, strata: Strata
) -> list[Bool[Tensor, " units"]]:
    """Per family, which of its units are chosen: round(density · units) in each stratum, at least one, largest first.

    A stratum is the whole model, a decoder layer (what lies outside of the layers is one more) or a family. Density
    counts units, not weights, whatever their size: 0.1 of 24 layers are 2 layers, and with strata "tensor" each module
    or layer is a stratum of one unit, which is chosen. Units of families without scores count, but are never chosen:
    where fewer have scores than are wanted, all of these are chosen. Equal scores are chosen in the order of the
    model. Raises UserError for a density outside (0, 1], for scores that are infinite or not a number, and if no
    family has scores.
    """
    if not 0 < density <= 1:
        raise UserError(f"a density of {density} is not in (0, 1]", "give the part of the units to choose, e.g. 0.1")
    if all(score is None for score in scores):
        raise UserError(
            "none of the units has a score", "choose another attribution or unit: expunge list attributions"
        )
    chosen = [torch.zeros(family.count, dtype=torch.bool) for family in families]
    for members in _strata(families, strata).values():
        scored = {place: score for place in members if (score := scores[place]) is not None}
        for place, score in scored.items():
            _check(families[place].name, score)
        wanted = max(1, round(density * sum(families[place].count for place in members)))
        _take(scored, min(wanted, sum(families[place].count for place in scored)), chosen)
    return chosen


def mask_of(
    families: Sequence[Family], chosen: Sequence[Bool[Tensor, " units"]], about: Mapping[str, Any] | None = None
) -> Mask:
    """The mask of the chosen units: per parameter the smallest tensor that broadcasts to it.

    Single weights share their memory with `chosen`. Parameters without a chosen unit are left out.
    """
    inside: dict[str, Tensor] = {}
    for family, units in zip(families, chosen, strict=True):
        if not units.any():
            continue
        for slab in family.slabs:
            bits = _bits(slab, units)
            inside[slab.parameter] = inside[slab.parameter] | bits if slab.parameter in inside else bits
    return Mask(inside, dict(about or {}))


def _bits(slab: Slab, units: Tensor) -> Tensor:
    """Which entries of the slab's parameter the units own, as broadcast as they can be."""
    if slab.axis == FLAT:
        return units.reshape(slab.shape)
    if slab.axis is None:
        return units.reshape([1] * len(slab.shape))
    owned = torch.zeros(slab.shape[slab.axis], dtype=torch.bool)
    owned[slab.start : slab.start + len(units) * slab.size] = units.repeat_interleave(slab.size)
    return owned.reshape([-1 if axis == slab.axis else 1 for axis in range(len(slab.shape))])


# ---- pooling


def _pooled(family: Family, saliency: Saliency, pool: Pool) -> Tensor | None:
    parts = [(slab, saliency[slab.parameter].detach()) for slab in family.slabs if slab.parameter in saliency]
    if not parts:
        return None
    for name, scores in {slab.parameter: scores for slab, scores in parts}.items():
        _check(name, scores)
    if family.slabs[0].axis == FLAT:
        ((slab, scores),) = parts
        return scores.float().expand(slab.shape).reshape(-1)
    return _mean(family, parts) if pool == "mean" else _top(family, parts)


def _mean(family: Family, parts: Sequence[tuple[Slab, Tensor]]) -> Tensor:
    """Mean over all weights of each unit. What is broadcast is never expanded: a mean over copies is their value."""
    total = torch.zeros(family.count, dtype=torch.float64)
    for slab, scores in parts:
        others = [axis for axis in range(scores.ndim) if axis != slab.axis]
        along = scores.float().mean(others).double() if others else scores.double()
        if slab.axis is not None:
            along = along.expand(slab.shape[slab.axis])
            along = along[slab.start : slab.start + family.count * slab.size].reshape(family.count, slab.size).mean(1)
        total += along.cpu() * slab.weights
    return (total / sum(slab.weights for slab, _ in parts)).float()


def _top(family: Family, parts: Sequence[tuple[Slab, Tensor]]) -> Tensor:
    """Mean of the largest tenth of each unit's weights; units of more than a block are streamed one by one."""
    weights = sum(slab.weights for slab, _ in parts)
    count = -(-weights // _TENTH)
    if weights > BLOCK:
        return torch.tensor([_top_of(parts, unit, count) for unit in range(family.count)])
    found, step = [], BLOCK // weights
    for first in range(0, family.count, step):
        units = min(step, family.count - first)
        owned = [_owned(slab, scores, first, units).reshape(units, -1).float() for slab, scores in parts]
        found.append(torch.cat(owned, 1).topk(count, dim=1, sorted=False).values.double().mean(1).float().cpu())
    return torch.cat(found)


def _top_of(parts: Sequence[tuple[Slab, Tensor]], unit: int, count: int) -> float:
    def blocks() -> Iterator[Tensor]:
        for slab, scores in parts:
            yield from _blocks(_owned(slab, scores, unit, 1))

    least, equal = _threshold(blocks, count)
    total, value = 0.0, 0.0
    for block in blocks():
        keys = _keys(block)
        total += float(block[keys > least].sum(dtype=torch.float64))
        if (same := block[keys == least]).numel():
            value = float(same[0])
    return (total + equal * value) / count


def _owned(slab: Slab, scores: Tensor, first: int, units: int) -> Tensor:
    """Scores of some units of a family, units along the first axis (but for a unit that is a whole parameter)."""
    scores = scores.expand(slab.shape)
    if slab.axis is None:
        return scores
    return scores.narrow(slab.axis, slab.start + first * slab.size, units * slab.size).movedim(slab.axis, 0)


# ---- choosing


def _strata(families: Sequence[Family], strata: Strata) -> dict[int | None, list[int]]:
    """Places of the families that share a density."""
    found: dict[int | None, list[int]] = {}
    for place, family in enumerate(families):
        key = {"model": 0, "layer": family.layer, "tensor": place}[strata]
        found.setdefault(key, []).append(place)
    return found


def _take(scored: Mapping[int, Tensor], wanted: int, chosen: Sequence[Tensor]) -> None:
    """Mark the `wanted` units with the largest scores in `chosen`."""
    if not wanted:
        return
    least, equal = _threshold(lambda: (block for score in scored.values() for block in _blocks(score)), wanted)
    for place, score in scored.items():
        done = 0
        for block in _blocks(score):
            keys = _keys(block)
            inside = keys > least
            if equal:
                first = (keys == least).nonzero()[:equal]
                inside[first] = True
                equal -= len(first)
            chosen[place][done : done + len(block)] = inside
            done += len(block)


def _threshold(blocks: Callable[[], Iterator[Tensor]], wanted: int) -> tuple[int, int]:
    """(Key of the `wanted`-th largest score, how many with just this key are among the `wanted` largest).

    Two histograms, of the upper and then of the lower half of the bits, find it exactly in memory of one block.
    """
    upper = torch.zeros(2 * _HALF, dtype=torch.int64)
    for block in blocks():
        upper += torch.bincount((_keys(block) >> 16) + _HALF, minlength=2 * _HALF).cpu()
    high, wanted = _bin(upper, wanted)
    high -= _HALF
    lower = torch.zeros(2 * _HALF, dtype=torch.int64)
    for block in blocks():
        keys = _keys(block)
        lower += torch.bincount(keys[keys >> 16 == high] & 0xFFFF, minlength=2 * _HALF).cpu()
    low, wanted = _bin(lower, wanted)
    return (high << 16) | low, wanted


def _bin(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the `wanted`-th entry from the top, and which one it is from the top of the bin (from 1)."""
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, wanted))
    return len(histogram) - 1 - place, wanted - int(reached[place - 1] if place else 0)


def _keys(block: Float[Tensor, " n"]) -> Int32[Tensor, " n"]:
    """Whole numbers in the order of the scores; −0 and 0 are the same."""
    bits = (block + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _blocks(scores: Tensor) -> Iterator[Float[Tensor, " n"]]:
    """The scores in order, flat and in float32, in pieces of BLOCK, or of a row where a row is longer; what is
    broadcast is not expanded as a whole."""
    if scores.ndim == 1 or scores.is_contiguous():
        pieces = scores.reshape(-1).split(BLOCK)
    else:
        pieces = scores.split(max(1, BLOCK // max(1, math.prod(scores.shape[1:]))))
    for piece in pieces:
        yield piece.reshape(-1).float()


def _check(name: str, scores: Tensor) -> None:
    if not all(bool(block.isfinite().all()) for block in _blocks(scores)):
        raise UserError(
            f"the scores of {name} are infinite or not a number",
            "run the attribution in float32, or choose another one: expunge list attributions",
        )
