"""Calibration by mixing (UWC, arXiv:2406.09179): the largest α that keeps what it should, and what then is left.

The search is a function of a callable, the passes are kept by α and never made twice, and the model may come from
files or from memory. docs/design/calibration.md says why it is done this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import expunge
from expunge.errors import UserError
from expunge.merging.inputs import Full, Inputs, open_inputs
from expunge.metrics.base import METRICS, Resampling, Values, averaged
from expunge.models.drift import open_tensors
from expunge.models.load import load_model, resolve_folder
from expunge.models.mixture import Line, Mixture, mixed_in_memory
from expunge.pipeline.asked import AT
from expunge.pipeline.calibration_passes import FORGET, PARAPHRASE, RETAIN, CalibrationRows, Known, Passes
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.recipe.conventions import EXPUNGE, Convention
from expunge.report.calibration_record import (
    TIE,
    Calibration,
    CalibrationPoint,
    area_under,
    aues,
    tau_curve,
)
from expunge.scoring.tables import RECORD_KEYS

#: α tried from above before any bisection, so that the largest that keeps enough is found even where strength is not
#: monotone. The cells between them are halved to 0.01 in 6, 5 and 5 passes: 8 in all, whichever it is.
COARSE = (1.0, 0.64, 0.32)
#: Points of the τ-curve, both ends included, and the τ that are read off it.
GRID = tuple(number / 8 for number in range(9))
TAUS = tuple(number / 20 for number in range(21))
#: A grid point takes over a pass that was made this near to it.
_NEAR = 1 / 32


@dataclass(frozen=True)
class Settings:
    """What is asked of a calibration."""

    keep: float = 0.95
    epsilon: float = 0.01
    curve: bool = True
    convention: Convention = EXPUNGE
    seed: int = 0  # of the bootstrap

    def check(self) -> None:
        """Raises UserError for numbers out of range."""
        if not 0 < self.keep <= 1:
            raise UserError(f"keep {self.keep:g} is not a part of the whole", "give a number above 0 and at most 1")
        if not 1e-6 <= self.epsilon <= 0.5:
            raise UserError(f"epsilon {self.epsilon:g} is out of range", "give a number from 0.000001 to 0.5")


# ---------------------------------------------------------------- the search


def search(strength: Callable[[float], float], threshold: float, epsilon: float) -> float:
    """The largest α in [0, 1] with strength(α) ≥ threshold, less at most `epsilon`; 0 if there is none.

    α = 0 is taken for granted. For monotone strengths exact to ε; otherwise the largest that a scan of COARSE from
    above and a bisection of the cell behind it can see. At ε = 0.01 `strength` is called at most 8 times.
    """
    above = 1.0
    for alpha in COARSE:
        if strength(alpha) >= threshold - TIE:
            return alpha if alpha == 1 else bisect(strength, threshold, alpha, above, epsilon)
        above = alpha
    return bisect(strength, threshold, 0.0, above, epsilon)


def bisect(strength: Callable[[float], float], threshold: float, low: float, high: float, epsilon: float) -> float:
    """Halve (low, high], of which `low` reaches the threshold and `high` does not, to a width of ε; the lower end."""
    while high - low > epsilon * (1 + 1e-9):
        middle = (low + high) / 2
        if strength(middle) >= threshold - TIE:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------- the calibration


def calibrate_model(
    target: ModelConfig,
    unlearned: ModelConfig | nn.Module,
    rows: CalibrationRows,
    settings: Settings = Settings(),
    evaluate: EvaluateConfig = EvaluateConfig(),
    *,
    known: Known | None = None,
    tick: Callable[[int], None] | None = None,
) -> Calibration:
    """Calibrate without writing anything. A model in memory is mixed in place, and afterwards is as it was.

    `known` are strengths that were measured before, such as the target's in a loop over its unlearned models (see
    `known_strengths`). Raises UserError for models that don't belong together.
    """
    settings.check()
    with ExitStack() as stack:
        if isinstance(unlearned, nn.Module):
            mixture = stack.enter_context(mixed_in_memory(unlearned, open_tensors(target)))
            name = "a model in memory"
        else:
            opened = stack.enter_context(both(target, unlearned))
            mixture, name = mixture_of(opened, target, evaluate.dtype), unlearned.id
        options: dict[str, Any] = {"batch_size": evaluate.batch_size, "convention": settings.convention}
        passes = Passes(lambda: mixture, rows, known=known, tick=tick, **options)
        return calibrated(passes, settings, Resampling(evaluate.bootstrap, settings.seed), target.id, name)


def known_strengths(calibration: Calibration, variant: str = "target") -> dict[tuple[float, str], Values]:
    """What an earlier calibration measured of its target (or of "unlearned"), as `known` for the next one."""
    alpha = {"target": 0.0, "unlearned": 1.0}[variant]
    found = calibration.values[variant]
    return {
        (alpha, kind): np.array([np.nan if value is None else value for value in rows.values()])
        for kind, rows in found.items()
    }


@contextmanager
def both(target: ModelConfig, unlearned: ModelConfig) -> Iterator[Inputs]:
    """The unlearned model (checkpoint or adapter) as an input on the target. Raises UserError if they don't fit."""
    opened = open_inputs([_place(unlearned)], _place(target))
    try:
        source = opened.models[0]
        assert opened.base is not None
        if source.folder.resolve() == opened.base.folder.resolve():
            raise UserError(f"{unlearned.id} and the target are the same model", "give the model before unlearning")
        yield opened
    finally:
        opened.close()


def mixture_of(opened: Inputs, target: ModelConfig, dtype: str) -> Mixture:
    """The target in memory, on the device, ready to be mixed with what `opened` reads.

    Tensors are rounded to the dtype in which a merge writes them, so that what is measured is what is written.
    """
    base, source = opened.base, opened.models[0]
    assert base is not None
    config = target.model_copy(update={"id": str(base.folder), "revision": None, "dtype": dtype})
    model = load_model(config).model
    tensors = {name: info for name, info in opened.tensors().items() if info.merges}
    line = Line(
        names=tuple(tensors),
        target=base.read,
        delta=source.delta,
        unlearned=source.checkpoint.read if isinstance(source, Full) else None,
        dtypes={name: info.dtype for name, info in tensors.items()},
    )
    return Mixture(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), line)


def calibrated(passes: Passes, settings: Settings, resampling: Resampling, target: str, unlearned: str) -> Calibration:
    """Search, measure what is left at α*, and draw the τ-curve. Raises UserError if the target keeps nothing."""
    whole = passes.retain(0.0)
    if whole <= 0:
        raise UserError(
            "the target completes none of the retain answers (extraction strength 0): there is nothing to keep",
            "give retain rows that the target has learnt",
        )
    threshold = settings.keep * whole
    passes.values(0.0, FORGET)  # while the model stands there: mixing takes time too
    passes.values(1.0, RETAIN)
    passes.values(1.0, FORGET)
    alpha = search(passes.retain, threshold, settings.epsilon)
    asked = len(passes.visited()) - 1
    notes: list[str] = []
    if settings.curve:
        _measure_grid(passes)
        alpha = _looked_above(passes, alpha, threshold, settings.epsilon, notes)
    passes.values(alpha, FORGET)
    less = [one for one in passes.visited() if one < alpha and passes.retain(one) < threshold - TIE]
    if less:
        shown = ", ".join(f"{one:.3f}" for one in less)
        notes.append(f"retain strength is not monotone: below α* it is too low at α = {shown}")
    points = [_point(passes, visited) for visited in passes.visited()]
    values, records = _measured(passes, alpha, resampling)
    drawn = points if settings.curve else []
    return Calibration(
        expunge=expunge.__version__,
        target=target,
        unlearned=unlearned,
        keep=settings.keep,
        epsilon=settings.epsilon,
        alpha=alpha,
        threshold=threshold,
        passes=passes.count(asked),
        points=points,
        curve=tau_curve(drawn, TAUS) if drawn else [],
        area=area_under(drawn) if drawn else None,
        area_paraphrase=area_under(drawn, lambda point: point.paraphrase) if drawn else None,
        aues=aues(drawn) if drawn else None,
        records=records,
        values=values,
        splits=dict(passes.rows.splits) or {RETAIN: RETAIN, FORGET: FORGET},
        convention=settings.convention.name,
        notes=notes,
        answer=_answer(alpha, settings, passes),
    )


def _measure_grid(passes: Passes) -> None:
    """Retain and forget strength along the grid; a retain pass that was made near a grid point takes its place."""
    for wanted in GRID:
        near = min(passes.visited(), key=lambda alpha: abs(alpha - wanted))
        alpha = near if near == wanted or (near > 0 and abs(near - wanted) <= _NEAR) else wanted
        passes.values(alpha, RETAIN)
        passes.values(alpha, FORGET)


def _looked_above(passes: Passes, alpha: float, threshold: float, epsilon: float, notes: list[str]) -> float:
    """α*, searched again above the largest visited α that keeps enough, should the grid have shown a larger one."""
    enough = max(one for one in passes.visited() if passes.retain(one) >= threshold - TIE)
    if enough <= alpha:
        return alpha
    above = min(one for one in passes.visited() if one > enough)
    found = bisect(passes.retain, threshold, enough, above, epsilon)
    notes.append(
        f"retain strength is not monotone: α = {enough:.3f} of the τ-curve keeps enough although the search had ended "
        f"at {alpha:.3f}; it was searched again above"
    )
    return found


def _point(passes: Passes, alpha: float) -> CalibrationPoint:
    asked = alpha in passes.visited(FORGET)
    paraphrase = asked and bool(passes.rows.paraphrase)
    return CalibrationPoint(
        alpha=alpha,
        retain=passes.retain(alpha),
        forget=passes.mean(alpha, FORGET) if asked else None,
        paraphrase=passes.mean(alpha, PARAPHRASE) if paraphrase else None,
    )


def _measured(
    passes: Passes, alpha: float, resampling: Resampling
) -> tuple[dict[str, dict[str, dict[str, float | None]]], list[dict[str, Any]]]:
    """Strength per example, and records with intervals, of the target, the calibrated and the unlearned model."""
    values: dict[str, dict[str, dict[str, float | None]]] = {}
    records: list[dict[str, Any]] = []
    metric = METRICS.get("extraction_strength")
    for variant, end in (("target", 0.0), ("calibrated", alpha), ("unlearned", 1.0)):
        values[variant] = {}
        for kind, rows in {**passes.rows.of(RETAIN), **passes.rows.of(FORGET)}.items():
            each = passes.values(end, kind)
            ids = dict.fromkeys(row.example.id for row in rows)
            values[variant][kind] = {
                name: None if np.isnan(value) else float(value) for name, value in zip(ids, each, strict=True)
            }
            found = averaged(each, metric.average, resampling)
            cells = {"variant": variant, "split": kind, "metric": metric.name, "value": found.value}
            cells |= {"ci_low": found.low, "ci_high": found.high, "n": found.n, "unscored": found.unscored}
            cells |= {"direction": metric.direction(kind.partition(AT)[0]), "note": found.note}
            records.append({key: cells.get(key) for key in RECORD_KEYS})
    return values, records


def _answer(alpha: float, settings: Settings, passes: Passes) -> str:
    kept = passes.retain(alpha) / passes.retain(0.0)
    wanted = f"wanted: {settings.keep:.0%}"
    if alpha == 1:
        return f"the unlearned model keeps {kept:.1%} of the target's retain strength ({wanted}): nothing is mixed"
    if alpha == 0:
        return (
            f"no mixture with α above {settings.epsilon:g} keeps {settings.keep:.0%} of the target's retain strength: "
            "at this demand the unlearning removes nothing"
        )
    return f"α* = {alpha:.3f} keeps {kept:.1%} of the target's retain strength ({wanted})"


def _place(config: ModelConfig) -> str:
    """What a model is called, or its folder where a revision says which."""
    if config.revision is None:
        return config.id
    return str(resolve_folder(config.id, config.revision))
