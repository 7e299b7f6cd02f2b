"""The full suite's look inside: hidden states layer by layer, and weights tensor by tensor, beside the target's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.drift import Tensors, open_tensors, weight_table
from expunge.models.forward import decoder_layers
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.progress import Reporter
from expunge.recipe import ModelConfig
from expunge.scoring.depth import (
    answer_logits,
    answer_masks,
    layer_states,
    layers_table,
    linear_cka,
    logit_errors,
    patched_falls,
    restored_window,
)

TARGET, REFERENCE = "target", "reference"
#: Forget rows that are looked into: each layer of each costs a part of a forward.
ROWS = 48
#: Layers whose MLPs are given back together, and the step from one such window to the next (arXiv:2410.06606).
WINDOW = 5


def write_weights(models: Mapping[str, ModelConfig], out: Path, reporter: Reporter) -> dict[str, str]:
    """`out/<model>/model.parquet` for every model beside the target; the reasons for those that can't be compared."""
    target = open_tensors(models[TARGET])
    problems = {}
    others = {name: config for name, config in models.items() if name != TARGET}
    with reporter.bar("weights", len(others)) as tick:
        for name, config in others.items():
            try:
                table = weight_table(
                    target.names, target.read, open_tensors(config).read, target.quantized, target.transposed
                )
            except UserError as error:
                problems[name] = error.message
            else:
                _write(table, out / name / "model.parquet")
            tick(1)
    return problems


def write_layers(
    models: Mapping[str, ModelConfig],
    dtype: str,
    rows: Sequence[Encoded],
    entities: pa.Table,
    out: Path,
    reporter: Reporter,
) -> None:
    """`out/<model>/forget.parquet` for every model beside target and reference. One model is in memory at a time.

    `entities` is the SCORES table of the rows: its column says which tokens carry the answer.
    """
    marked = [np.array(mask, dtype=bool) for mask in entities.column("entity").to_pylist()]
    rows, masks = list(rows)[:ROWS], answer_masks(rows[:ROWS], marked[:ROWS])
    ids = [row.example.id for row in rows]
    others = [name for name in models if name not in (TARGET, REFERENCE)]
    tensors = open_tensors(models[TARGET])
    with reporter.bar("layers", len(others) + 3) as tick:

        def opened(name: str) -> torch.nn.Module:
            tick(1, name)
            return LazyModel(models[name], dtype).loaded.model

        model = opened(TARGET)
        states = {TARGET: layer_states(model, rows, masks)}
        logits = answer_logits(model, rows, masks)
        model = opened(REFERENCE)
        states[REFERENCE] = layer_states(model, rows, masks)
        recovered = {}
        for name in others:
            model = opened(name)
            states[name] = layer_states(model, rows, masks)
            recovered[name] = _recovery(model, rows, masks, logits, tensors)
        model = opened(TARGET)
        sources = {name: state for name, state in states.items() if name != TARGET}
        falls = patched_falls(model, rows, masks, sources)
    similar = _similarity(states[TARGET], states[REFERENCE])
    for name in others:
        measures = {"uds_reference": falls[REFERENCE], "uds_model": falls[name], **recovered[name]}
        whole = {"cka_target": similar, "cka": _similarity(states[name], states[REFERENCE])}
        _write(layers_table(ids, measures, whole), out / name / "forget.parquet")


def _recovery(
    model: torch.nn.Module,
    rows: Sequence[Encoded],
    masks: Sequence[np.ndarray],
    logits: Sequence[torch.Tensor],
    tensors: Tensors,
) -> dict[str, torch.Tensor]:
    """Distance of the logits from the target's, plain and with windows of MLPs given back, at each window's middle."""
    depth = len(decoder_layers(model))
    plain = logit_errors(model, rows, masks, logits)
    patched = torch.full((len(rows), depth), float("nan"))
    every = patched.clone()
    for middle in range(min(WINDOW // 2, depth - 1), depth, WINDOW):
        window = range(max(0, middle - WINDOW // 2), min(depth, middle + WINDOW // 2 + 1))
        with restored_window(model, window, tensors.read):
            patched[:, middle] = logit_errors(model, rows, masks, logits)
        every[:, middle] = plain
    return {"krs_mse": every, "krs_patched_mse": patched}


def _similarity(one: torch.Tensor, two: torch.Tensor) -> list[float]:
    """Linear CKA of two models' states, per layer."""
    return [linear_cka(mine, other) for mine, other in zip(one, two, strict=True)]


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
