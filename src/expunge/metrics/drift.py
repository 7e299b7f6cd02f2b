"""How far the weights themselves have moved from the target's, and whether a quantizer would notice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Statistic, Values, metric

#: In which number format the weights are quantized → how it is called in a sentence.
FORMATS = {"int8": "8-bit integers", "int4": "4-bit integers", "nf4": "NF4"}


@metric(
    "weight_drift",
    summary="norm of the change of all weights over the norm of the target's weights",
    needs="weights",
    range=(0, np.inf),
    unit="part of the norm",
    paper="arXiv:2410.16454",
    learnt=None,
    roles=("utility",),
    anchors=False,
    per_example=False,
)
def weight_drift(table: pa.Table) -> Statistic:
    """‖θ − θ_target‖ / ‖θ_target‖ over all tensors together; `n` counts the tensors. None where the norm is 0."""
    drift, norm = (float(np.sqrt((_numbers(table, name) ** 2).sum())) for name in ("drift", "norm"))
    if not np.isfinite(drift + norm) or norm == 0:
        return Statistic(None, unscored=len(table), note="the weights have no finite norm above 0")
    return Statistic(drift / norm, n=len(table), note="n counts tensors")


def bucket_crossing(table: pa.Table, name: str) -> Statistic:
    """Part of the quantized weights whose code differs from the target's; `n` counts the tensors that are quantized.

    Weighted by parameters. None where no tensor is quantized.
    """
    crossed = _numbers(table, f"crossed_{name}")
    parameters = _numbers(table, "parameters")
    known = ~np.isnan(crossed)
    total = parameters[known].sum()
    unscored = int((~known).sum())
    if total == 0:
        return Statistic(None, unscored=unscored, note=f"no tensor is quantized to {FORMATS[name]}")
    value = float((crossed[known] * parameters[known]).sum() / total)
    return Statistic(value, n=int(known.sum()), unscored=unscored, note="n counts tensors")


def _crossing_metric(name: str) -> Callable[..., Statistic]:
    def crossing(table: pa.Table) -> Statistic:
        """`bucket_crossing` in one format."""
        return bucket_crossing(table, name)

    filed: Callable[..., Statistic] = metric(
        f"bucket_crossing_{name}",
        summary=f"part of the weights whose code changes when target and model are both quantized to {FORMATS[name]}",
        needs="weights",
        range=(0, 1),
        unit="part of the weights",
        paper="arXiv:2410.16454",
        learnt=None,
        roles=("utility",),
        anchors=False,
        per_example=False,
    )(crossing)
    return filed


bucket_crossing_int8, bucket_crossing_int4, bucket_crossing_nf4 = map(_crossing_metric, FORMATS)


def _numbers(table: pa.Table, name: str) -> Values:
    """A column as float64; null becomes NaN."""
    return np.array([np.nan if cell is None else cell for cell in table.column(name).to_pylist()], dtype=np.float64)
