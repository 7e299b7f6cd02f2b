"""Merge models: open and check everything, then read, merge and write one tensor after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from expunge import __version__
from expunge.errors import UserError
from expunge.merging.card import file_digests, model_card, result_config, small_files
from expunge.merging.checkpoint import TensorInfo
from expunge.merging.inputs import Full, Input, Inputs, open_inputs
from expunge.merging.registry import MERGES, Merge
from expunge.merging.selection import kept_over_model
from expunge.merging.statistics import Statistics
from expunge.merging.writer import SHARD_BYTES, CheckpointWriter, check_output
from expunge.runs.atomic import write_json

Progress = Callable[[int, int], None]
"""Called with (elements done, elements in all) after every tensor."""


@dataclass(frozen=True)
class MergeResult:
    """What was written: the folder, how long it took, how many tensors, and what the merge did (Statistics.summary)."""

    path: Path
    seconds: float
    tensors: int
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A merge whose settings have been checked: weight and density per model, `own` = the function's parameters."""

    method: Merge
    own: dict[str, Any]
    parameters: dict[str, Any]
    weights: list[float]
    density: list[float]

    def merged(self, deltas: list[Tensor], density: list[float] | None = None) -> Tensor:
        """The merged, scaled delta of one parameter; `density` overrides that of each model."""
        merged: Tensor = self.method.function(deltas, self.weights, density or self.density, **self.own)
        return merged.mul_(self.parameters["scale"])


def merge_models(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    base: str | Path | None = None,
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeResult:
    """Merge checkpoints and LoRA adapters into a full checkpoint at `output`, in float32, tensor by tensor.

    `weights` are 1 each and `density` is 1 by default. Raises UserError for what does not fit; then nothing is written.
    """
    started = time.perf_counter()
    output = Path(output)
    plan = plan_merge(method, len(inputs), weights, density, parameters or {})
    check_output(output)
    opened = open_inputs(inputs, base)
    try:
        _check_place(opened, output)
        _check_base(opened, plan)
        tensors = opened.tensors()
        statistics = Statistics(len(inputs))
        with (
            CheckpointWriter(output, tensors, beside=small_files(opened), shard_bytes=shard_bytes) as writer,
            _digests(opened) as digests,
        ):
            write_json(writer.partial / "config.json", result_config(opened, tensors))
            _stream(opened, plan, writer, tensors, statistics, progress)
            record = _record(opened, plan, statistics, digests)
            writer.publish(record, model_card(record))
    finally:
        opened.close()
    return MergeResult(output, time.perf_counter() - started, len(tensors), statistics.summary())


def plan_merge(
    method: str,
    models: int,
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Plan:
    """Check method, parameters, weights and density for that many models, without reading any. Raises UserError."""
    entry = MERGES.get(method)
    checked = entry.check(parameters or {})
    factors = [1.0] * models if weights is None else [float(weight) for weight in weights]
    if len(factors) != models:
        raise UserError(f"{len(factors)} weights for {models} models", "give one weight per model: --weights 1,1")
    if not all(isfinite(factor) for factor in factors):
        raise UserError(f"weights must be finite numbers, not {factors}", "for instance: --weights 1,0.5")
    if density is None:
        parts = [1.0] * models
    else:
        parts = [float(density)] * models if isinstance(density, int | float) else [float(part) for part in density]
    if len(parts) != models:
        raise UserError(f"{len(parts)} densities for {models} models", "give one density, or one per model")
    for part in parts:
        if not 0 < part <= 1:
            raise UserError(f"density {part:g} is not a part of the whole", "give a number above 0 and at most 1")
    own = {name: value for name, value in checked.items() if name not in ("scale", "scope")}
    plan = Plan(entry, own, checked, factors, parts)
    if models:
        plan.merged([torch.ones(1) for _ in range(models)])  # a method refuses what it can't do before anything is read
    return plan


def _check_base(opened: Inputs, plan: Plan) -> None:
    if opened.base is not None:
        return
    if plan.method.needs_base:
        raise UserError(
            f"{plan.method.name} merges differences from a base, and whole checkpoints do not say what theirs is",
            "say it with --base, or merge the checkpoints themselves with --method linear",
        )
    same = float(plan.merged([torch.ones(1) for _ in opened.models]))
    if abs(same - 1) > 1e-5:
        raise UserError(
            f"without a base the weights must add up to 1, not {same:g}: the result would be {same:g} times a model",
            "give --base, or weights that sum to 1, or leave out normalize=false and scale",
        )


def _check_place(opened: Inputs, output: Path) -> None:
    place = output.resolve()
    for source in opened.sources:
        folder = source.folder.resolve()
        if place == folder or folder in place.parents or place in folder.parents:
            raise UserError(
                f"{output} and the input {source.label} are in each other's way", "choose another folder with -o"
            )


def _stream(
    opened: Inputs,
    plan: Plan,
    writer: CheckpointWriter,
    tensors: Mapping[str, TensorInfo],
    statistics: Statistics,
    progress: Progress | None,
) -> None:
    over_model = plan.parameters.get("scope") == "model" and any(part < 1 for part in plan.density)
    passes = 1 + 2 * len(opened.models) if over_model else 1
    total, done = passes * sum(info.numel for info in tensors.values()), 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        if progress is not None:
            progress(done, total)

    own_density = _over_model(opened, plan, writer.order, tensors, advance) if over_model else {}
    for name in writer.order:
        info = tensors[name]
        if info.merges:
            writer.write(name, _merged(opened, plan, name, info, own_density.get(name), statistics))
        else:
            writer.write(name, _unmerged(opened, name))
        advance(info.numel)


def _merged(
    opened: Inputs, plan: Plan, name: str, info: TensorInfo, density: list[float] | None, statistics: Statistics
) -> Tensor:
    """A parameter of the result in its dtype."""
    base = None if opened.base is None else opened.base.read(name)
    found = [model.delta(name, base) for model in opened.models]
    if base is not None and all(delta is None for delta in found):
        _check_finite(base, name, opened.base.label if opened.base else "")
        return base.to(info.dtype)
    for model, delta in zip(opened.models, found, strict=True):
        _check_delta(opened, model, name, delta)
    deltas = [torch.zeros(info.shape) if delta is None else delta for delta in found]
    del found
    merged = plan.merged(deltas, density)
    statistics.add(deltas, merged)
    deltas.clear()
    if base is not None:
        merged = merged.add_(base)
    result = merged.to(info.dtype)
    _check_finite(result, name, "the result", f"{info.dtype} is too narrow; use smaller weights or a smaller scale")
    return result


def _unmerged(opened: Inputs, name: str) -> Tensor:
    """A tensor of counters or a mask, which must be the same everywhere."""
    first = opened.reference.read(name)
    for other in opened.checkpoints[1:]:
        if not torch.equal(first, other.read(name)):
            raise UserError(
                f"{name} ({first.dtype}, no weights) differs between {opened.reference.label} and {other.label}",
                "only models of one architecture can be merged",
            )
    return first


def _over_model(
    opened: Inputs, plan: Plan, order: Sequence[str], tensors: Mapping[str, TensorInfo], advance: Callable[[int], None]
) -> dict[str, list[float]]:
    """The density of each model in each tensor when one threshold per model trims all its tensors together."""
    sizes = {name: tensors[name].numel for name in order if tensors[name].merges}
    densities: dict[str, list[float]] = {name: [] for name in sizes}
    for model, part in zip(opened.models, plan.density, strict=True):

        def read(name: str, model: Input = model) -> Tensor | None:
            base = None if opened.base is None else opened.base.read(name)
            delta = model.delta(name, base)
            _check_delta(opened, model, name, delta)
            advance(sizes[name])
            return delta

        for name, kept in kept_over_model(read, sizes, part).items():
            densities[name].append(kept / max(1, sizes[name]))
    return densities


def _check_delta(opened: Inputs, model: Input, name: str, delta: Tensor | None) -> None:
    if delta is None or _is_finite(delta):
        return
    if opened.base is not None:
        _check_finite(opened.base.read(name), name, opened.base.label)
    raise UserError(f"{name} in {model.label} holds NaN or infinite numbers", "that model is broken; leave it out")


def _check_finite(tensor: Tensor, name: str, label: str, hint: str = "that model is broken; leave it out") -> None:
    if not _is_finite(tensor):
        raise UserError(f"{name} in {label} holds NaN or infinite numbers", hint)


def _is_finite(tensor: Tensor) -> bool:
    # a NaN or an infinity always shows in the sum; a finite tensor may overflow it, so then we look closer
    return isfinite(float(tensor.sum(dtype=torch.float32))) or bool(tensor.isfinite().all())


@contextmanager
def _digests(opened: Inputs) -> Iterator[dict[Path, Future[dict[str, str]]]]:
    """sha256 of every input's weights, computed by a thread while the merge goes on."""
    stop = Event()
    pool = ThreadPoolExecutor(1)
    sources = {source.folder: source.files for source in opened.sources}
    try:
        yield {folder: pool.submit(file_digests, folder, files, stop) for folder, files in sources.items()}
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _record(
    opened: Inputs, plan: Plan, statistics: Statistics, digests: Mapping[Path, Future[dict[str, str]]]
) -> dict[str, Any]:
    models = [
        {
            "name": model.label,
            "kind": "checkpoint" if isinstance(model, Full) else "LoRA adapter",
            "weight": weight,
            "density": part if plan.method.trims else None,
            "sha256": digests[model.folder].result(),
        }
        for model, weight, part in zip(opened.models, plan.weights, plan.density, strict=True)
    ]
    base = opened.base
    return {
        "expunge": __version__,
        "method": plan.method.name,
        "summary": plan.method.summary,
        "paper": plan.method.paper,
        "parameters": plan.parameters,
        "base": None if base is None else {"name": base.label, "sha256": digests[base.folder].result()},
        "models": models,
        "statistics": statistics.summary(),
    }
