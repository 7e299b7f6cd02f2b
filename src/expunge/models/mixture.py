"""A model on the line between two others, θ(α) = θ_target + α (θ_unlearned − θ_target), set in place without drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.models.drift import Read, Tensors, check_shape
from expunge.models.forward import unwrap

#: Name and tensor of the target → a fresh float32 difference of the unlearned model; None where it has none.
Delta = Callable[[str, Tensor], Tensor | None]

_FOLD = "fold it first: expunge merge ADAPTER --base TARGET --method linear -o FOLDED"
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "single tokens (trainable_token_indices)",
    "target_parameters": "parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
}


@runtime_checkable
class Mixed(Protocol):
    """A model in memory whose α can be set."""

    model: nn.Module

    def set(self, alpha: float) -> None:
        """Make the model θ(α)."""
        ...

    def settle(self, alpha: float) -> None:
        """Make the model θ(α) for good: what is saved then is θ(α) too."""
        ...


@dataclass(frozen=True)
class Line:
    """Both ends, tensor by tensor. What is read is not kept: memory-mapped files stay in the page cache."""

    names: tuple[str, ...]
    target: Read
    delta: Delta
    unlearned: Read | None = None  # the other end as it is, so that α = 1 is exact; None: target + delta
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # tensors are rounded to how they will be stored

    def at(self, name: str, alpha: float) -> Float[Tensor, "*shape"]:
        """One tensor of θ(α), computed in float32: exact at both ends, and wherever the two models agree."""
        target = self.target(name)
        if alpha == 1 and self.unlearned is not None:
            return self.unlearned(name)
        delta = self.delta(name, target) if alpha != 0 else None
        if delta is None:
            return target
        return delta.mul_(alpha).add_(target.to(delta.device))


class Mixture:
    """θ(α) in the parameters of `model`; every `set` starts from both ends, so that no earlier α leaves a trace.

    Memory: the model, and one tensor at a time of what the line reads.
    """

    def __init__(self, model: nn.Module, line: Line) -> None:
        """Raises UserError if the line does not hold every parameter of the model."""
        self.model, self.line = model, line
        self.alpha: float | None = None
        self._places = places(model, line.names)
        self._sound = False

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Make the model θ(α). Raises UserError for weights that are not finite."""
        if not isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, not {alpha}")
        if alpha == self.alpha:
            return
        self.alpha = None  # should this be interrupted, the model is neither here nor there
        for name, place in self._places.items():
            tensor = self.line.at(name, alpha)
            check_shape(name, tensor, place)
            place.copy_(tensor.to(self.line.dtypes.get(name, place.dtype)))
            if not self._sound and not isfinite(float(place.sum(dtype=torch.float32))) and not place.isfinite().all():
                end = "target" if alpha == 0 else "unlearned model"
                raise UserError(f"{name} of the {end} holds NaN or infinite numbers", "that model is broken")
        self._sound = self._sound or alpha != 0
        self.alpha = alpha

    def settle(self, alpha: float) -> None:
        """Make the model θ(α)."""
        self.set(alpha)


class ScaledAdapter:
    """θ(α) by the scale of LoRA adapters in memory: α · scaling · B A on the target. Nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UserError for adapters whose effect is not proportional to their scale."""
        from peft.tuners.lora import LoraLayer

        self.model = model
        wrapped: Any = model
        for config in wrapped.peft_config.values():
            _refuse_variants(config)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        if any(layer.merged for layer in layers):
            raise UserError("the adapter is merged into its base and can't be scaled", "unmerge it first")
        self._layers = [(layer, dict(layer.scaling)) for layer in layers]

    def set(self, alpha: float) -> None:
        """Make the model θ(α)."""
        for layer, scaling in self._layers:
            layer.scaling.update({name: alpha * scale for name, scale in scaling.items()})

    @torch.no_grad()
    def settle(self, alpha: float) -> None:
        """Make the model θ(α) in the adapters' weights: their scale is not part of what is saved."""
        self.set(1.0)
        for layer, scaling in self._layers:
            for name in scaling:
                for factors in (layer.lora_B, layer.lora_embedding_B):
                    if name in factors:
                        getattr(factors[name], "weight", factors[name]).mul_(alpha)


@contextmanager
def mixed_in_memory(model: nn.Module, target: Tensors) -> Iterator[Mixed]:
    """An unlearned model in memory, mixed with the target in place; afterwards it is bit by bit as it was.

    Adapters are scaled, and their base must be the target. Otherwise a copy is held of those parameters that differ
    from the target's. Raises UserError for models that can't be mixed.
    """
    mixture = mixed(model, target)
    try:
        yield mixture
    finally:
        mixture.set(1.0)


def mixed(model: nn.Module, target: Tensors) -> Mixed:
    """An unlearned model in memory whose update can be scaled, as in `mixed_in_memory`; it stays where it is set."""
    return ScaledAdapter(model) if hasattr(model, "peft_config") else Mixture(model, _held(model, target))


@torch.no_grad()
def _held(model: nn.Module, target: Tensors) -> Line:
    held: dict[str, Tensor] = {}
    for name, value in unwrap(model).named_parameters():
        if not value.is_floating_point():
            continue
        start = target.read(name)
        check_shape(name, start, value)
        if not torch.equal(start.to(value), value):
            held[name] = value.detach().clone()

    def delta(name: str, start: Tensor) -> Tensor | None:
        end = held.get(name)
        return None if end is None else end.to(torch.float32, copy=True).sub_(start.to(end.device))

    def unlearned(name: str) -> Tensor:
        return held[name] if name in held else target.read(name)

    return Line(target.names, target.read, delta, unlearned)


def places(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Where each tensor of the files is in the model. Files may leave out the name of the trunk (`model.`).

    Raises UserError where a parameter of the model is not among them.
    """
    inner: Any = unwrap(model)
    state: dict[str, Tensor] = inner.state_dict()
    found: dict[str, Tensor] = {}
    for name in names:
        for called in (name, f"{inner.base_model_prefix}.{name}"):
            if called in state and state[called].is_floating_point():
                found[name] = state[called]
                break
    covered = {place.data_ptr() for place in found.values()}
    for name, value in inner.named_parameters():
        if value.is_floating_point() and value.numel() and value.data_ptr() not in covered:
            raise UserError(
                f"the files do not hold {name} under that name, so the two models can't be mixed tensor by tensor",
                "save both with save_pretrained, in the form in which they are in memory",
            )
    return found


def _refuse_variants(config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    found = [words for key, words in _REFUSED.items() if getattr(config, key, None)]
    found += ["biases"] if getattr(config, "bias", "none") != "none" else []
    if kind != "LORA" or found:
        what = f"a {kind} adapter" if kind != "LORA" else f"an adapter with {found[0]}"
        raise UserError(f"{what} is not proportional to its scale, so it can't be mixed with the target", _FOLD)
