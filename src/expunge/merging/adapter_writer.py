"""The result of a merge as a LoRA adapter of a chosen rank, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.adapter_layout import Layout, find_places, plan_layout, target_modules
from expunge.merging.adapters import WEIGHTS, Adapter
from expunge.merging.card import model_card, small_files
from expunge.merging.draw import Draw
from expunge.merging.inputs import Full, Inputs
from expunge.merging.merger import Advance, Merger
from expunge.merging.refactorise import factorise
from expunge.merging.writer import CheckpointWriter
from expunge.models.files import ADAPTER_CONFIG
from expunge.runs.atomic import write_json

_NOT_FOR_ADAPTERS = ("generation_config.json",)


@dataclass(frozen=True)
class Factorisation:
    """What became of the merged difference: its rank, and what that lost of each matrix and of all of them."""

    base: str
    """What the adapter calls its base: a hub id or a folder."""
    rank: int
    relative_error: float
    """‖ΔW − BA‖ / ‖ΔW‖ over all factorised matrices together (Frobenius)."""
    modules: dict[str, float]
    """Module → the same of its matrix."""
    modules_to_save: list[str]
    """Modules that are held whole, without an error: what is no matrix, and embeddings that are tied."""
    parameters: int
    """Numbers that the adapter holds."""


class _AdapterFile(CheckpointWriter):
    """The same folder and file, under PEFT's name."""

    def _name(self, shard: int) -> str:
        return WEIGHTS


def write_adapter(
    merger: Merger,
    output: Path,
    rank: int,
    record: Callable[[], Mapping[str, Any]],
    *,
    advance: Advance = lambda elements: None,
    beside: Sequence[Path] = (),
    seed: int = 42,
) -> Factorisation:
    """Merge, factorise and write an adapter folder that PEFT loads on the base; the merger prepares itself here.

    `record()` is asked for merge.json when everything is merged; the factorisation is added as its entry `adapter`.
    `advance` is called with (1 + merger.passes) times the elements of the model in all; `beside` are small files that
    are copied. Raises UserError, before anything is written, if there is no base or for changes that no adapter holds.
    """
    if rank < 1:
        raise UserError(f"an adapter can't have rank {rank}", "give a whole number above 0, for instance 16")
    opened = merger.opened
    base = opened.base
    if base is None:
        raise UserError("an adapter holds differences from a base, and there is none", "say it with --base")
    places = find_places(base)
    layout = plan_layout(_changed(merger), places, base, rank)
    tensors = layout.tensors(merger.tensors)
    name, revision = _base_name(opened)
    files = [file for file in small_files(opened) if file.name not in _NOT_FOR_ADAPTERS and file.suffix != ".py"]
    size = sum(info.nbytes for info in tensors.values())
    with _AdapterFile(output, tensors, beside=[*files, *beside], shard_bytes=size) as writer:
        write_json(writer.partial / ADAPTER_CONFIG, layout.config(target_modules(layout, places), name, revision))
        merger.prepare(advance)
        errors = _stream(merger, layout, writer, advance, seed)
        for parameter in merger.tensors.keys() - layout.low.keys() - layout.whole.keys():
            advance(merger.tensors[parameter].numel)
        found = _summary(name, layout, errors, sum(info.numel for info in tensors.values()))
        whole = {**record(), "adapter": asdict(found)}
        writer.publish(whole, model_card(whole))
    return found


def _stream(
    merger: Merger, layout: Layout, writer: CheckpointWriter, advance: Advance, seed: int
) -> dict[str, tuple[float, float]]:
    """Write everything; parameter → (norm of what its factors lost, norm of its merged difference)."""
    errors: dict[str, tuple[float, float]] = {}

    def pieces(name: str) -> list[Tensor]:
        """What a parameter's keys hold, in their order."""
        if name not in layout.low:
            return [merger.tensor(name)] * len(layout.whole[name])
        a, b, errors[name] = _factors(merger, layout, name, seed)
        return [a, b]

    owners = {key: name for name in layout.low for key in layout.keys(name)}
    owners |= {key: name for name, keys in layout.whole.items() for key in keys}
    # the keys of one parameter stand side by side in the file
    for name, keys in groupby(writer.order, key=owners.__getitem__):
        for key, piece in zip(keys, pieces(name), strict=True):
            writer.write(key, piece)
        advance(merger.tensors[name].numel)
    return errors


def _factors(merger: Merger, layout: Layout, name: str, seed: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """A and B of one matrix on the CPU, and the norms of what they lost and of what they were made from."""
    delta = merger.delta(name)
    assert delta is not None
    norm = float(delta.norm())
    matrix = delta.T if layout.transposes(name) else delta
    a, b, error = factorise(matrix, layout.rank, Draw(seed, name).generator(0, delta.device))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError(f"{name} in the result holds NaN or infinite numbers", "use smaller weights or a smaller scale")
    return a.cpu(), b.cpu(), (error * norm, norm)


def _changed(merger: Merger) -> list[str]:
    """The parameters that any input changes. Whole checkpoints are compared with the base; adapters say it."""
    opened = merger.opened
    base = opened.base
    assert base is not None
    for name in merger.tensors.keys() - set(merger.names):
        merger.tensor(name)  # counters and masks: the same everywhere, or refused
    named = {name for model in opened.models if isinstance(model, Adapter) for name in model.changes}
    full = [model.checkpoint for model in opened.models if isinstance(model, Full)]
    found = []
    for name in merger.names:
        start = base.read(name) if full and name not in named else None
        if start is None:
            differs = name in named
        else:
            differs = not all(_same(start, checkpoint.read(name)) for checkpoint in full)
        if differs:
            found.append(name)
    if not found:
        raise UserError("the inputs do not differ from the base", "give the base that they were trained from")
    return found


def _same(one: Tensor, two: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, two.dtype)
    return torch.equal(one.to(wide), two.to(wide))


def _base_name(opened: Inputs) -> tuple[str, str | None]:
    """How the adapter names its base: a hub id with its revision where that is how the inputs say it, else a folder."""
    base = opened.base
    assert base is not None
    for model in opened.models:
        if isinstance(model, Adapter) and model.base is not None and base.label == str(base.folder):
            near = [Path(model.base).expanduser(), model.folder / model.base]
            if "/" in model.base and not any(folder.exists() for folder in near):
                return model.base, model.revision
    if "/" in base.label and not Path(base.label).expanduser().exists():
        return base.label, None
    return str(base.folder.resolve()), None


def _summary(base: str, layout: Layout, errors: Mapping[str, tuple[float, float]], parameters: int) -> Factorisation:
    lost = sum(part**2 for part, _ in errors.values()) ** 0.5
    whole = sum(norm**2 for _, norm in errors.values()) ** 0.5
    modules = {layout.low[name].module: part / norm if norm else 0.0 for name, (part, norm) in errors.items()}
    return Factorisation(base, layout.rank, lost / whole if whole else 0.0, modules, layout.saved, parameters)
