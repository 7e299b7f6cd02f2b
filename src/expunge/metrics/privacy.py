"""Membership inference beside the reference's: leaks and over-unlearning on one scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.auc import chance_note, interval, placements, resampled_aucs
from expunge.metrics.base import Resampling, Statistic, Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.membership import SCORES, Score, min_k
from expunge.numbers import harmonic_mean
from expunge.recipe.conventions import EXPUNGE, Convention

#: MUSE attacks with Min-40%, whatever else a convention looks at.
_PRIVLEAK_MIN_K = 0.4

#: AUC of the model and of the reference, elementwise → number; NaN where it is undefined
Compare = Callable[[Values, Values], Values]

_SETTINGS: dict[str, Any] = {
    "needs": ("scores", "holdout:scores", "reference@scores", "reference@holdout:scores"),
    "roles": ("forget",),
    "anchors": False,  # they are measured from the reference already
    "per_example": False,
    "one_kind": True,
}


@dataclass(frozen=True)
class Beside:
    """An attack on a model and on the reference: AUC and joint draws of it, [2, 1 + draws], the AUC first."""

    aucs: Values
    n: int
    holdout: int
    unscored: int

    def statistic(self, values: Values, note: str) -> Statistic:
        """A number [1 + draws] made of the AUCs: its value, interval, and what it is made of."""
        if not len(values) or np.isnan(values[0]):
            return Statistic(None, n=self.n, unscored=self.unscored, note=note)
        chance = chance_note(self.n, self.holdout)
        low, high = interval(float(values[0]), values[1:])
        return Statistic(float(values[0]), low, high, self.n, self.unscored, "; ".join(filter(None, (note, chance))))

    @property
    def note(self) -> str:
        """The two AUCs."""
        if not self.aucs.size:
            return "no row of forget and holdout is scored under both models"
        return f"AUC {self.aucs[0, 0]:.3f}, the reference's {self.aucs[1, 0]:.3f}"


@metric(
    "privleak",
    summary="100 (s − s_ref) / s_ref with s = 1 − AUC of Min-40%: below 0 still known, 0 good, above 0 over-unlearned",
    range=(-100, np.inf),
    unit="percent of the reference's 1 − AUC",
    paper="arXiv:2407.06460",
    learnt=None,
    **_SETTINGS,
)
def privleak(*tables: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()) -> Statistic:
    """MUSE's PrivLeak: −100 if every forget row is told from the holdout; none where the reference's AUC is 1.

    The sign is OpenUnlearning's and that of MUSE's tables, of which s is the AUC of the opposite question.
    """
    return _compared(min_k, _privleak, tables, replace(convention, min_k=_PRIVLEAK_MIN_K), resampling)


def _s_mia(attack: str, score: Score) -> None:
    """File the metric s_mia_ATTACK."""

    @metric(
        f"s_mia_{attack}",
        summary=f"1 − |AUC − AUC_ref| / AUC_ref of mia_{attack}, at least 0: 1 as private as the reference",
        range=(0, 1),
        unit="part of the reference's AUC",
        paper="arXiv:2506.12618",
        learnt="low",
        **_SETTINGS,
    )
    def of_attack(
        *tables: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()
    ) -> Statistic:
        return _compared(score, _closeness, tables, convention, resampling)


for _name, _score in SCORES.items():
    _s_mia(_name, _score)


@metric(
    "privacy",
    summary=f"harmonic mean of s_mia over {', '.join(SCORES)}: 1 as private as the reference, 0 if one attack succeeds",
    range=(0, 1),
    unit="part of the reference's AUC",
    paper="arXiv:2506.12618",
    learnt="low",
    **_SETTINGS,
)
def privacy(*tables: pa.Table, convention: Convention = EXPUNGE, resampling: Resampling = Resampling()) -> Statistic:
    """OpenUnlearning's privacy score. Interval from joint draws of the rows for all attacks and both models."""
    attacks = {name: _beside(score, tables, convention, resampling) for name, score in SCORES.items()}
    fewest = min(attacks.values(), key=lambda found: found.n)
    closeness = {name: _closeness(*found.aucs) for name, found in attacks.items() if found.aucs.size}
    if len(closeness) < len(attacks):
        return fewest.statistic(np.empty(0), fewest.note)
    note = ", ".join(f"{name} {values[0]:.3f}" for name, values in closeness.items())
    # an attack may score fewer rows than another, and then it has its own draws; their number is the same
    joint = [harmonic_mean(column) for column in zip(*closeness.values(), strict=False)]
    return fewest.statistic(np.array([np.nan if value is None else value for value in joint]), note)


def _compared(
    score: Score, compare: Compare, tables: tuple[pa.Table, ...], convention: Convention, resampling: Resampling
) -> Statistic:
    found = _beside(score, tables, convention, resampling)
    return found.statistic(compare(*found.aucs) if found.aucs.size else np.empty(0), found.note)


def _beside(score: Score, tables: tuple[pa.Table, ...], convention: Convention, resampling: Resampling) -> Beside:
    """Both models on the rows that both score."""
    forget, holdout, reference_forget, reference_holdout = tables
    members, reference_members = _both(score, forget, reference_forget, convention)
    others, reference_others = _both(score, holdout, reference_holdout, convention)
    unscored = len(Examples.of(forget).ids) - len(members)
    if not len(members) or not len(others):
        return Beside(np.empty((2, 0)), 0, 0, unscored + len(members))
    pairs = [(members, others), (reference_members, reference_others)]
    points = np.array([[placements(*pair).mean()] for pair in pairs])
    aucs = np.concatenate([points, resampled_aucs(pairs, resampling)], axis=1)
    return Beside(aucs, len(members), len(others), unscored)


def _both(score: Score, table: pa.Table, reference: pa.Table, convention: Convention) -> tuple[Values, Values]:
    """Scores under the model and under the reference of the examples that have both."""
    own, others = score(table, convention), score(reference, convention)
    others = Examples.of(table).align(others, Examples.of(reference))
    both = ~np.isnan(own) & ~np.isnan(others)
    return own[both], others[both]


def _privleak(model: Values, reference: Values) -> Values:
    rest = np.where(reference < 1, 1 - reference, np.nan)
    return 100 * (reference - model) / rest


def _closeness(model: Values, reference: Values) -> Values:
    known = np.where(reference > 0, reference, np.nan)
    return np.clip(1 - np.abs(model - reference) / known, 0, 1)
