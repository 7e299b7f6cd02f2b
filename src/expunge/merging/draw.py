"""Random numbers of a merge: the same for the same seed, parameter and model, in whatever order tensors are merged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The source of randomness of one parameter; methods that are random take it as their keyword `draw`."""

    seed: int
    name: str

    def generator(self, model: int, device: torch.device | str = "cpu", start: int = 0) -> torch.Generator:
        """A generator for the model of that number, one per piece that begins at the flat index `start`.

        Its stream differs between kinds of device.
        """
        key = hashlib.sha256(f"{self.seed}/{self.name}/{model}/{start}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(key[:7], "little"))

    def uniform(self, model: int, start: int, end: int, device: torch.device | str = "cpu") -> Float[Tensor, " n"]:
        """Numbers in [0, 1) for the elements from `start` to `end`, the same whenever that piece is asked for again."""
        return torch.rand(end - start, generator=self.generator(model, device, start), device=device)
