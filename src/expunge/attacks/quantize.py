"""Rounding the weights: a small change of the weights can stay within the buckets and is gone at 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from expunge.attacks.base import ModelAttack, Point, World, attack, restored, setting
from expunge.models.quantization import fake_quantized, find_scheme, linear_weights


@attack(
    name="quantize",
    idea="round the weights to 8 and 4 bits, as models are often served",
    paper="2410.16454",
    kind="weights",
    budget="bits per weight, scales included",
    outputs=("scores", "generations"),
)
class Quantize(ModelAttack):
    """All linear layers but the output embedding are rounded to the nearest level; no data is needed."""

    schemes: tuple[str, ...] = setting(
        ("int8", "int4-g32", "nf4", "int4-g64", "int4-g128"),
        description="int8 (a scale per output channel), nf4 (blocks of 64), int4-gN and int4-asym-gN (groups of N)",
        published="8 and 4 bits",
        min_length=1,
    )

    def points(self) -> list[Point]:
        """One point per scheme, in the order given. Raises UserError for an unknown scheme."""
        found = [find_scheme(name) for name in self.schemes]
        return [Point(scheme.name, scheme.bits_per_weight, {"scheme": scheme.name}) for scheme in found]

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the weights hold their rounded values. Raises UserError if there is no linear layer."""
        scheme = find_scheme(point.settings["scheme"])
        linear = linear_weights(model)
        with restored({name: found.weight for name, found in linear.items()}, device="cpu"):
            with torch.no_grad():
                for found in linear.values():
                    rounded = fake_quantized(found.oriented(found.weight), scheme)
                    found.weight.copy_(found.oriented(rounded))
            yield model
