"""Exact selection of the largest magnitudes: no sort, bounded memory.

A sample of the tensor says between which two magnitudes the k-th largest should lie. One pass counts what is above and
takes out the few between; if the k-th is among them, and that the counts tell for certain, it is found there. Else
histograms find it: non-negative float32 numbers are ordered as their bit patterns are, so that a histogram of the upper
16 of the 31 bits gives the bucket, and one of the lower 15 bits inside that bucket the number.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import hardshrink

Result = TypeVar("Result")

CHUNK = 1 << 17
"""Elements that are worked on at once: what the processor's cache holds of a few tensors."""

_LOW_BITS = 15
_COARSE = 1 << 16
_FINE = 1 << _LOW_BITS
_MAGNITUDE = 0x7FFFFFFF
_SAMPLES = (1 << 15, 1 << 17)  # least and most
_LEAST = 1 << 17  # elements of a tensor that is worth a sample
_SPREAD = 4.0  # standard deviations of a rank in the sample
_CROWDED = 4  # so many times more of the sample between the limits than there should be: too many equal numbers


@dataclass(frozen=True, slots=True)
class Cut:
    """The survivors of a trim: magnitudes above `threshold`, and those equal to it up to the flat index `last`."""

    threshold: float
    last: int


@runtime_checkable
class Each(Protocol):
    """Calls a function with every name, in whatever way, and gives (name, what it returned) in their order."""

    def __call__(self, work: Callable[[str], Result], names: Sequence[str], /) -> Iterable[tuple[str, Result]]:
        """One after the other, or several at once."""
        ...


def one_by_one(work: Callable[[str], Result], names: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """The plain loop."""
    return ((name, work(name)) for name in names)


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
    found = _sampled(flat, keep) or _counted(flat, keep)
    threshold, ties, equal = found
    last = flat.numel() - 1 if ties == equal else _index_of(flat, threshold, ties)
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


def count(mask: Bool[Tensor, "*shape"] | NDArray[np.bool_]) -> int:
    """How many are true."""
    # numpy's is 20 times as fast as torch's on the processor
    on_device = isinstance(mask, Tensor) and mask.device.type != "cpu"
    return int(mask.sum()) if on_device else int(np.count_nonzero(mask))


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


def kept_over_model(
    read: Callable[[str], Tensor | None], sizes: Mapping[str, int], density: float, each: Each = one_by_one
) -> dict[str, int]:
    """How many elements of each tensor stay when one threshold trims all of them together to `density`.

    `read` gives a tensor by name, or None for zeros; it is called twice per name. Keeping the largest that many of each
    tensor is then the same as one cut through the flattened model, ties to the tensors that come first.
    """
    keep = kept_count(sum(sizes.values()), density)
    if keep == sum(sizes.values()):
        return dict(sizes)
    coarse = torch.zeros(_COARSE, dtype=torch.int64)

    def coarsely(name: str) -> Tensor | None:
        values = read(name)
        return None if values is None else coarse_counts(values).cpu()

    for name, found in each(coarsely, list(sizes)):
        if found is None:
            coarse[0] += sizes[name]
        else:
            coarse += found
    if keep == 0:
        return dict.fromkeys(sizes, 0)
    bucket, above = _locate(coarse, keep)
    surely: dict[str, int] = {}
    maybe: dict[str, tuple[Tensor, Tensor]] = {}  # sparse fine counts: a dense one per tensor would add up
    fine = torch.zeros(_FINE, dtype=torch.int64)

    def finely(name: str) -> tuple[int, Tensor]:
        values = read(name)
        if values is not None:
            return _count_from(values, bucket + 1), fine_counts(values, bucket).cpu()
        counts = torch.zeros(_FINE, dtype=torch.int64)
        counts[0] = sizes[name] if bucket == 0 else 0
        return 0, counts

    for name, (more, counts) in each(finely, list(sizes)):
        surely[name] = more
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


def _sampled(flat: Tensor, keep: int) -> tuple[float, int, int] | None:
    """As `_counted`, by way of a sample; None where the sample does not tell enough, and on other devices."""
    if flat.device.type != "cpu" or flat.numel() < _LEAST:
        return None
    values = flat.numpy()  # numpy compares and counts several times as fast as torch here
    limits = _limits(values, keep)
    if limits is None:
        return None
    low, high = limits
    above, between = 0, []
    magnitudes = np.empty(CHUNK, np.float32)
    over, within = np.empty(CHUNK, bool), np.empty(CHUNK, bool)
    for start in range(0, values.size, CHUNK):
        piece = values[start : start + CHUNK]
        magnitude, beyond, inside = magnitudes[: piece.size], over[: piece.size], within[: piece.size]
        np.abs(piece, out=magnitude)
        np.greater(magnitude, high, out=beyond)
        np.greater_equal(magnitude, low, out=inside)
        above += int(np.count_nonzero(beyond))
        inside ^= beyond
        between.append(magnitude[inside])
    candidates = np.concatenate(between)
    rank = keep - above  # from the top of the candidates
    if not 0 < rank <= candidates.size:
        return None
    place = candidates.size - rank
    threshold = np.partition(candidates, place)[place]
    ties = rank - int(np.count_nonzero(candidates > threshold))
    return float(threshold), ties, int(np.count_nonzero(candidates == threshold))


def _limits(values: NDArray[np.float32], keep: int) -> tuple[np.float32, np.float32] | None:
    """Two magnitudes between which the `keep`-th largest most probably lies; None if a sample can't say."""
    wanted = min(max(values.size >> 6, _SAMPLES[0]), _SAMPLES[1])
    sample = np.abs(values[:: values.size // wanted | 1])  # an odd step does not stay in one column of a matrix
    sample.sort()
    size, part = sample.size, keep / values.size
    place, reach = (1 - part) * size, _SPREAD * math.sqrt(part * (1 - part) * size) + 1
    start, end = int(max(0, place - reach)), int(min(size - 1, place + reach))
    low, high = sample[start], sample[end] if place + reach < size else np.float32(np.inf)
    crowd = np.searchsorted(sample, high, "right") - np.searchsorted(sample, low)
    return None if crowd > _CROWDED * (end - start + 1) else (low, high)


def _counted(flat: Tensor, keep: int) -> tuple[float, int, int]:
    """The `keep`-th largest magnitude, how many of those equal to it are kept, and how many there are."""
    bucket, above = _locate(coarse_counts(flat), keep)
    counts = fine_counts(flat, bucket)
    low, above_low = _locate(counts, keep - above)
    return _magnitude(bucket, low), keep - above - above_low, int(counts[low])


def _count_from(values: Tensor, bucket: int) -> int:
    """How many magnitudes lie in that bucket or above."""
    least = _magnitude(bucket, 0)
    return sum(count(piece.abs() >= least) for piece in values.reshape(-1).split(CHUNK))


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
