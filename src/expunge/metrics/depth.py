"""How deep unlearning goes: what of the knowledge is left inside the layers, between target and reference."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Statistic, Values, example_ids, metric

#: Layers in which the reference's states cost the target less than this (nats per token) hold nothing of the answer.
KNOWLEDGE = 0.05


@metric(
    "uds",
    summary="unlearning depth: part of the knowledge in the target's layers that the model's layers lack",
    needs="layers",
    range=(0, 1),
    unit="part of the knowledge",
    paper="arXiv:2605.24614",
    learnt="low",
    roles=("forget",),
    anchors=False,
)
def uds(table: pa.Table) -> Values:
    """Σ Δ1 · clip(Δ2 / Δ1, 0, 1) / Σ Δ1 over the layers with Δ1 > KNOWLEDGE; NaN where there is no such layer.

    Δ1 (`uds_reference`) and Δ2 (`uds_model`): log-probability that the answer's entity loses in the target when a
    layer's states are those of the reference and of the model. 1: as deep as a model that never saw the rows.
    """
    first, second = _grid(table, "uds_reference"), _grid(table, "uds_model")
    holds = first > KNOWLEDGE  # False for NaN
    total = np.where(holds, first, 0).sum(axis=1)
    lost = np.where(holds, np.clip(second, 0, first), 0).sum(axis=1)
    return np.divide(lost, total, out=np.full(len(total), np.nan), where=total > 0)


@metric(
    "krs",
    summary="knowledge recovery: how much nearer the target's logits come when a few layers are restored, mean over "
    "windows of layers",
    needs="layers",
    range=(-np.inf, 1),
    unit="part of the distance",
    paper="arXiv:2410.06606",
    roles=("forget",),
    anchors=False,
)
def krs(table: pa.Table) -> Values:
    """Mean over windows of 1 − `krs_patched_mse` / `krs_mse`; NaN where the model's logits are the target's.

    High: the knowledge is still there, and the removal sits in the layers that were restored.
    """
    found = _recovery(table)
    count = (~np.isnan(found)).sum(axis=1)
    return np.divide(np.nansum(found, axis=1), count, out=np.full(len(found), np.nan), where=count > 0)


@metric(
    "krs_best_window",
    summary="knowledge recovery in the window of layers whose restoring brings back most",
    needs="layers",
    range=(-np.inf, 1),
    unit="part of the distance",
    paper="arXiv:2410.06606",
    roles=("forget",),
    anchors=False,
)
def krs_best_window(table: pa.Table) -> Values:
    """Largest over windows of 1 − `krs_patched_mse` / `krs_mse`; NaN where the model's logits are the target's."""
    found = _recovery(table)
    best = np.where(np.isnan(found), -np.inf, found).max(axis=1, initial=-np.inf)
    return np.where(np.isneginf(best), np.nan, best)


@metric(
    "cka_erasure",
    summary="how far hidden states (linear CKA) moved from the target's to the reference's, weighted over layers",
    needs="layers",
    range=(0, 1),
    unit="part of the way",
    paper="arXiv:2605.24614",
    learnt="low",
    roles=("forget",),
    anchors=False,
    per_example=False,
)
def cka_erasure(table: pa.Table) -> Statistic:
    """Σ w clip((cka − cka_target) / w, 0, 1) / Σ w with w = 1 − cka_target, over layers; `n` counts the layers.

    CKA compares states over the rows of a split, so it is one number per layer. None where target and reference are
    alike in every layer.
    """
    own, target = _profile(table, "cka"), _profile(table, "cka_target")
    layers = sorted(layer for layer in own.keys() & target.keys() if np.isfinite(own[layer] + target[layer]))
    similar = np.array([(own[layer], target[layer]) for layer in layers], dtype=np.float64).reshape(-1, 2)
    weight = np.clip(1 - similar[:, 1], 0, None)
    unscored = len(own.keys() | target.keys()) - len(layers)
    if not weight.sum() > 0:
        return Statistic(None, n=0, unscored=unscored + len(layers), note="target and reference are alike")
    erased = np.clip(similar[:, 0] - similar[:, 1], 0, weight)
    return Statistic(float(erased.sum() / weight.sum()), n=len(layers), unscored=unscored, note="n counts layers")


def _recovery(table: pa.Table) -> Values:
    """1 − patched / plain [examples, layers]; NaN where there is no distance to make up."""
    patched, plain = _grid(table, "krs_patched_mse"), _grid(table, "krs_mse")
    ratio = np.divide(patched, plain, out=np.full(plain.shape, np.nan), where=(plain > 0) & np.isfinite(plain))
    return np.where(np.isfinite(ratio), 1 - ratio, np.nan)


def _grid(table: pa.Table, measure: str) -> Values:
    """A measure [examples, layers], in the order of `example_ids` and of layers; NaN where it is not there."""
    place = {name: i for i, name in enumerate(example_ids(table))}
    layers = {layer: i for i, layer in enumerate(sorted(set(table.column("layer").to_pylist())))}
    grid = np.full((len(place), len(layers)), np.nan)
    for name, layer, kind, value in _rows(table):
        if kind == measure and name in place:
            grid[place[name], layers[layer]] = value
    return grid


def _profile(table: pa.Table, measure: str) -> dict[int, float]:
    """A measure by layer, mean over whatever rows it is given for."""
    found: dict[int, list[float]] = {}
    for _, layer, kind, value in _rows(table):
        if kind == measure:
            found.setdefault(layer, []).append(value)
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def _rows(table: pa.Table) -> list[tuple[str, int, str, float]]:
    columns = (table.column(name).to_pylist() for name in ("example_id", "layer", "measure", "value"))
    return list(zip(*columns, strict=True))
