"""Masks of `tiny` for tests of training, and what a training changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from expunge.localize.masks import Mask
from expunge.models.load import load_model
from expunge.models.tiny import build_tiny
from expunge.recipe import ModelConfig

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def shapes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in build_tiny()[0].named_parameters()}


def random_mask(seed: int = 0) -> Mask:
    """Single weights of matrices, whole columns of two of them, a norm as a whole, and all of one matrix."""
    generator = torch.Generator().manual_seed(seed)
    inside = {}
    for name, shape in shapes().items():
        if "down_proj" in name:
            inside[name] = torch.rand(1, shape[1], generator=generator) < 0.2
        elif "_proj" in name and "k_proj" not in name:
            inside[name] = torch.rand(shape, generator=generator) < 0.3
    inside["model.layers.1.mlp.gate_proj.weight"] = torch.ones(1, 1, dtype=torch.bool)
    inside["model.layers.0.input_layernorm.weight"] = torch.ones(1, dtype=torch.bool)
    inside["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(1, 1, dtype=torch.bool)
    return Mask(inside)


def mask_of(*names: str) -> Mask:
    """Whole parameters."""
    return Mask({name: torch.ones([1] * len(shapes()[name]), dtype=torch.bool) for name in names})


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().float().view(torch.int32)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    return dict(load_model(config).model.named_parameters())


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    return bits(before) == bits(after)


def assert_kept(before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mask) -> None:
    """Bits outside are the same; something inside each parameter of the mask is another."""
    for name, start in before.items():
        same, inside = unchanged(start, after[name]), mask.inside.get(name, torch.zeros(()).bool())
        assert (same | inside).all(), f"{name} changed outside"


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, start in before.items() if not unchanged(start, after[name]).all()}
