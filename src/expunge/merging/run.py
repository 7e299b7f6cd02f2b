"""Merge models: open and check everything, then read, merge and write one tensor after the other."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from expunge import __version__
from expunge.errors import UserError
from expunge.merging.adapter_writer import Factorisation, write_adapter
from expunge.merging.ahead import leave_room, one_thread_each, processors
from expunge.merging.card import file_digests, model_card, result_config, small_files
from expunge.merging.inputs import Full, Inputs, open_inputs
from expunge.merging.merger import Merger
from expunge.merging.plan import Plan, plan_merge
from expunge.merging.statistics import Statistics
from expunge.merging.values import Value
from expunge.merging.writer import SHARD_BYTES, CheckpointWriter, check_output
from expunge.runs.atomic import plain, write_json

DEVICES = ("auto", "cpu", "cuda")

Progress = Callable[[int, int], None]
"""Called with (elements done, elements in all) after every tensor."""


@dataclass(frozen=True)
class MergeResult:
    """What was written: the folder, how long it took, how many tensors, and what the merge did (Statistics.summary)."""

    path: Path
    seconds: float
    tensors: int
    statistics: dict[str, Any]
    rank: int | None = None  # of the adapter that was written; None: a full checkpoint
    relative_error: float | None = None  # ‖ΔW − BA‖ / ‖ΔW‖ of that adapter
    replaced: bool = False  # an earlier merge stood in that folder


def merge_models(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    base: str | Path | None = None,
    method: str = "ties",
    weights: Sequence[Value] | None = None,
    density: Value | Sequence[Value] | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "auto",
    beside: Sequence[Path] = (),
    rank: int | None = None,
) -> MergeResult:
    """Merge checkpoints and LoRA adapters into a full checkpoint at `output`, in float32, tensor by tensor.

    `weights` are 1 each and `density` is 1 by default; `device` is cpu, cuda or auto, which is cpu: the disk is
    what takes the time. With `rank` the result is a LoRA adapter instead. After a kill or Ctrl-C the same call keeps
    the finished shards of a checkpoint. Raises UserError for what does not fit; then nothing is left.
    """
    started = time.perf_counter()
    output = Path(output)
    place = _device(device)
    plan = plan_merge(method, len(inputs), weights, density, parameters or {})
    replaced = check_output(output)
    opened = open_inputs(inputs, base)
    try:
        check_apart(opened, output)
        statistics = Statistics(len(inputs))
        merger = Merger(opened, plan, statistics, device=place, threads=processors())
        if rank is not None:
            made = _write_adapter(merger, statistics, output, rank, progress, beside)
            found = statistics.summary()
            count = len(made.modules) + len(made.modules_to_save)
            seconds = time.perf_counter() - started
            return MergeResult(output, seconds, count, found, made.rank, made.relative_error, replaced)
        tensors = merger.tensors
        key = merge_key(opened, plan, f"{place.type}/{shard_bytes}")
        with (
            CheckpointWriter(
                output, tensors, beside=[*small_files(opened), *beside], shard_bytes=shard_bytes, key=key
            ) as writer,
            one_thread_each(),
            _digests(opened) as digests,
        ):
            write_json(writer.partial / "config.json", result_config(opened, tensors))
            statistics.restore({name: row for name, row in writer.rows.items() if row})
            _stream(merger, statistics, writer, progress)
            record = _record(opened, plan, statistics, digests.result())
            writer.publish(record, model_card(record))
    finally:
        opened.close()
        leave_room()
    seconds = time.perf_counter() - started
    return MergeResult(output, seconds, len(tensors), statistics.summary(), replaced=replaced)


def _write_adapter(
    merger: Merger, statistics: Statistics, output: Path, rank: int, progress: Progress | None, beside: Sequence[Path]
) -> Factorisation:
    total, done = (1 + merger.passes) * sum(info.numel for info in merger.tensors.values()), 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        if progress is not None:
            progress(min(done, total), total)

    with _digests(merger.opened) as digests:

        def record() -> dict[str, Any]:
            return _record(merger.opened, merger.plan, statistics, digests.result())

        return write_adapter(merger, output, rank, record, advance=advance, beside=beside)


def check_apart(opened: Inputs, output: Path) -> None:
    """Raises UserError if `output` lies in an input, or the other way round."""
    place = output.resolve()
    for source in opened.sources:
        folder = source.folder.resolve()
        if place == folder or folder in place.parents or place in folder.parents:
            raise UserError(
                f"{output} and the input {source.label} are in each other's way", "choose another folder with -o"
            )


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise UserError(f"{name} is no device that merges", f"choose one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use", "leave out the device, or say cpu")
    return torch.device("cpu" if name == "auto" else name)


def _stream(merger: Merger, statistics: Statistics, writer: CheckpointWriter, progress: Progress | None) -> None:
    passes = merger.passes if writer.order else 0  # an interrupted merge may have finished all shards
    total = (1 + passes) * sum(info.numel for info in merger.tensors.values())
    done = 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        if progress is not None and elements:
            progress(done, total)

    advance(sum(merger.tensors[name].numel for name in writer.rows))  # of shards that were kept
    if passes:
        merger.prepare(advance)
    with closing(merger.stream(writer.order)) as stream:
        for name, tensor in stream:
            writer.write(name, tensor, statistics.rows.get(name))
            del tensor  # or it would stay while the next one is waited for
            advance(merger.tensors[name].numel)


@contextmanager
def _digests(opened: Inputs) -> Iterator[Future[dict[Path, dict[str, str]]]]:
    """sha256 of every input's weights, computed by a thread while the merge goes on."""
    stop = Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="digests")
    try:
        yield pool.submit(file_digests, {source.folder: source.files for source in opened.sources}, stop)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def merge_key(opened: Inputs, plan: Plan, layout: str) -> str:
    """Digest of all that decides what is written; input files are known by place, size and time of change."""
    files = {
        str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns]
        for source in opened.sources
        for file in (*source.files, *source.folder.glob("*.json"))
    }
    settings = [plan.method.name, plan.parameters, plan.weights.to_json(), plan.density.to_json(), layout]
    names = [source.folder.resolve() for source in opened.sources]
    text = json.dumps(plain([__version__, torch.__version__, settings, names, opened.base is None, files]))
    return hashlib.sha256(text.encode()).hexdigest()


def _record(
    opened: Inputs, plan: Plan, statistics: Statistics, digests: Mapping[Path, dict[str, str]]
) -> dict[str, Any]:
    models = [
        {
            "name": model.label,
            "kind": "checkpoint" if isinstance(model, Full) else "LoRA adapter",
            "weight": weight,
            "density": part if plan.method.trims else None,
            "sha256": digests[model.folder],
        }
        for model, weight, part in zip(opened.models, plan.weights.to_json(), plan.density.to_json(), strict=True)
    ]
    base = opened.base
    return {
        "expunge": __version__,
        "method": plan.method.name,
        "summary": plan.method.summary,
        "paper": plan.method.paper,
        "parameters": dict(plan.parameters),
        "base": None if base is None else {"name": base.label, "sha256": digests[base.folder]},
        "models": models,
        "statistics": statistics.summary(),
    }
