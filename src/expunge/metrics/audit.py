"""How far a metric can be trusted: what attacks do to it over many checkpoints, and whether it sees the knowledge.

A metric is read on a zoo of checkpoints before and after an attack. One that measures what the weights hold keeps
their order (correlation), and under attacks that only change how a model is asked it keeps the values too (identity);
arXiv:2406.09179. It also has to tell models that hold the knowledge from models that do not (faithfulness), and must
not let an unlearned model pass that a little training or quantization brings back (robustness); arXiv:2506.12618.
All values are oriented: higher means that more is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expunge.metrics.base import Metric, Resampling
from expunge.numbers import harmonic_mean

Numbers = NDArray[np.float64]

#: Fewer checkpoints than this say nothing about an order.
FEWEST = 4


@dataclass(frozen=True)
class Correlation:
    """A correlation over n checkpoints, with its 95% interval (checkpoints drawn anew); None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


def oriented(
    values: Sequence[float | None], entry: Metric, ends: tuple[float | None, float | None] = (None, None)
) -> Numbers:
    """The values as "higher knows more" (NLL and perplexity as −log); NaN where nothing was measured.

    A metric without a learnt end (an AUC, PrivLeak) is turned by what it says of target and reference, the `ends`.
    """
    given = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if entry.average == "geometric":
        given = np.log(given)
    target, reference = ends
    falls = entry.learnt is None and target is not None and reference is not None and target < reference
    return -given if entry.learnt == "low" or falls else given


def pearson(before: Numbers, after: Numbers) -> float | None:
    """Pearson's correlation of paired values; None with fewer than FEWEST pairs or without spread on either side."""
    pairs = _pairs(before, after)
    if pairs.shape[1] < FEWEST or np.ptp(pairs, axis=1).min() <= 1e-12 * np.abs(pairs).max():
        return None
    centred = pairs - pairs.mean(axis=1, keepdims=True)
    return float((centred[0] * centred[1]).sum() / np.sqrt((centred**2).sum(axis=1).prod()))


def spearman(before: Numbers, after: Numbers) -> float | None:
    """Spearman's correlation: Pearson's of the ranks, ties at their mean rank."""
    pairs = _pairs(before, after)
    return pearson(*map(ranks, pairs)) if pairs.shape[1] >= FEWEST else None


def ranks(values: Numbers) -> Numbers:
    """Ranks from 1, ties at their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return ((ends - count + 1 + ends) / 2)[place].astype(np.float64)


def correlation(
    before: Numbers,
    after: Numbers,
    resampling: Resampling,
    measure: Callable[[Numbers, Numbers], float | None] = pearson,
) -> Correlation:
    """A correlation and its percentile interval over checkpoints drawn with replacement."""
    pairs = _pairs(before, after)
    value = measure(*pairs)
    if value is None:
        return Correlation(None, n=pairs.shape[1])
    generator = np.random.default_rng(resampling.seed)
    draws = generator.integers(0, pairs.shape[1], size=(min(resampling.count, 1000), pairs.shape[1]))
    found = [measure(*pairs[:, draw]) for draw in draws]
    known = [one for one in found if one is not None]
    if len(known) < len(found) / 2:
        return Correlation(value, n=pairs.shape[1])
    low, high = np.quantile(known, [0.025, 0.975])
    return Correlation(value, float(low), float(high), pairs.shape[1])


def identity_distance(before: Numbers, after: Numbers, span: float) -> float | None:
    """Mean |after − before| in units of `span`, the distance between target and reference before the attack."""
    pairs = _pairs(before, after)
    if not pairs.shape[1] or not np.isfinite(span) or span == 0:
        return None
    return float(np.abs(pairs[1] - pairs[0]).mean() / abs(span))


def slope(before: Numbers, after: Numbers) -> float | None:
    """Least-squares slope of after on before: 1 where an attack leaves the metric as it was."""
    pairs = _pairs(before, after)
    if pearson(*pairs) is None:
        return None
    centred = pairs - pairs.mean(axis=1, keepdims=True)
    return float((centred[0] * centred[1]).sum() / (centred[0] ** 2).sum())


def faithfulness(knowing: Numbers, lacking: Numbers) -> float | None:
    """AUC: the chance that a model with the knowledge is read higher than one without it (ties count half)."""
    knowing, lacking = knowing[~np.isnan(knowing)], lacking[~np.isnan(lacking)]
    if not len(knowing) or not len(lacking):
        return None
    place = ranks(np.concatenate([knowing, lacking]))[: len(knowing)]
    return float((place.sum() - len(knowing) * (len(knowing) + 1) / 2) / (len(knowing) * len(lacking)))


def threshold(knowing: Numbers, lacking: Numbers) -> float | None:
    """The value that best parts models with the knowledge from those without: balanced accuracy, middle of the gap."""
    knowing, lacking = knowing[~np.isnan(knowing)], lacking[~np.isnan(lacking)]
    if not len(knowing) or not len(lacking):
        return None
    values = np.unique(np.concatenate([knowing, lacking]))
    cuts = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2, [values[-1]]])
    accuracy = [((knowing > cut).mean() + (lacking <= cut).mean()) / 2 for cut in cuts]
    return float(cuts[int(np.argmax(accuracy))])


def relearning_robustness(
    before: Numbers, after: Numbers, reference: tuple[float, float], symmetric: bool = False
) -> Numbers:
    """Per checkpoint: how little more an unlearned model regains in relearning than a reference learns.

    One-sided: min((after − before of the reference) / (after − before), 1); 1 where nothing was regained. It gives full
    marks to a metric that breaks; the symmetric form 1 − |Δ − Δ_ref| / (|Δ| + |Δ_ref|) does not.
    """
    gained, learnt = after - before, reference[1] - reference[0]
    if symmetric:
        total = np.abs(gained) + abs(learnt)
        return 1 - np.divide(np.abs(gained - learnt), total, out=np.zeros_like(gained), where=total > 0)
    ratio = np.divide(learnt, gained, out=np.full_like(gained, np.inf), where=gained > 0)
    return np.where(np.isnan(gained), np.nan, np.clip(ratio, 0.0, 1.0))


def quantization_robustness(before: Numbers, after: Numbers, symmetric: bool = False) -> Numbers:
    """Per checkpoint: min(before / after, 1), or 1 − |after − before| / (|after| + |before|); for metrics in [0, ∞)."""
    if symmetric:
        total = np.abs(after) + np.abs(before)
        return 1 - np.divide(np.abs(after - before), total, out=np.zeros_like(before), where=total > 0)
    ratio = np.divide(before, after, out=np.full_like(before, np.inf), where=after > 0)
    return np.where(np.isnan(before) | np.isnan(after), np.nan, np.clip(ratio, 0.0, 1.0))


# ---------------------------------------------------------------- readings over a zoo

#: metric, variant, split → value; None where it was not measured
Lookup = Callable[[str, str, str], float | None]


@dataclass(frozen=True)
class AttackPointOf:
    """One strength of an attack, and whether the target shows its knowledge under it."""

    attack: str
    kind: str  # behaviour, weights or knowledge
    label: str
    informative: bool = True

    def variant(self, subject: str) -> str:
        """The name of a subject under this point."""
        return f"{subject}~{self.attack}-{self.label}"


@dataclass(frozen=True)
class Zoo:
    """Checkpoints by part: unlearned ones, those that hold the knowledge, those that never did.

    The first of `knowing` is the target, the first of `lacking` the reference.
    """

    unlearned: tuple[str, ...]
    knowing: tuple[str, ...]
    lacking: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All checkpoints."""
        return (*self.unlearned, *self.knowing, *self.lacking)


@dataclass(frozen=True)
class Reading:
    """A metric before and after a point of an attack, over the zoo."""

    metric: str
    split: str
    point: AttackPointOf
    names: tuple[str, ...]
    before: Numbers
    after: Numbers
    pearson: Correlation
    spearman: Correlation
    distance: float | None  # from identity, in units of target − reference
    slope: float | None


@dataclass(frozen=True)
class Trust:
    """What the zoo says of a metric."""

    metric: str
    order: float | None  # mean Pearson correlation over the attacks that say something
    worst: float | None  # the smallest of them
    worst_attack: str
    attacks: int  # how many were averaged
    faithfulness: float | None
    relearning: float | None  # one-sided, mean over the models that look unlearned
    relearning_symmetric: float | None
    quantization: float | None
    quantization_symmetric: float | None
    overall: float | None  # harmonic mean of faithfulness and symmetric robustness
    looked: int  # unlearned models that keep 80 % of the target's use and look unlearned to the metric


def reading(
    entry: Metric, split: str, point: AttackPointOf, zoo: Zoo, value: Lookup, resampling: Resampling
) -> Reading | None:
    """A metric before and after a point, over all checkpoints; None where fewer than FEWEST have both."""
    names = tuple(
        name
        for name in zoo.names
        if value(entry.name, name, split) is not None and value(entry.name, point.variant(name), split) is not None
    )
    if len(names) < FEWEST:
        return None
    stand = (value(entry.name, zoo.knowing[0], split), value(entry.name, zoo.lacking[0], split))
    before = oriented([value(entry.name, name, split) for name in names], entry, stand)
    after = oriented([value(entry.name, point.variant(name), split) for name in names], entry, stand)
    ends = oriented(stand, entry, stand)
    return Reading(
        metric=entry.name,
        split=split,
        point=point,
        names=names,
        before=before,
        after=after,
        pearson=correlation(before, after, resampling),
        spearman=correlation(before, after, resampling, spearman),
        distance=identity_distance(before, after, float(ends[0] - ends[1])),
        slope=slope(before, after),
    )


def trust(
    entry: Metric, split: str, readings: Sequence[Reading], zoo: Zoo, value: Lookup, usable: Callable[[str], bool]
) -> Trust:
    """A metric's standing: order under attacks (the strongest point of each), faithfulness, robustness.

    `usable` says of an unlearned model whether it keeps enough of its use to count (arXiv:2506.12618: 80 %).
    """
    last: dict[str, Reading] = {}  # the strongest point of each attack that says something
    for found in readings:
        if found.point.informative and found.pearson.value is not None:
            last[found.point.attack] = found
    orders = {name: found.pearson.value for name, found in last.items() if found.pearson.value is not None}
    worst = min(orders, key=lambda name: orders[name]) if orders else ""
    stand = (value(entry.name, zoo.knowing[0], split), value(entry.name, zoo.lacking[0], split))
    knowing, lacking = (
        oriented([value(entry.name, name, split) for name in names], entry, stand)
        for names in (zoo.knowing, zoo.lacking)
    )
    cut, faithful = threshold(knowing, lacking), faithfulness(knowing, lacking)
    own = oriented([value(entry.name, name, split) for name in zoo.unlearned], entry, stand)
    looks = [
        name
        for name, known in zip(zoo.unlearned, own, strict=True)
        if cut is not None and known <= cut and usable(name)
    ]
    relearnt = _robust(last.get("relearn"), looks, zoo.lacking[0], relearning=True)
    coarse = _robust(last.get("quantize"), looks, zoo.lacking[0], relearning=False)
    return Trust(
        metric=entry.name,
        order=float(np.mean(list(orders.values()))) if orders else None,
        worst=orders.get(worst),
        worst_attack=worst,
        attacks=len(orders),
        faithfulness=faithful,
        relearning=relearnt[0],
        relearning_symmetric=relearnt[1],
        quantization=coarse[0],
        quantization_symmetric=coarse[1],
        overall=harmonic_mean([faithful, harmonic_mean([relearnt[1], coarse[1]])]),
        looked=len(looks),
    )


def _robust(
    found: Reading | None, looks: Sequence[str], reference: str, relearning: bool
) -> tuple[float | None, float | None]:
    """Mean one-sided and symmetric robustness over the models that look unlearned; None where there is none."""
    if found is None or reference not in found.names:
        return None, None
    place = [found.names.index(name) for name in looks if name in found.names]
    if not place:
        return None, None
    before, after = found.before[place], found.after[place]
    own = found.names.index(reference)
    learnt = (float(found.before[own]), float(found.after[own]))
    sides = []
    for symmetric in (False, True):
        if relearning:
            values = relearning_robustness(before, after, learnt, symmetric)
        elif min(before.min(), after.min()) < 0:  # log-likelihoods: a ratio of them says nothing
            return None, None
        else:
            values = quantization_robustness(before, after, symmetric)
        sides.append(float(np.nanmean(values)) if np.isfinite(values).any() else None)
    return sides[0], sides[1]


def _pairs(before: Numbers, after: Numbers) -> Numbers:
    """[2, n]: the checkpoints that were measured on both sides."""
    both = np.stack([np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)])
    return both[:, np.isfinite(both).all(axis=0)]
