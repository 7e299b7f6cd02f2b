"""The rules that studies decide by, fixed before anything is measured: pure functions of strengths in [0, 1]."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Measured:
    """What a candidate leaves of the forget rows, and of the rows by which keeping is judged."""

    forget: float
    kept: float


@dataclass(frozen=True)
class Choice(Generic[K]):
    """The chosen candidate, and whether it meets the rule or is only the best balance."""

    key: K
    met: bool


def keeps(found: Measured, target: float, share: float) -> bool:
    """Whether a candidate keeps its share of the target's strength; the edge itself counts, in spite of rounding."""
    return found.kept >= share * target - 1e-12


def balance(found: Measured, target: float) -> float:
    """Harmonic mean of what is forgotten (1 − forget) and of the part of the target's strength that is kept (≤ 1)."""
    kept = min(1.0, found.kept / target) if target > 0 else 1.0
    forgotten = 1.0 - found.forget
    return 2 * kept * forgotten / (kept + forgotten) if kept + forgotten > 0 else 0.0


def choose(candidates: Mapping[K, Measured], target: float, share: float) -> Choice[K] | None:
    """Among those that keep their share, the lowest forget; where none does, the best balance; None without any.

    Of equals the one that keeps more is chosen, then the one that comes first.
    """
    eligible = {key: found for key, found in candidates.items() if keeps(found, target, share)}
    if eligible:
        return Choice(min(eligible, key=lambda key: (eligible[key].forget, -eligible[key].kept)), True)
    if candidates:
        return Choice(max(candidates, key=lambda key: balance(candidates[key], target)), False)
    return None


def pareto_front(candidates: Mapping[K, Measured]) -> list[K]:
    """Those that no other beats on one side without losing on the other, by falling strength on the forget rows."""
    ordered = sorted(candidates, key=lambda key: (candidates[key].forget, -candidates[key].kept))
    front: list[K] = []
    for key in ordered:
        if not front or candidates[key].kept > candidates[front[-1]].kept:
            front.append(key)
    return front


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n − 1) over seeds; no deviation of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
