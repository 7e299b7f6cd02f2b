"""Made-up findings of the study `localization`, so that what is said of them can be checked by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from expunge.studies.localization_record import (
    ORACLE,
    RANDOM,
    Attributed,
    Found,
    Injected,
    Look,
    Matching,
    Relearning,
    Run,
)

METHODS = ("wga", "npo", "dpo", "rmu")
ATTRIBUTIONS = ("gradient", "activations", "wagle", "memflex", "klue")
#: Region → part of the true region that it finds.
PRECISION = {ORACLE: 1.0, RANDOM: 0.0, "gradient": 0.31, "activations": 0.17, "wagle": 0.28, "memflex": 0.11}
STEPS = (0, 2, 4, 7, 11, 16)

#: (seed, method, region) → what is added to forgetting, and to strength after relearning.
Effect = Callable[[int, str, str], float]


def no_effect(seed: int, method: str, region: str) -> float:
    return 0.0


def look(step: int, forget: float, retain: float, unseen: float | None = None, quality: float = -3.0) -> Look:
    return Look(step, min(1.0, max(0.0, forget)), min(1.0, max(0.0, retain)), unseen, quality)


def noise(*key: object, size: float = 0.01) -> float:
    """The same for the same key."""
    return random.Random(repr(key)).gauss(0, size)


def run(
    seed: int, method: str, region: str, better: Effect = no_effect, back: Effect = no_effect, spread: float = 0.01
) -> Run:
    """Forget strength falls quickly, retain strength slowly; relearning brings most of it back."""
    depth = 0.6 + 0.05 * METHODS.index(method) if method in METHODS else 0.6
    depth += better(seed, method, region) + noise(seed, method, region, size=spread)
    looks = []
    for step in STEPS:
        part = 1 - math.exp(-step / 4)
        retain = 0.85 - 0.10 * part + noise(seed, region, step, size=spread / 3) * (step > 0)
        looks.append(look(step, 0.97 - depth * part, retain, retain - 0.05, -6 + 4 * part))
    left = looks[-1].forget
    known = 0.55 + back(seed, method, region) + noise("relearn", seed, method, region, size=spread)
    relearned = [look(step, left + known * (1 - math.exp(-step / 4)), 0.8, 0.75) for step in (0, 4, 8)]
    inside = PRECISION.get(region, 0.1)
    return Run(seed, method, region, looks, relearned, inside, 0.08 + 0.01 * inside, 16, 41.5)


def found(
    seeds: int = 5,
    better: Effect = no_effect,
    back: Effect = no_effect,
    methods: Sequence[str] = METHODS,
    attributions: Sequence[str] = ATTRIBUTIONS,
    spread: float = 0.01,
    **changes: Any,
) -> Found:
    """Everything, of so many seeds."""
    numbers = list(range(42, 42 + seeds))
    reference = look(0, 0.09, 0.9, 0.86, 0.0)
    regions = (ORACLE, RANDOM, *attributions)
    made: dict[str, Any] = {
        "reference": reference,
        "injected": [
            Injected(seed, reference, look(0, 0.97, 0.85 + noise("i", seed), 0.79, -6.0), 4608, 2_654_208, 48, 130.0)
            for seed in numbers
        ],
        "runs": [run(s, m, r, better, back, spread) for s in numbers for m in methods for r in regions],
        "matchings": [
            Matching(s, r, look(0, 0.1 if r == ORACLE else 0.14 + noise("m", s), 0.88, 0.8, -0.4), 0.02, 0.05)
            for s in numbers
            for r in (ORACLE, RANDOM)
        ],
        "attributed": [
            Attributed(s, name, PRECISION.get(name, 0.1), 0.5 + PRECISION.get(name, 0.1), 0.1, 0.06, 3.0)
            for s in numbers
            for name in (*attributions, RANDOM)
        ],
        "controls": [
            Relearning(s, [look(0, 0.09, 0.9), look(4, 0.3 + noise("c", s), 0.9), look(8, 0.4, 0.9)]) for s in numbers
        ],
        "seeds": numbers,
        "methods": methods,
        "attributions": attributions,
        "unit": "value_vector",
        "density": 0.1,
        "pool": 46080,
        "forget_rows": 20,
        "progress": {"injection": (seeds, seeds), "unlearning": (len(regions) * 20, len(regions) * 4 * seeds)},
    }
    return Found(**{**made, **changes})
