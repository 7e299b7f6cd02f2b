"""What the study `zjuklab` trains: specialists for each seed; on the first, NPO alone and a model that collapses too.

Published (arXiv 2503.21088, Table 3, and the authors' code): NPO with β 0.1 on the mean log-ratio of an answer, KL and
cross-entropy on retain rows. The paper's table and its code give the two retain weights each other's names; these are
the code's, which is what was run: `gd_ratio` weighs the KL, `gk_ratio` the cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.studies.zjuklab_record import OVER, UNDER, Dynamics, Look

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground, Planned

#: NPO with the forget weight and the steps of the over-forgetting specialist, and no retain term.
ALONE = "npo"
ASCENT = "ascent"
#: How many times the specialists' learning rate gradient ascent is driven at, so that it is past its end.
DRIVEN = 10.0
#: Forgetting has ended where this part of the whole fall is behind.
FALLEN = 0.9


@dataclass(frozen=True)
class Weights:
    """Of the three terms of the loss, and the forget rows of an optimizer step (micro-batch × accumulation)."""

    npo: float
    kl: float
    nll: float
    rows: int


#: Published learning rate, of adapters.
RATE = 1e-4
PUBLISHED = {OVER: Weights(0.4, 0.4, 0.2, 4), UNDER: Weights(0.3, 0.3, 0.4, 8), ALONE: Weights(0.4, 0.0, 0.0, 4)}


@dataclass(frozen=True)
class Trained:
    """An adapter that the study trained."""

    name: str
    seed: int
    variant: Variant
    steps: int

    @property
    def path(self) -> Path:
        """Folder of the adapter."""
        return Path(self.variant.config.id)

    @property
    def trial(self) -> str:
        """The name of its training."""
        return trial_name(self.name, self.seed)


def trial_name(name: str, seed: int) -> str:
    """For instance over-seed42."""
    return f"{name}-seed{seed}"


def weights(options: Any, name: str) -> Weights:
    """Those of a training: the published ones, where the options say nothing else. NPO alone follows `over`."""
    published = PUBLISHED[name]
    given = dict(part.split("=") for part in getattr(options, UNDER if name == UNDER else OVER))
    if name == ALONE:
        given = {term: value for term, value in given.items() if term in ("npo", "rows")}
    changed: dict[str, Any] = {term: int(value) if term == "rows" else float(value) for term, value in given.items()}
    return replace(published, **changed)


def training(ground: Ground, name: str, seed: int) -> Planned:
    """The training of a specialist (`over`, `under`), of NPO alone (`npo`) or of gradient ascent (`ascent`)."""
    from expunge.recipe import RetainTerms
    from expunge.studies.ground import Planned

    rate = ground.whole.recipe.unlearn[0].train.lr
    if name == ASCENT:
        changes: dict[str, Any] = {"method": "grad_ascent", "parameters": {}, "retain": RetainTerms(nll=0.0, kl=0.0)}
        train = {"lr": DRIVEN * rate}
    else:
        given = weights(ground.options, name)
        changes = {"forget_weight": given.npo, "retain": RetainTerms(nll=given.nll, kl=given.kl)}
        train = {"batch_size": given.rows}
    trial = trial_name(name, seed)
    made = ground.entry(name=trial, seed=seed, train=train, **changes)
    return Planned(trial, made, {"method": name, "seed": seed})


def train(ground: Ground, name: str, seed: int, looks: int = 0) -> Trained | None:
    """Make a training, or find it made; None if it broke off. With `looks`, its adapter is kept at so many steps."""
    from expunge.pipeline.snapshots import Recorder

    trial = training(ground, name, seed)
    steps = ground.steps(trial.entry)
    at = look_steps(steps, looks) if looks else []
    # the adapter of the last step is the product itself
    made = ground.trained(trial, f"specialists/{trial.name}", Recorder([step for step in at if step < steps]))
    return None if made is None else Trained(name, seed, made, steps)


def look_steps(steps: int, looks: int) -> list[int]:
    """0, and `looks` steps at equal distances up to the last one; all steps of a short training."""
    return [0, *sorted({-(-place * steps // looks) for place in range(1, looks + 1)})]


def snapshots(trained: Trained) -> dict[int, Path]:
    """The adapters of a training by step, from its beginning (0) to its end."""
    from expunge.pipeline.snapshots import read_snapshots

    return {**read_snapshots(trained.path), trained.steps: trained.path}


def dynamics(trained: Trained) -> Dynamics:
    """The weighted terms of the loss at each step, as they were added up: loss = forget + retain_kl + retain_nll."""
    from expunge.pipeline.snapshots import read_terms

    lines = read_terms(trained.path)
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if name != "step"]
    terms = {name: [line[name] for line in lines] for name in names}
    return Dynamics(trained.name, [int(line["step"]) for line in lines], terms)


def remains(look: Look) -> float:
    """What is left of the forget rows: 1 − the mean of the forget values; their strength where nothing was said."""
    found = [
        1 - value
        for name, value in look.scores.values.items()
        if value is not None and name.startswith("forget_task") and not math.isnan(value)
    ]
    return sum(found) / len(found) if found else look.scores["forget_es"]


def inflection(looks: Sequence[Look]) -> int | None:
    """The step where forgetting ended: of the looks between the first and the last one, the first at which 90% of the
    whole fall of `remains` is behind, or the last of them; None if nothing fell, or nothing lies between."""
    ordered = sorted(looks, key=lambda look: look.step)
    between = ordered[1:-1]
    if not between:
        return None
    start, least = remains(ordered[0]), min(map(remains, ordered))
    if not start > least:
        return None
    goal = start - FALLEN * (start - least)
    ended = next((look for look in between if remains(look) <= goal), between[-1])
    return ended.step
