"""calibration.json: how much of an unlearning can be kept while the model keeps what it should, and what then is left.

The models on the line θ(α) = (1 − α) θ_target + α θ_unlearned trade what is kept for what is removed. Calibration
(UWC, arXiv:2406.09179) takes the largest α with retain ≥ keep · retain of the target, so that methods are compared at
equal cost. Strength is extraction strength, mean over rows.

ES_f*(τ) is the least forget strength among the visited α with retain ≥ τ · target's: a step function that rises with τ.
Its area (0 to 1, lower is better) needs no choice of τ. AUES (arXiv:2505.16252) is ∫₀¹ max{1 − forget : retain ≥ τ} dτ,
with τ on the scale of retain itself (higher is better).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.base import Frozen

NAME = "calibration.json"

#: A strength that is lower by less than this is not lower: sums of the same numbers differ in the last digits.
TIE = 1e-12


class CalibrationPoint(Frozen):
    """A visited α. Strengths are means over rows; None where they were not measured, or nothing could be scored."""

    alpha: float
    retain: float
    forget: float | None = None
    paraphrase: float | None = Field(None, description="forget strength when asked in other words")


class CurvePoint(Frozen):
    """ES_f*(τ), and the α that attains it."""

    tau: float = Field(description="part of the target's retain strength that must be kept")
    alpha: float
    forget: float
    paraphrase: float | None = Field(None, description="of the α that attains the least plain forget strength")


class PassCount(Frozen):
    """Passes over rows, one per α; those of an earlier try of the same calibration count too."""

    search: int = Field(description="retain passes of mixed models (α > 0) until α* was found")
    retain: int = Field(description="retain passes of mixed models in all, those of the τ-curve included")
    forget: int = Field(description="forget passes of mixed models")
    target: int = Field(description="passes of the target itself")
    reused: int = Field(description="those of all these that were made before, by an earlier try or by the caller")


class Calibration(Frozen):
    """The calibrated model in numbers."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.calibration/1"] = Field("expunge.calibration/1", alias="schema")
    expunge: str
    target: str
    unlearned: str
    model: str | None = Field(None, description="folder of the calibrated model; None: not written")
    keep: float = Field(description="part of the target's retain strength that must be kept")
    epsilon: float = Field(description="α* is at most this below the largest α that keeps enough")
    alpha: float = Field(description="α*: 1 is the unlearned model itself, 0 the target")
    threshold: float = Field(description="keep · retain strength of the target")
    passes: PassCount
    points: list[CalibrationPoint] = Field(description="every visited α, ascending; 0 is the target")
    curve: list[CurvePoint] = Field(default_factory=list, description="empty where no τ-curve was asked for")
    area: float | None = Field(None, description="under ES_f*(τ)")
    area_paraphrase: float | None = Field(None, description="under the same curve of the paraphrased questions")
    aues: float | None = None
    records: list[dict[str, Any]] = Field(description="target, calibrated and unlearned (RECORD_KEYS), with intervals")
    values: dict[str, dict[str, dict[str, float | None]]] = Field(
        description="variant → retain, forget or forget@paraphrase → example id → strength"
    )
    splits: dict[str, str] = Field(description="retain, forget → the split that its rows come from")
    convention: str
    notes: list[str] = Field(default_factory=list)
    answer: str = Field(description="what was found, in a sentence")
    inputs: str = Field("", description="digest of models and rows")

    def at(self, alpha: float) -> CalibrationPoint:
        """The visited point of an α. Raises KeyError."""
        for point in self.points:
            if point.alpha == alpha:
                return point
        raise KeyError(alpha)

    @property
    def calibrated(self) -> CalibrationPoint:
        """The point of α*."""
        return self.at(self.alpha)

    @property
    def target_retain(self) -> float:
        """Retain strength of the target."""
        return self.at(0.0).retain

    def to_json(self) -> dict[str, Any]:
        """Plain data of calibration.json."""
        return self.model_dump(mode="json", by_alias=True)


def read_calibration(folder: Path) -> Calibration:
    """The calibration of a folder. Raises UserError where there is none, or where it can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(
            f"no calibration at {folder} (no {NAME})",
            "make one: expunge calibrate UNLEARNED --target TARGET --forget FILE --retain FILE -o DIR",
        )
    try:
        return Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", "run the same command again: it writes the file anew") from None


def holds_calibration(folder: Path) -> bool:
    """Whether a folder was written by `expunge calibrate`."""
    return (Path(folder) / NAME).is_file()


def best_at(points: Sequence[CalibrationPoint], tau: float) -> CalibrationPoint | None:
    """The point of least forget strength among those with retain ≥ τ · target's (the point α = 0); of equals the
    largest α."""
    least = tau * _target(points)
    kept = [point for point in points if point.forget is not None and point.retain >= least - TIE]
    return min(kept, key=lambda point: (point.forget, -point.alpha), default=None)


def tau_curve(points: Sequence[CalibrationPoint], taus: Sequence[float]) -> list[CurvePoint]:
    """ES_f*(τ) at each τ that some measured point reaches."""
    curve = []
    for tau in taus:
        best = best_at(points, tau)
        if best is not None and best.forget is not None:
            curve.append(CurvePoint(tau=tau, alpha=best.alpha, forget=best.forget, paraphrase=best.paraphrase))
    return curve


def area_under(
    points: Sequence[CalibrationPoint],
    forget: Callable[[CalibrationPoint], float | None] = lambda point: point.forget,
) -> float | None:
    """∫₀¹ ES_f*(τ) dτ, exact for the step function through the measured points; None unless α = 0 was measured."""
    whole = _target(points)
    measured = [(min(1.0, point.retain / whole), value) for point in points if (value := forget(point)) is not None]
    if not any(point.alpha == 0 and forget(point) is not None for point in points):
        return None
    return _under_steps(measured, min)


def aues(points: Sequence[CalibrationPoint]) -> float | None:
    """∫₀¹ max{1 − forget : retain ≥ τ} dτ (arXiv:2505.16252, as the area of the envelope); 0 beyond every retain."""
    return envelope_area([(point.retain, 1 - point.forget) for point in points if point.forget is not None])


def envelope_area(measured: Sequence[tuple[float, float]]) -> float | None:
    """∫ max{value : reach ≥ τ} dτ over the pairs (reach, value), τ from 0 to the largest reach; None without pairs."""
    return _under_steps(measured, max) if measured else None


def _under_steps(measured: Sequence[tuple[float, float]], better: Callable[[float, float], float]) -> float:
    """Area under τ ↦ best value among the pairs (reach, value) with reach ≥ τ, from 0 to the largest reach."""
    ordered = sorted(measured, reverse=True)
    area, best = 0.0, ordered[0][1]
    for place, (reach, value) in enumerate(ordered):
        best = better(best, value)
        after = ordered[place + 1][0] if place + 1 < len(ordered) else 0.0
        area += (reach - after) * best
    return area


def _target(points: Sequence[CalibrationPoint]) -> float:
    return next(point.retain for point in points if point.alpha == 0)
