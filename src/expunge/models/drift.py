"""How far a model's weights are from another's, tensor by tensor: norms, drift, and codes that change in few bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.models.files import check_weights, is_adapter
from expunge.models.forward import unwrap
from expunge.models.load import load_model, resolve_folder, skeleton
from expunge.models.quantization import SCHEMES, crossing_rate, linear_weights
from expunge.recipe import ModelConfig

Read = Callable[[str], Tensor]

#: Column → scheme of its codes.
CROSSINGS = {"crossed_int8": "int8", "crossed_int4": "int4-g128", "crossed_nf4": "nf4"}

#: One row per tensor; the columns of WEIGHTS in the tables of the passes.
_SCHEMA = pa.schema(
    [
        pa.field("tensor", pa.string(), nullable=False),
        pa.field("parameters", pa.int64(), nullable=False),
        pa.field("norm", pa.float64(), nullable=False),
        pa.field("drift", pa.float64(), nullable=False),
        *(pa.field(column, pa.float64()) for column in CROSSINGS),
    ]
)


@dataclass(frozen=True)
class Tensors:
    """The parameters of a model by name, read one at a time."""

    names: tuple[str, ...]  # in the model's order; a tied tensor once
    read: Read  # the stored dtype; read-only. Raises UserError for an unknown name
    quantized: tuple[str, ...]  # weights of linear layers
    transposed: tuple[str, ...]  # those of them that are stored as [in, out]


def tensors_of(model: nn.Module) -> Tensors:
    """The parameters of a model in memory. Raises UserError if it has open adapters."""
    return _described(model, _reader({name: value.detach() for name, value in unwrap(model).named_parameters()}))


def open_tensors(config: ModelConfig) -> Tensors:
    """The parameters of a checkpoint: memory-mapped one by one where the files hold them under the model's names;
    adapters (folded), GGUF and renamed checkpoints are loaded. Raises UserError for what can't be read."""
    folder = resolve_folder(config.id, config.revision)
    if folder.is_dir() and not is_adapter(folder) and check_weights(folder, config.id, config.allow_pickle):
        described = skeleton(config)
        places = _places(folder)
        if all(name in places for name, _ in described.named_parameters()):
            return _described(described, lambda name: _read(places, name))
    model: Any = load_model(config).model
    return tensors_of(model.merge_and_unload() if hasattr(model, "merge_and_unload") else model)


def weight_table(
    names: Sequence[str], target: Read, model: Read, quantized: Collection[str], transposed: Collection[str] = ()
) -> pa.Table:
    """The WEIGHTS table: per tensor ‖θ_target‖, ‖θ − θ_target‖ and, for the `quantized`, the part of codes that change.

    Each tensor is quantized with its own scales (see `quantization.crossing_rate`). Two tensors are held at a time.
    Raises UserError if a tensor has another shape in the model.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        before, after = target(name).detach(), model(name).detach()
        check_shape(name, before, after)
        before, after = before.float(), after.to(before.device).float()
        row = {"tensor": name, "parameters": before.numel(), "norm": _norm(before), "drift": _norm(after - before)}
        if name in quantized:
            pair = (before.T, after.T) if name in transposed else (before, after)
            row |= {column: crossing_rate(*pair, SCHEMES[scheme]) for column, scheme in CROSSINGS.items()}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def check_shape(name: str, target: Tensor, model: Tensor) -> None:
    """Raises UserError unless the tensor has the same shape in both models."""
    if target.shape != model.shape:
        raise UserError(
            f"{name} is {tuple(target.shape)} in the target, but {tuple(model.shape)} in the model",
            "give as target the model that unlearning started from",
        )


def weights_digest(model: nn.Module) -> tuple[int, ...]:
    """One number per parameter that changes when its bits do (their sum as integers), to know a model again."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tuple(
        int(value.detach().contiguous().view(sizes[value.element_size()]).sum(dtype=torch.int64))
        for value in model.parameters()
        if value.ndim
    )


def _described(model: nn.Module, read: Read) -> Tensors:
    names = tuple(name for name, value in unwrap(model).named_parameters() if value.is_floating_point())
    linear = linear_weights(model)
    return Tensors(names, read, tuple(linear), tuple(name for name, found in linear.items() if found.transposed))


def _reader(values: dict[str, Tensor]) -> Read:
    def read(name: str) -> Tensor:
        if name not in values:
            raise _missing(name)
        return values[name]

    return read


def _places(folder: Path) -> dict[str, Any]:
    """Tensor → the open file that holds it."""
    from safetensors import safe_open

    whole = folder / "model.safetensors"
    found: dict[str, Any] = {}
    for file in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, framework="pt")
        found.update(dict.fromkeys(opened.keys(), opened))
    return found


def _read(places: dict[str, Any], name: str) -> Tensor:
    if name not in places:
        raise _missing(name)
    tensor: Tensor = places[name].get_tensor(name)
    return tensor


def _missing(name: str) -> UserError:
    return UserError(f"the model has no tensor {name}", "compare two models of the same architecture")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
