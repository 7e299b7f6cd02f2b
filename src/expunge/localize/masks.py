"""A mask: which weights of a model may change. Booleans that broadcast to the weights, packed bits on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.models.forward import unwrap
from expunge.runs.atomic import write_bytes

SCHEMA = "expunge.mask/1"


@dataclass(frozen=True)
class Mask:
    """Parameter name → bool that broadcasts to the parameter's shape; parameters that are missing are outside.

    `about` says where the mask comes from: by, unit, density, units, chosen, seed, parameters, rows, and under "model"
    the digest of the weights that it was made for (absent: any model of these shapes).
    """

    inside: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, shapes and bits; what `about` says does not count."""
        whole = hashlib.sha256()
        for name in sorted(self.inside):
            bits = self.inside[name]
            whole.update(f"{name}{tuple(bits.shape)}".encode())
            whole.update(_packed(bits).numpy().tobytes())
        return whole.hexdigest()

    def bound(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks of the parameters that have something inside, by the model's own names; raises UserError.

        Every one broadcasts to its parameter, and lies on its device.
        """
        parameters = dict(unwrap(model).named_parameters())
        found = {}
        for name, bits in self.inside.items():
            if not bits.any():
                continue
            parameter = parameters.get(name)
            if parameter is None or not _fits(bits, parameter):
                what = "has no" if parameter is None else f"has {tuple(parameter.shape)} as the shape of"
                raise UserError(
                    f"the mask is of another model: this one {what} {name}",
                    "make a mask of this model: expunge localize",
                )
            found[name] = bits.to(parameter.device)
        if not found:
            raise UserError("the mask is empty: nothing would be trained", "give a larger density: expunge localize")
        return found

    def weights(self, model: nn.Module) -> tuple[int, int]:
        """(Weights inside, weights of the model)."""
        bound, inside, total = self.bound(model), 0, 0
        for name, parameter in unwrap(model).named_parameters():
            total += parameter.numel()
            if name in bound:
                bits = bound[name]
                inside += int(bits.sum()) * (parameter.numel() // bits.numel())
        return inside, total

    def write(self, file: Path) -> None:
        """Packed bits and `about` in one safetensors file, whole or not at all."""
        shapes = {name: list(bits.shape) for name, bits in self.inside.items()}
        metadata = {"about": json.dumps(dict(self.about)), "shapes": json.dumps(shapes)}
        metadata |= {"schema": SCHEMA, "digest": self.digest}
        write_bytes(file, save({name: _packed(bits) for name, bits in self.inside.items()}, metadata))


def read_mask(file: str | Path) -> Mask:
    """A mask that `Mask.write` wrote. Raises UserError for any other file."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"no mask at {file}", "make one: expunge localize MODEL --forget ROWS -o mask.safetensors")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise UserError(f"{file} is no mask of expunge", "make one: expunge localize MODEL --forget ROWS")
            shapes = json.loads(metadata["shapes"])
            inside = {name: _unpacked(opened.get_tensor(name), shape) for name, shape in shapes.items()}
            mask = Mask(inside, json.loads(metadata["about"]))
            if mask.digest != metadata["digest"]:
                raise ValueError("its bits are not the ones that were written")
            return mask
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}", "make the mask again: expunge localize") from None


def everything_but(mask: Mask, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Per parameter of the model, what is not inside the mask, as broadcast as it can be."""
    bound = mask.bound(model)
    for name, parameter in unwrap(model).named_parameters():
        yield name, ~bound[name] if name in bound else torch.ones([1] * parameter.ndim, dtype=torch.bool)


def _fits(bits: Tensor, parameter: Tensor) -> bool:
    pairs = zip(bits.shape, parameter.shape, strict=False)
    return bits.ndim == parameter.ndim and all(own in (1, wanted) for own, wanted in pairs)


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.detach().cpu().numpy().reshape(-1)))


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes can't hold {count} bits")
    flat = np.unpackbits(packed.numpy(), count=count).view(bool)
    return torch.from_numpy(flat.reshape(shape))
