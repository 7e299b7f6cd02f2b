"""An update that leaves enough: scaled down until held-out retain rows keep the strength that was asked for."""

from __future__ import annotations

import numpy as np
from torch import nn

from expunge.models.drift import open_tensors
from expunge.models.mixture import mixed
from expunge.numbers import HARDLY
from expunge.pipeline.calibrate import bisect, search
from expunge.pipeline.calibration_passes import FORGET, RETAIN, CalibrationRows, Passes
from expunge.pipeline.job import Keep
from expunge.pipeline.processes import broadcast, process_rank
from expunge.recipe import ModelConfig
from expunge.report.text import number, percent, plural

#: Width to which the factor is searched.
EPSILON = 0.02
#: A factor below which hardly anything of an update is left.
_LITTLE = 0.1
#: Held-out rows below which one of them moves the figure so far that it guards little.
_FEW = 8
#: Extraction strength by which forget rows may stand above what the whole update leaves of them, and count as gone.
_AS_GOOD = 0.03


def scale_down(model: nn.Module, start: ModelConfig, keep: Keep) -> tuple[float, str]:
    """Leave a trained model at the largest α of θ_start + α Δ that keeps enough; α, and why it is this one.

    Strength is extraction strength, α is searched as in calibration (arXiv:2406.09179) on rows that no step saw, with
    the weights as they will be saved: half precision would flip ties. Within the standard error of these rows, α is
    rather too large than so small that forget rows stand again. The first process searches. Raises UserError for
    adapters that can't be scaled.
    """
    mixture = mixed(model, open_tensors(start))
    alpha, words = 1.0, ""
    if process_rank() == 0:
        alpha, words = scale_for(Passes(lambda: mixture, CalibrationRows(keep.rows, keep.forget)), keep)
    alpha, words = broadcast((alpha, words))
    mixture.settle(alpha)
    return alpha, words


def scale_for(passes: Passes, keep: Keep) -> tuple[float, str]:
    """The factor by which an update with these passes is scaled, and why it is this one."""
    whole, rows = passes.retain(0.0), plural(len(keep.rows), "held-out retain row")
    if whole < HARDLY:
        return 1.0, (
            f"the start model hardly completes {rows} (extraction strength {number(whole)}), so that there is nothing "
            "to hold the update against; it is kept whole"
        )
    least = keep.share * whole
    enough = search(passes.retain, least, EPSILON)
    alpha = _until_gone(passes, least, enough)
    left = f"{rows} stay at {number(passes.retain(alpha))} of {number(whole)} (asked: {percent(keep.share)})"
    if alpha == 1:
        words = f"the update is kept whole: {left}"
    else:
        words = f"the update is scaled by {alpha:.2f}: {left}; unscaled {number(passes.retain(1.0))}"
    if alpha > enough:
        words += (
            f"; so few rows leave the factor open by their standard error ({number(_error(passes, alpha))}), and at "
            f"{enough:.2f}, where they stay at {number(passes.retain(enough))}, forget rows would stand at "
            f"{number(passes.mean(enough, FORGET))} instead of {number(passes.mean(alpha, FORGET))}"
        )
    little = "; little of it is left: a smaller keep would forget more" if alpha < _LITTLE else ""
    few = f"; fewer than {_FEW} rows tell little of what stays: give more retain rows" if len(keep.rows) < _FEW else ""
    return alpha, words + little + few


def _until_gone(passes: Passes, least: float, enough: float) -> float:
    """The smallest α from `enough` on at which forget rows are as good as gone as after the whole update.

    At most the largest α at which retain rows and their standard error reach `least`.
    """
    if enough == 1 or not passes.rows.forget:
        return enough
    whole = passes.mean(1.0, FORGET)
    if whole is None:
        return enough

    def forgotten(alpha: float) -> float:
        return -(passes.mean(alpha, FORGET) or 0.0)

    gone = -(whole + _AS_GOOD)
    if forgotten(enough) >= gone:
        return enough
    top = search(lambda alpha: passes.retain(alpha) + _error(passes, alpha), least, EPSILON)
    if forgotten(max(top, enough)) < gone:
        return max(top, enough)
    return top - bisect(lambda back: forgotten(top - back), gone, 0.0, top - enough, EPSILON)


def _error(passes: Passes, alpha: float) -> float:
    """Standard error, over rows, of what the retain rows lose at α."""
    lost = passes.values(0.0, RETAIN) - passes.values(alpha, RETAIN)
    lost = lost[~np.isnan(lost)]
    return float(lost.std(ddof=1) / np.sqrt(len(lost))) if len(lost) > 1 else 0.0
