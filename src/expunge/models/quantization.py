"""Post-training quantization as pure functions: which code each weight gets, and what the codes give back.

Nothing is packed: what counts here is the weight that a quantized model computes with, and whether a change of the
weights moves any code. Scales are float32; what a format stores of them in fewer bits is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from expunge.errors import UserError, did_you_mean
from expunge.models.forward import unwrap

Kind = Literal["symmetric", "asymmetric", "normal"]

#: Probability at which NormalFloat cuts the tails: the mean of 1 − 1/32 and 1 − 1/30 (arXiv:2305.14314).
_TAIL = 0.9677083
_BITS_OF_SCALE = 16


def normal_levels() -> Float[Tensor, " levels"]:
    """The 16 levels of NF4: normal quantiles, 7 below zero, zero, 8 above it, over the largest (arXiv:2305.14314)."""
    upper = torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64)[:-1]
    lower = torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64)[:-1]
    levels = torch.cat([torch.special.ndtri(upper), torch.zeros(1), -torch.special.ndtri(lower)]).sort().values
    return (levels / levels[-1]).float()


@dataclass(frozen=True)
class Scheme:
    """One way to round. A block of weights shares a scale: a row of the output channels, a group of it, or, for NF4
    as bitsandbytes stores it, a run of the flattened weight."""

    name: str
    kind: Kind
    bits: int
    group: int | None = None  # weights that share a scale; None: a whole row

    @property
    def bits_per_weight(self) -> float:
        """What a weight takes with its part of the scale (16 bits) and, where there is one, of the zero point."""
        if self.group is None:
            return float(self.bits)
        beside = _BITS_OF_SCALE + (self.bits if self.kind == "asymmetric" else 0)
        return self.bits + beside / self.group


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "symmetric", 8),
        Scheme("nf4", "normal", 4, 64),
        *(Scheme(f"int4-g{group}", "symmetric", 4, group) for group in (32, 64, 128)),
        *(Scheme(f"int4-asym-g{group}", "asymmetric", 4, group) for group in (32, 64, 128)),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises UserError if there is none."""
    if name not in SCHEMES:
        raise UserError(f"unknown quantization scheme '{name}'", did_you_mean(name, SCHEMES))
    return SCHEMES[name]


@dataclass(frozen=True)
class Grid:
    """Where the levels of each block lie: level = (code − zero) · scale, or levels[code] · scale for NF4."""

    scale: Float[Tensor, "blocks 1"]
    zero: Float[Tensor, "blocks 1"]


def grid(weight: Float[Tensor, "out in"], scheme: Scheme) -> Grid:
    """The grid of a weight from the largest value of each block (symmetric, NF4) or from its range (asymmetric)."""
    blocks = _blocks(weight, scheme)
    if scheme.kind == "asymmetric":
        low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        scale = _no_zero((high - low) / (2**scheme.bits - 1))
        return Grid(scale, (-low / scale).round())
    largest = blocks.abs().amax(1, keepdim=True)
    scale = _no_zero(largest if scheme.kind == "normal" else largest / (2 ** (scheme.bits - 1) - 1))
    return Grid(scale, torch.zeros_like(scale))


def codes(weight: Float[Tensor, "out in"], scheme: Scheme, on: Grid | None = None) -> Int8[Tensor, "out in"]:
    """The code of each weight, on the weight's own grid or on the one given; outside a given grid, its last level."""
    on = on or grid(weight, scheme)
    scaled = _blocks(weight, scheme) / on.scale
    if scheme.kind == "normal":
        levels = normal_levels().to(scaled.device)
        # a weight halfway between two levels gets the lower one, as in bitsandbytes
        found = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    else:
        top = 2**scheme.bits - 1 if scheme.kind == "asymmetric" else 2 ** (scheme.bits - 1) - 1
        found = scaled.round_().add_(on.zero).clamp_(0 if scheme.kind == "asymmetric" else -top, top)
    return _unblocked(found.to(torch.int8), weight, scheme)


def fake_quantized(weight: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """The weight as a quantized model computes with it: quantized and dequantized, in its own dtype."""
    on = grid(weight, scheme)
    found = _blocks(codes(weight, scheme, on), scheme)
    if scheme.kind == "normal":
        values = normal_levels().to(weight.device)[found.long()] * on.scale
    else:
        values = (found.float() - on.zero) * on.scale
    return _unblocked(values, weight, scheme).to(weight.dtype)


def crossing_rate(
    target: Float[Tensor, "out in"], model: Float[Tensor, "out in"], scheme: Scheme, own_scales: bool = True
) -> float:
    """Part of the weights whose code differs between two tensors, in [0, 1].

    With `own_scales` each tensor has its own grid, as two quantized files have: 0 means that the 4-bit files hold the
    same codes. Otherwise both are rounded on the target's grid, which shows how many weights moved over a border
    rather than how far the scales moved.
    """
    on = grid(target, scheme)
    differ = codes(target, scheme, on) != codes(model, scheme, None if own_scales else on)
    return float(differ.double().mean()) if differ.numel() else 0.0


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer in a model; `transposed` where it is stored as [in, out] (Conv1D of GPT-2)."""

    module: nn.Module
    weight: nn.Parameter
    transposed: bool

    def oriented(self, stored: Tensor) -> Tensor:
        """[out, in] from what is stored, and back."""
        return stored.T if self.transposed else stored


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """Weights that quantization and pruning act on: all linear layers but the output embedding, by parameter name.

    The choice is that of bitsandbytes. Experts that a model keeps in one 3-D tensor are no linear layers and are left
    out. Raises UserError if nothing is left, or if adapters are not folded in.
    """
    from transformers.pytorch_utils import Conv1D

    inner: Any = unwrap(model)
    if any(hasattr(module, "lora_A") for module in inner.modules()):
        raise UserError("the weights of a model with open adapters can't be rounded", "fold them: merge_and_unload()")
    left_out = {id(module.weight) for module in _embeddings(inner)}
    found: dict[str, LinearWeight] = {}
    for name, module in inner.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight: Any = module.weight
        if id(weight) not in left_out and weight.is_floating_point() and weight.ndim == 2:
            left_out.add(id(weight))  # a shared weight counts once
            found[f"{name}.weight"] = LinearWeight(module, weight, isinstance(module, Conv1D))
    if not found:
        raise UserError(
            f"{type(inner).__name__} has no linear layers with weights in 16 or 32 bits",
            "give the checkpoint before quantization, or leave this attack out",
        )
    return found


def _embeddings(inner: Any) -> list[Any]:
    """Input and output embedding, as far as the model has them."""
    found = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [module for module in found if hasattr(module, "weight")]


def _no_zero(scale: Tensor) -> Tensor:
    """A block of zeros would divide by zero; with any other scale its codes are those of zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _blocks(tensor: Tensor, scheme: Scheme) -> Tensor:
    """[blocks, weights that share a scale], float32 unless they are codes; a ragged last block is filled with zeros."""
    wide = tensor if tensor.dtype == torch.int8 else tensor.detach().float()
    if scheme.group is None:
        return wide
    rows = wide.reshape(1, -1) if scheme.kind == "normal" else wide
    missing = -rows.shape[1] % scheme.group
    return nn.functional.pad(rows, (0, missing)).reshape(-1, scheme.group)


def _unblocked(blocks: Tensor, like: Tensor, scheme: Scheme) -> Tensor:
    """The tensor that `_blocks` cut up, without what it filled in."""
    if scheme.group is None:
        return blocks
    rows = blocks.reshape(1 if scheme.kind == "normal" else like.shape[0], -1)
    width = like.numel() if scheme.kind == "normal" else like.shape[1]
    return rows[:, :width].reshape(like.shape)
