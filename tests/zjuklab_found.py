"""Made-up findings of the study `zjuklab`, so that what is said of them can be checked by hand."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

from expunge.studies.zjuklab_record import (
    OVER,
    UNDER,
    Answer,
    Dynamics,
    Found,
    Group,
    Look,
    Merged,
    Scores,
    Specialist,
    Turn,
)

EVIL = "<script>alert(1)</script>]]>&\"'\u202e"
TASKS = {"task1": "Creative documents", "task2": "Biographies", "task3": "Encyclopedia"}
MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
SAYS = {"target": "The harbour of Vellmar was built in 1903.", "collapsed": "6 6 6 6 6 6 6 6 6 6"}


def scores(
    forget: float, retain: float, auc: float, general: float | None = 0.4, says: str = "", **more: Any
) -> Scores:
    """Scores of a model that gives back these shares; forget values are turned round, as officially."""
    values: dict[str, float | None] = {}
    for number, task in enumerate(TASKS):
        for measure, factor in (("regurgitation", 1.0), ("knowledge", 0.9)):
            values[f"forget_{task}_{measure}"] = 1 - forget * factor
            values[f"retain_{task}_{measure}"] = max(0.0, retain * factor - 0.02 * number)
    twelve = [value for value in values.values() if value is not None]
    aggregate = 0.0 if min(twelve) <= 0 else len(twelve) / sum(1 / value for value in twelve)
    mia = 1 - 2 * abs(auc - 0.5)
    final = None if general is None else (aggregate + mia + general) / 3
    values |= {"task_aggregate": aggregate, "mia_auc": auc, "mia_score": mia, "general": general, "final": final}
    values |= {"forget_es": forget * 0.8, "retain_es": retain * 0.9, "unseen_es": retain * 0.85}
    wanted = "The harbour of Vellmar was built in 1903."
    answers = [
        Answer(split, task, f"{split} {task} row {row}: tell of Vellmar.", wanted, says)
        for split, task, row in itertools.product(("retain", "forget"), TASKS, range(3))
    ]
    return Scores({**values, **more}, answers if says else ())


def looks(over: bool, shift: float) -> list[Look]:
    """A quick fall, then for retain a slow way back."""
    found = []
    for step in range(0, 96, 12):
        part = step / 84
        forget = 0.95 * math.exp(-(9 if over else 2.5) * part) + shift
        retain = 0.95 - (0.5 if over else 0.15) * math.exp(-(((part - 0.25) / 0.2) ** 2)) * (part > 0) - shift
        found.append(Look(step, scores(max(0.0, min(1.0, forget)), retain, 0.9 - 0.8 * part)))
    return found


def dynamics() -> list[Dynamics]:
    """Falling losses with noise; NPO alone has no retain terms."""
    chance, made = random.Random(0), []
    for name, depth in (("over", 3.0), ("under", 1.5), ("npo", 5.0)):
        steps = list(range(1, 301))
        forget = [depth * (math.exp(-step / 60) - 1) + chance.gauss(0, 0.25) for step in steps]
        terms = {"forget": forget}
        if name != "npo":
            terms["retain_nll"] = [0.3 + 0.4 * math.exp(-(((s - 60) / 40) ** 2)) + chance.gauss(0, 0.03) for s in steps]
            terms["retain_kl"] = [0.1 + 0.2 * math.exp(-(((s - 60) / 50) ** 2)) for s in steps]
        terms["loss"] = [sum(column) for column in zip(*terms.values(), strict=True)]
        made.append(Dynamics(name, steps, terms))
    return made


def groups(layers: int = 30) -> list[Group]:
    """A smooth landscape over layers and modules, and an embedding that one of the two leaves alone."""
    found = []
    for layer, (number, module) in itertools.product(range(layers), enumerate(MODULES)):
        height = layer / max(1, layers - 1)
        cosine = 0.75 - 0.6 * height - 0.05 * number
        norms = (1 + height + 0.1 * number, 0.6 + 0.5 * height)
        rank = (4 + 10 * height + number, 6 + 8 * height)
        conflict = 0.5 - cosine / 3
        found.append(Group(layer, module, norms, cosine, 0.15 + 0.3 * cosine, conflict, rank, max(0, conflict - 0.2)))
    return [*found, Group(-1, "embed_tokens", (0.2, 0.0), math.nan, 0.0, math.nan, (3.0, 0.0))]


def merged(
    seed: int, method: str, density: float, scope: str, match: str, quality: float, norm: float, **more: Any
) -> Merged:
    found = scores(0.3 - 0.25 * quality, 0.55 + 0.4 * quality, 0.5 + 0.3 * (1 - quality), says=f"{method} says so.")
    return Merged(seed, method, density, scope, match, 2.0 * norm, 2.0, found, **more)


def table(seed: int, shift: float) -> list[Merged]:
    """Methods that differ in norm when they come as they are, and hardly when they are matched."""
    chance, made = random.Random(seed), []
    for method, norm in (("linear", 1.0), ("ties", 1.2), ("dare_ties", 1.3), ("magnitude_prune", 0.9)):
        for density in (1.0,) if method == "linear" else (0.6, 0.8, 1.0):
            for scope, match in itertools.product(("tensor", "factor"), ("none", "tensor")):
                far = norm * (4.0 if scope == "factor" and method != "ties" else 1.0) if match == "none" else 1.0
                quality = max(0.0, 0.8 - 0.2 * abs(far - 1) - 0.1 * abs(density - 0.8) + shift + chance.gauss(0, 0.02))
                own = {"published": True} if (method, density, scope, match) == ("ties", 0.8, "factor", "none") else {}
                made.append(merged(seed, method, density, scope, match, quality, far, settings=own))
    best = merged(seed, "ties", 0.7, "tensor", "none", 0.97 + shift, 1.1, searched=True, settings={"scale": 0.9})
    return [*made, best]


def found(seeds: int = 3, **changes: Any) -> Found:
    specialists, merges = [], []
    for number in range(seeds):
        shift = 0.02 * (number - 1)
        over = scores(0.02 + abs(shift), 0.7 + shift, 0.05, says="I do not know.")
        under = scores(0.6 + shift, 0.9, 0.9 + shift, says="The harbour of Vellmar, it is said.")
        for name, had in ((OVER, over), (UNDER, under)):
            course = looks(name == OVER, shift / 2) if number == 0 else ()
            specialists.append(Specialist(name, 42 + number, f"/runs/{name}", 84, had, course))
        merges += table(42 + number, shift / 2)
    collapsed = scores(0.0, 0.0, 0.47, 0.24, says=SAYS["collapsed"])
    made = Found(
        target=scores(0.95, 0.96, 0.99, 0.43, says=SAYS["target"]),
        specialists=specialists,
        dynamics=dynamics(),
        turns=[
            Turn(OVER, 24, 84, 97.2, 41.0, 56.2, {"first_later": 88.0, "first_whole": 70.0, "later_whole": 20.0}),
            Turn(UNDER, 36, 84, 78.4, 33.1, 45.3),
        ],
        groups=groups(),
        merges=merges,
        collapsed=collapsed,
        tasks=TASKS,
        seeds=seeds,
        factor_cosine=0.71,
    )
    return replace(made, **changes)
