"""What `zjuklab` can claim: merges picked by a rule, and their differences over seeds with Student's interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from expunge.report.text import compact
from expunge.studies.rules import spread
from expunge.studies.trends import Trend
from expunge.studies.zjuklab_record import OVER, UNDER, Found, Merged

#: The published setting: TIES at this density on LoRA's factors, weights of 1, λ of 1 (arXiv:2503.21088).
METHOD, DENSITY = "ties", 0.8
FACTOR, UNMATCHED = "factor", "none"
#: What merges are judged by, the first that was measured: name → words.
JUDGED = {"final": "final score", "task_aggregate": "task aggregate"}


def judged(found: Found) -> str:
    """The name of the measure that merges are judged by."""
    scores = [found.target, *(merge.scores for merge in found.merges)]
    return "final" if any(not math.isnan(one["final"]) for one in scores) else "task_aggregate"


def mean_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over the seeds that have a value; NaN without any."""
    known = [value for value in values if math.isfinite(value)]
    return spread(known) if known else (math.nan, None)


def best_searched(found: Found) -> dict[int, Merged]:
    """Seed → its searched merge; of several the one that kept most by the judged measure."""
    name = judged(found)
    chosen: dict[int, Merged] = {}
    for merge in found.merges:
        if merge.searched and (merge.seed not in chosen or merge.scores[name] > chosen[merge.seed].scores[name]):
            chosen[merge.seed] = merge
    return chosen


def pick(found: Found, method: str, matched: bool, factor: bool = False) -> dict[int, Merged]:
    """Seed → the merge of a method whose density is nearest to the published one; a whole trim before a tensor's."""
    chosen: dict[int, Merged] = {}
    for merge in found.merges:
        kind = (merge.scope == FACTOR, merge.scale_match != UNMATCHED)
        if merge.method != method or merge.searched or kind != (factor, matched):
            continue
        if merge.seed not in chosen or _order(merge) < _order(chosen[merge.seed]):
            chosen[merge.seed] = merge
    return chosen


def published(found: Found) -> dict[int, Merged]:
    """Seed → the merge that ZJUKLAB submitted: TIES of LoRA's factors at density 0.8, at its own scale."""
    told = {merge.seed: merge for merge in found.merges if merge.settings.get("published")}
    return told or pick(found, METHOD, matched=False, factor=True)


def _order(merge: Merged) -> tuple[float, int, int]:
    scopes, matches = ("tensor", "model", FACTOR), ("model", "tensor", UNMATCHED)
    places = [
        names.index(name) if name in names else 9
        for names, name in ((scopes, merge.scope), (matches, merge.scale_match))
    ]
    return round(abs(merge.density - DENSITY), 6), places[0], places[1]


def the_merge(found: Found) -> tuple[str, dict[int, Merged]]:
    """What stands for merging: the searched merges, else TIES at the published density, in words and by seed."""
    searched = best_searched(found)
    if searched:
        return "the searched merge", searched
    plain = pick(found, METHOD, matched=False) or published(found)
    words = f"TIES at density {compact(next(iter(plain.values())).density)}" if plain else ""
    return words, plain


def better_specialist(found: Found, seed: int, name: str) -> float:
    """The higher of the two specialists' values of a seed; NaN unless both are known."""
    pair = [one for one in found.specialists if one.seed == seed and one.name in (OVER, UNDER)]
    values = [one.scores[name] for one in pair]
    return max(values) if len(values) == 2 and not any(map(math.isnan, values)) else math.nan


def paired(one: Mapping[int, Merged], two: Mapping[int, Merged], name: str) -> list[float]:
    """Differences one − two of a measure, seed by seed."""
    return [one[seed].scores[name] - two[seed].scores[name] for seed in one if seed in two]


def over_seeds(label: str, claim: str, measured: str, values: Sequence[float]) -> Trend:
    """A trend by the mean of differences over seeds, with Student's 95% interval; none of a single seed."""
    from scipy import stats

    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Trend(label, claim, measured, None, None, None)
    mean, deviation = spread(known)
    if deviation is None:
        return Trend(label, claim, f"{measured} (one seed)", mean, None, None)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * deviation / math.sqrt(len(known))
    return Trend(label, claim, f"{measured} ({len(known)} seeds)", mean, mean - half, mean + half)


def claims(found: Found) -> list[Trend]:
    """What is said of merging, each with what was measured for it."""
    name = judged(found)
    words = JUDGED[name]
    merge_words, merges = the_merge(found)
    made = [
        over_seeds(
            "merge over specialists",
            f"a merge{f' ({merge_words})' if merge_words else ''} is better than both specialists",
            f"{words}, merge − better specialist",
            gains(found, merges),
        )
    ]

    def compare(label: str, claim: str, measured: str, one: Mapping[int, Merged], two: Mapping[int, Merged]) -> None:
        made.append(over_seeds(label, claim, f"{words}, {measured}", paired(one, two, name)))

    kinds = {
        "factors": ("TIES is better than linear on LoRA's factors, at their own scale (as published)", False, True),
        "weights": ("TIES is better than linear on the weights, at their own scale", False, False),
        "matched": ("TIES is better than linear when both merges have the norm of the specialists", True, False),
    }
    for kind, (claim, matched, factor) in kinds.items():
        ties, linear = (pick(found, method, matched, factor) for method in (METHOD, "linear"))
        compare(f"TIES over linear, {kind}", claim, "TIES − linear", ties, linear)
    exact, factors = pick(found, METHOD, matched=False), published(found)
    claim = "merging the weights is better than merging LoRA's factors"
    compare("weights over factors", claim, "TIES on ΔW − TIES on A and B", exact, factors)
    searched = best_searched(found)
    if searched:
        claim = "the searched merge is better than the published setting"
        compare("search over published", claim, "searched − published", searched, factors or exact)
    return made


def gains(found: Found, merges: Mapping[int, Merged]) -> list[float]:
    """What each merge has over the better of its specialists; NaN where that can't be told."""
    name = judged(found)
    return [merge.scores[name] - better_specialist(found, seed, name) for seed, merge in merges.items()]


def wins(found: Found) -> tuple[int, int]:
    """(Seeds in which the merge is better than both specialists, seeds in which that could be told)."""
    known = [gain for gain in gains(found, the_merge(found)[1]) if not math.isnan(gain)]
    return sum(gain > 0 for gain in known), len(known)
