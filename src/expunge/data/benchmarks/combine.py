"""Official numbers out of measured ones, with a note on every part that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from expunge.data.registry import Aggregate
from expunge.numbers import harmonic_mean

Direction = Literal["lower", "higher", "none"]
Parts = Mapping[str, float | None]


def missing(parts: Parts) -> str:
    """ "missing: a, b", or nothing."""
    absent = [name for name, value in parts.items() if value is None]
    return f"missing: {', '.join(absent)}" if absent else ""


def noted(*sentences: str) -> str:
    """The sentences that say something, in one note."""
    return "; ".join(sentence for sentence in sentences if sentence)


def harmonic(name: str, summary: str, parts: Parts, note: str = "") -> Aggregate:
    """The harmonic mean of the parts; 0 as soon as one is 0, None as soon as one is missing."""
    return Aggregate(name, harmonic_mean(list(parts.values())), summary, note=noted(missing(parts), note))


def arithmetic(name: str, summary: str, parts: Parts, note: str = "", direction: Direction = "higher") -> Aggregate:
    """The mean of the parts; None as soon as one is missing."""
    known = [value for value in parts.values() if value is not None]
    value = sum(known) / len(known) if known and len(known) == len(parts) else None
    return Aggregate(name, value, summary, direction, noted(missing(parts), note))


def plain(
    name: str, summary: str, value: float | None, source: str, direction: Direction = "higher", note: str = ""
) -> Aggregate:
    """A measured number under the name that the benchmark has for it; `source` says what it is measured by."""
    return Aggregate(name, value, summary, direction, noted("" if value is not None else f"missing: {source}", note))


def one_minus(value: float | None) -> float | None:
    """1 − value."""
    return None if value is None else 1.0 - value
