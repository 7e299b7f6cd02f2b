"""What the literature says should be seen, each with the number that this run gives for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expunge.metrics.audit import Reading
from expunge.metrics.base import Resampling, bootstrap_interval
from expunge.report.attack_record import AttackRecord
from expunge.report.calibration_record import Calibration

Shown = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class Trend:
    """A claim, the estimate that would show it (above 0), and whether it did; None where it could not be measured."""

    label: str  # the claim in two or three words
    claim: str
    measured: str  # what the estimate is
    value: float | None
    low: float | None
    high: float | None

    @property
    def shown(self) -> Shown:
        """yes with the whole interval above 0, no with all of it below, else not shown."""
        if self.value is None or self.low is None or self.high is None:
            return "not shown"
        return "yes" if self.low > 0 else "no" if self.high < 0 else "not shown"


def estimate(label: str, claim: str, measured: str, values: Sequence[float], resampling: Resampling) -> Trend:
    """A trend by the mean of paired differences, with its bootstrap interval."""
    given = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    if not len(given):
        return Trend(label, claim, measured, None, None, None)
    low, high = bootstrap_interval(given, resampling.count, resampling.seed) if len(given) > 1 else (None, None)
    return Trend(label, claim, measured, float(given.mean()), low, high)


def row_means(calibrations: Sequence[Calibration], variant: str, kind: str) -> dict[str, float]:
    """Strength per row, mean over seeds; `variant` is target, calibrated or unlearned."""
    found: dict[str, list[float]] = {}
    for calibration in calibrations:
        for row, value in calibration.values[variant][kind].items():
            if value is not None:
                found.setdefault(row, []).append(value)
    return {row: float(np.mean(values)) for row, values in found.items()}


def destroyed(calibrations: Sequence[Calibration], resampling: Resampling) -> Trend:
    """Gradient ascent as it is: what it gives up of what is to be kept, next to what it removes."""
    target, own = (row_means(calibrations, variant, "retain") for variant in ("target", "unlearned"))
    fallen = [target[row] - own[row] for row in own if row in target]
    return estimate(
        "ascent destroys",
        "uncalibrated gradient ascent destroys what is to be kept",
        "target − gradient ascent, extraction strength on held-out retain rows",
        fallen,
        resampling,
    )


def advantage(
    ascent: Sequence[Calibration], other: Sequence[Calibration], method: str, calibrated: bool, resampling: Resampling
) -> Trend:
    """Who forgets more: before calibration gradient ascent, after it the other method."""
    variant = "calibrated" if calibrated else "unlearned"
    mine, theirs = (row_means(found, variant, "forget") for found in (ascent, other))
    sign = 1 if calibrated else -1
    values = [sign * (mine[row] - theirs[row]) for row in mine if row in theirs]
    label = "ascent behind, after" if calibrated else "ascent ahead, before"
    if calibrated:
        claim, measured = f"after calibration gradient ascent is behind {method}", f"gradient ascent − {method}"
    else:
        claim, measured = f"uncalibrated, gradient ascent looks better than {method}", f"{method} − gradient ascent"
    return estimate(label, claim, f"{measured}, extraction strength on forget rows", values, resampling)


def order_kept(readings: Sequence[Reading], other: str, resampling: Resampling) -> Trend:
    """Extraction strength keeps its order better than another metric: difference of correlations, attack by attack."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for one in readings:
        if one.split == "forget" and one.point.informative and one.pearson.value is not None:
            found.setdefault((one.point.attack, one.point.label), {})[one.metric] = one.pearson.value
    values = [
        both["extraction_strength"] - both[other]
        for both in found.values()
        if {"extraction_strength", other} <= both.keys()
    ]
    words = other.replace("_", " ")
    return estimate(
        f"ES over {words}",
        f"extraction strength keeps its order better than {words}",
        f"correlation before ↔ after, extraction strength − {words}, mean over points of attacks",
        values,
        resampling,
    )


def coarser_brings_back_more(record: AttackRecord, names: Sequence[str], resampling: Resampling) -> Trend:
    """int4 against int8: forget strength after quantization, checkpoint by checkpoint."""
    labels = _by_label(record, "quantize")
    four = next((label for label in labels if label.startswith("int4")), None)
    eight = next((label for label in labels if label.startswith("int8")), None)
    values = []
    if four and eight:
        values = [
            labels[four][name] - labels[eight][name] for name in names if name in labels[four] and name in labels[eight]
        ]
    return estimate(
        "int4 over int8",
        "int4 brings back more than int8",
        "forget extraction strength after int4 − after int8, mean over unlearned checkpoints",
        values,
        resampling,
    )


def reference_learns_too(record: AttackRecord) -> Trend:
    """What the reference shows of the forget rows after relearning that it did not show before."""
    for result in record.attacks:
        if result.name == "relearn" and result.points:
            before, after = result.before.strengths.get("reference"), result.points[-1].strengths.get("reference")
            if before is not None and after is not None:
                low = None if after.low is None or before.high is None else after.low - before.high
                high = None if after.high is None or before.low is None else after.high - before.low
                return Trend("reference learns", _LEARNS, _LEARNT, after.value - before.value, low, high)
    return Trend("reference learns", _LEARNS, _LEARNT, None, None, None)


_LEARNS = "the reference relearns too, so that only the difference counts"
_LEARNT = "reference after relearning − before, extraction strength on forget rows (interval: ends subtracted)"


def _by_label(record: AttackRecord, attack: str) -> Mapping[str, Mapping[str, float]]:
    """Point → subject → forget strength."""
    found = {}
    for result in record.attacks:
        if result.name == attack:
            for point in result.points:
                found[point.label] = {name: strength.value for name, strength in point.strengths.items()}
    return found
