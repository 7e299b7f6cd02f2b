"""Where an update landed: how far each tensor of a model is from the same tensor of the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.models.drift import check_shape, open_tensors
from expunge.models.files import is_adapter
from expunge.models.load import resolve_folder, skeleton
from expunge.models.names import layer_of, module_of
from expunge.recipe import ModelConfig
from expunge.report.update_record import NAME, InsideMask, TensorUpdate, Updates
from expunge.runs.atomic import write_json

if TYPE_CHECKING:
    from expunge.localize.masks import Mask
    from expunge.merging.adapters import Adapter
    from expunge.merging.checkpoint import Checkpoint

#: Elements that are widened to float64 at once.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class _Weights:
    """The parameters of a model, read one at a time: its own, or those of its base and what an adapter adds."""

    names: tuple[str, ...]  # a tied tensor once
    dtype: torch.dtype  # in which the model is loaded
    read: Callable[[str], Tensor]  # the stored dtype; read-only
    added: Callable[[str, Tensor], Tensor | None] = lambda name, base: None  # float32, before it is rounded


def measure_updates(
    before: ModelConfig, after: ModelConfig, mask: Mask | None = None, tick: Callable[[int], Any] = lambda count: None
) -> Updates:
    """Per tensor ‖Δ‖², ‖θ_before‖² and the elements that changed, in float64; with a mask, what of them lies inside.

    One tensor of each model is in memory at a time. An adapter's ΔW is taken as it is, not rounded to its base's dtype.
    GGUF files, pickles and adapters whose ΔW can't be said exactly are loaded whole. Raises UserError if the models
    have other tensors, or other shapes, or if the mask is of another model.
    """
    with _opened(before) as old, _opened(after) as new:
        missing = sorted(set(old.names) ^ set(new.names))
        if missing:
            holder, other = (before, after) if missing[0] in old.names else (after, before)
            raise UserError(
                f"{other.id} has no tensor {missing[0]}, which {holder.id} has",
                "compare a model with the one that it was made from",
            )
        inside = {} if mask is None else dict(mask.inside)
        for name in inside:
            if name not in old.names:
                raise _of_another(name, "has no")
        tensors = []
        for name in new.names:
            tensors.append(_compared(name, old, new, inside.get(name), mask is not None))
            tick(1)
    return Updates(tensors=tensors, mask=None if mask is None else mask.digest)


def write_updates(before: ModelConfig, after: ModelConfig, mask: Mask | None, folder: Path) -> None:
    """`folder/updates.json`; what can't be compared leaves the reason there, for the model is made all the same."""
    try:
        found = measure_updates(before, after, mask)
    except UserError as error:
        found = Updates(problem=error.message)
    write_json(folder / NAME, found.model_dump(mode="json", by_alias=True))


@contextmanager
def _opened(config: ModelConfig) -> Iterator[_Weights]:
    folder, dtype = resolve_folder(config.id, config.revision), getattr(torch, config.dtype)
    try:
        files = _files(folder, config)
    except UserError:  # not to be had as exact differences from files: transformers and PEFT may still load it
        files = None
    if files is None:
        tensors = open_tensors(config)
        yield _Weights(tensors.names, dtype, tensors.read)
        return
    checkpoint, adapter = files
    try:
        places = _places(checkpoint, config)

        def added(name: str, base: Tensor) -> Tensor | None:
            return None if adapter is None else adapter.delta(places[name], base)

        yield _Weights(tuple(places), dtype, lambda name: checkpoint.read(places[name]), added)
    finally:
        checkpoint.close()
        if adapter is not None:
            adapter.close()


def _files(folder: Path, config: ModelConfig) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint of a model or of its base, and the adapter if it is one. Raises UserError for other files."""
    from expunge.merging.adapters import Adapter
    from expunge.merging.checkpoint import Checkpoint
    from expunge.merging.inputs import resolve

    if not folder.is_dir():
        raise UserError(f"{config.id} is no folder", "give a checkpoint")
    if not is_adapter(folder):
        return Checkpoint.open(folder, config.id), None
    adapter = Adapter(folder, config.id)
    if adapter.base is None:
        raise UserError(f"{config.id} does not say what its base model is", "set base_model_name_or_path")
    checkpoint = Checkpoint.open(resolve(adapter.base, folder, adapter.revision))
    adapter.bind(checkpoint)
    return checkpoint, adapter


def _places(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, str]:
    """Parameter of the model → its name in the files, which may lack the model's prefix and hold buffers beside it.

    Where the files know other tensors than the model (experts that it fuses), their names stand for themselves.
    """
    stored = [name for name, info in checkpoint.tensors.items() if info.merges]
    found = {}
    for name, _ in skeleton(config).named_parameters():
        place = next((each for each in (name, name.partition(".")[2]) if each in stored), None)
        if place is None:
            return {each: each for each in stored}
        found[name] = place
    return found


def _compared(name: str, old: _Weights, new: _Weights, bits: Tensor | None, masked: bool) -> TensorUpdate:
    """One tensor. `bits` broadcasts to its shape; without it, all of the tensor lies outside the mask, if there is one.

    Raises UserError for other shapes.
    """
    earlier, later = old.read(name).detach(), new.read(name).detach()
    check_shape(name, earlier, later)
    gone, come = old.added(name, earlier), new.added(name, later)
    whole = _broadcast(name, bits, earlier)
    weights, energy, before, changed = 0, 0.0, 0.0, 0
    weights_inside, energy_inside, changed_inside = 0, 0.0, 0
    for piece in _pieces(earlier):
        was = _wide(earlier, old.dtype, piece)
        difference = _wide(later, new.dtype, piece).sub_(was)  # exact; what adapters add is small beside the weights
        if come is not None:
            difference += _cut(come, piece)
        if gone is not None:
            difference -= _cut(gone, piece)
            was += _cut(gone, piece)
        squares = difference.square()
        weights, changed = weights + was.numel(), changed + int(difference.count_nonzero())
        energy, before = energy + float(squares.sum()), before + float(was.square().sum())
        if whole is not None:
            part = _cut(whole, piece).to(difference.device)
            weights_inside += int(part.count_nonzero())
            energy_inside += float(squares.where(part, 0.0).sum())  # in the same order: all of it is exactly all
            changed_inside += int(difference[part].count_nonzero())
    return TensorUpdate(
        tensor=name,
        layer=layer_of(name),
        module=module_of(name),
        weights=weights,
        energy=_finite(energy),
        before=_finite(before),
        changed=changed,
        inside=InsideMask(weights=weights_inside, energy=_finite(energy_inside), changed=changed_inside)
        if masked
        else None,
    )


def _broadcast(name: str, bits: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The mask as a view of the tensor's shape. Raises UserError if it does not fit."""
    if bits is None:
        return None
    try:
        return bits.expand(tensor.shape)
    except RuntimeError:
        raise _of_another(name, f"has {tuple(tensor.shape)} as the shape of") from None


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """Slices along the first axis of about _CHUNK elements; together the whole tensor."""
    count = tensor.shape[0] if tensor.ndim else 1
    size = max(1, _CHUNK * count // max(1, tensor.numel()))
    return (slice(start, start + size) for start in range(0, count, size))


def _cut(tensor: Tensor, piece: slice) -> Tensor:
    return (tensor if tensor.ndim else tensor.view(1))[piece]


def _wide(tensor: Tensor, dtype: torch.dtype, piece: slice) -> Tensor:
    """A fresh piece in float64, rounded as the model is when it is loaded."""
    return _cut(tensor, piece).to(dtype).to(torch.float64, copy=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of_another(name: str, what: str) -> UserError:
    return UserError(f"the mask is of another model: this one {what} {name}", "give the mask that it was made with")
