"""An update that leaves enough: scaled down until held-out retain rows keep the strength that was asked for."""

from __future__ import annotations

from torch import nn

from expunge.models.drift import open_tensors
from expunge.models.mixture import mixed
from expunge.numbers import HARDLY
from expunge.pipeline.calibrate import search
from expunge.pipeline.calibration_passes import CalibrationRows, Passes
from expunge.pipeline.job import Keep
from expunge.pipeline.processes import broadcast, process_rank
from expunge.recipe import ModelConfig
from expunge.report.text import number, percent, plural

#: Width to which the factor is searched.
EPSILON = 0.02
#: A factor below which hardly anything of an update is left.
_LITTLE = 0.1


def scale_down(model: nn.Module, start: ModelConfig, keep: Keep) -> tuple[float, str]:
    """Leave a trained model at the largest α of θ_start + α Δ that keeps enough; α, and why it is this one.

    Strength is extraction strength, α is searched as in calibration (arXiv:2406.09179) on rows that no step saw, with
    the weights as they will be saved: half precision would flip ties. The first process searches. Raises UserError for
    adapters that can't be scaled.
    """
    mixture = mixed(model, open_tensors(start))
    alpha, words = 1.0, ""
    if process_rank() == 0:
        alpha, words = _searched(Passes(lambda: mixture, CalibrationRows(keep.rows, ())), keep)
    alpha, words = broadcast((alpha, words))
    mixture.settle(alpha)
    return alpha, words


def demanded(keep: Keep, whole: float) -> float:
    """The strength that has to stay of `whole`; half a row less where one row is more than may be lost at all."""
    coarse = 1 / len(keep.rows) > 1 - keep.share
    return max(0.0, keep.share * whole - (0.5 / len(keep.rows) if coarse else 0.0))


def _searched(passes: Passes, keep: Keep) -> tuple[float, str]:
    """The factor, and why it is this one."""
    whole, rows = passes.retain(0.0), plural(len(keep.rows), "held-out retain row")
    if whole < HARDLY:
        return 1.0, (
            f"the start model hardly completes {rows} (extraction strength {number(whole)}), so that there is nothing "
            "to hold the update against; it is kept whole"
        )
    alpha = search(passes.retain, demanded(keep, whole), EPSILON)
    left = f"{rows} stay at {number(passes.retain(alpha))} of {number(whole)} (asked: {percent(keep.share)})"
    if alpha == 1:
        return alpha, f"the update is kept whole: {left}"
    words = f"the update is scaled by {alpha:.2f}: {left}; unscaled {number(passes.retain(1.0))}"
    little = "; little of it is left: a smaller keep would forget more" if alpha < _LITTLE else ""
    return alpha, words + little
