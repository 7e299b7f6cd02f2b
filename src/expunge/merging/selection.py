"""Exact selection of the largest magnitudes by histograms of the float bits: no sort, bounded memory.

Non-negative float32 numbers are ordered as their bit patterns are. A histogram of the upper 16 of the 31 bits finds
the bucket of the k-th largest magnitude, a histogram of the lower 15 bits inside that bucket finds it exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import hardshrink

CHUNK = 1 << 17
"""Elements that are worked on at once: what the processor's cache holds of a few tensors."""

_LOW_BITS = 15
_COARSE = 1 << 16
_FINE = 1 << _LOW_BITS
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Cut:
    """The survivors of a trim: magnitudes above `threshold`, and those equal to it up to the flat index `last`."""

    threshold: float
    last: int


def kept_count(numel: int, density: float) -> int:
    """How many of `numel` elements a trim to `density` keeps: the nearest whole number."""
    return min(numel, max(0, round(density * numel)))


def cut(values: Float[Tensor, "*shape"], keep: int) -> Cut:
    """Where to cut so that exactly `keep` elements stay; among equal magnitudes the first ones stay."""
    flat = values.reshape(-1)
    if keep <= 0:
        return Cut(math.inf, -1)
    if keep >= flat.numel():
        return Cut(-1.0, flat.numel() - 1)
    bucket, above = _locate(coarse_counts(flat), keep)
    counts = fine_counts(flat, bucket)
    low, above_low = _locate(counts, keep - above)
    threshold = _magnitude(bucket, low)
    ties = keep - above - above_low
    last = flat.numel() - 1 if ties == int(counts[low]) else _index_of(flat, threshold, ties)
    return Cut(threshold, last)


def trimmed(values: Float[Tensor, " n"], start: int, at: Cut) -> Float[Tensor, " n"]:
    """A copy with 0 for what is cut; `values` is the piece of the flat tensor that begins at index `start`."""
    if at.threshold < 0:
        return values.clone()
    may_tie = min(values.numel(), max(0, at.last - start + 1))
    # hardshrink drops |x| ≤ its limit: just below the threshold it lets the ties pass
    below = float(torch.nextafter(torch.tensor(at.threshold), torch.tensor(-1.0))) if may_tie else at.threshold
    kept = hardshrink(values, below)
    if may_tie < values.numel():
        kept[may_tie:] = hardshrink(values[may_tie:], at.threshold)
    return kept


def coarse_counts(values: Float[Tensor, "*shape"]) -> Int64[Tensor, " buckets"]:
    """How many magnitudes fall into each of the 65536 buckets of upper bits."""
    counts = torch.zeros(_COARSE, dtype=torch.int64, device=values.device)
    for bits in _bits(values).split(CHUNK):
        counts += torch.bincount((bits & _MAGNITUDE) >> _LOW_BITS, minlength=_COARSE)
    return counts


def fine_counts(values: Float[Tensor, "*shape"], bucket: int) -> Int64[Tensor, " values"]:
    """How many magnitudes inside `bucket` have each of the 32768 patterns of lower bits."""
    counts = torch.zeros(_FINE, dtype=torch.int64, device=values.device)
    for piece in _bits(values).split(CHUNK):
        bits = piece & _MAGNITUDE
        inside = bits[(bits >> _LOW_BITS) == bucket]
        counts += torch.bincount(inside & (_FINE - 1), minlength=_FINE)
    return counts


def kept_over_model(read: Callable[[str], Tensor | None], sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """How many elements of each tensor stay when one threshold trims all of them together to `density`.

    `read` gives a tensor by name, or None for zeros; it is called twice per name. Keeping the largest that many of each
    tensor is then the same as one cut through the flattened model, ties to the tensors that come first.
    """
    keep = kept_count(sum(sizes.values()), density)
    if keep == sum(sizes.values()):
        return dict(sizes)
    coarse = torch.zeros(_COARSE, dtype=torch.int64)
    for name, numel in sizes.items():
        values = read(name)
        if values is None:
            coarse[0] += numel
        else:
            coarse += coarse_counts(values).cpu()
    if keep == 0:
        return dict.fromkeys(sizes, 0)
    bucket, above = _locate(coarse, keep)
    surely: dict[str, int] = {}
    maybe: dict[str, tuple[Tensor, Tensor]] = {}  # sparse fine counts: a dense one per tensor would add up
    fine = torch.zeros(_FINE, dtype=torch.int64)
    for name, numel in sizes.items():
        values = read(name)
        counts = torch.zeros(_FINE, dtype=torch.int64)
        surely[name] = 0
        if values is None:
            counts[0] = numel if bucket == 0 else 0
        else:
            surely[name] = int(coarse_counts(values)[bucket + 1 :].sum())
            counts = fine_counts(values, bucket).cpu()
        fine += counts
        present = counts.nonzero().squeeze(1)
        maybe[name] = (present, counts[present])
    low, above_low = _locate(fine, keep - above)
    ties = keep - above - above_low
    kept = {}
    for name in sizes:
        present, counts = maybe[name]
        equal = min(ties, int(counts[present == low].sum()))
        ties -= equal
        kept[name] = surely[name] + int(counts[present > low].sum()) + equal
    return kept


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.int32)


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the `rank`-th largest (1 = largest), and how many lie above that bucket."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(rank, device=counts.device)))
    bucket = counts.numel() - 1 - place
    return bucket, int(from_top[place] - counts[bucket])


def _magnitude(bucket: int, low: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", (bucket << _LOW_BITS) | low))[0]
    return value


def _index_of(flat: Tensor, magnitude: float, rank: int) -> int:
    """Flat index of the `rank`-th element (1 = first) whose magnitude is exactly `magnitude`."""
    start = 0
    for piece in flat.split(CHUNK):
        found = (piece.abs() == magnitude).nonzero().squeeze(1)
        if rank <= found.numel():
            return start + int(found[rank - 1])
        rank -= found.numel()
        start += piece.numel()
    raise AssertionError("fewer equal magnitudes than the histogram counted")
