"""Updates that keep out of directions which the inputs of kept rows use: they change what is asked there the least.

A linear layer answers x with W x. Where Δ = U P, and P is nearly zero on the directions in which the inputs of kept
rows lie, Δ x is nearly zero for them, and for rows like them that no step ever saw (arXiv:2103.07113).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

from expunge.data.encode import Encoded
from expunge.models.moments import Inlet, second_moments
from expunge.models.quantization import linear_weights

#: Rows whose inputs are looked at.
_ROWS = 1000
_BATCH = 8


@dataclass(frozen=True)
class Guarded:
    """A trained weight, and the layer that its inputs enter. `transposed`: stored as [in, out]."""

    weight: nn.Parameter
    layer: nn.Module
    transposed: bool = False


class NullSpace:
    """For each guarded weight P = λ (C + λ)⁻¹, with C the mean second moments of its inputs over the tokens of rows.

    λ is `softness` times the median input energy: a direction that is used that much is moved half as far as one that
    is never used. Memory: a square matrix per distinct input, on the device of the weights.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Encoded], softness: float) -> None:
        guarded = guarded_weights(model)
        chosen = rows[:: max(1, -(-len(rows) // _ROWS))]
        inlets = {name: Inlet(found.layer) for name, found in guarded.items()}
        moments = second_moments(model, chosen, inlets, _BATCH, dtype=torch.float32)
        tokens = sum(len(row.input_ids) for row in chosen)
        made: dict[int, Tensor] = {}
        self._by: dict[nn.Parameter, tuple[Tensor, bool]] = {}
        for name, found in guarded.items():
            if name in moments:
                moment = moments[name]
                if id(moment) not in made:
                    made[id(moment)] = soft_projector(moment / tokens, softness).to(found.weight.device)
                self._by[found.weight] = made[id(moment)], found.transposed

    def __contains__(self, weight: object) -> bool:
        """Whether a weight is guarded."""
        return weight in self._by

    def project(self, weight: nn.Parameter, update: Tensor) -> Tensor:
        """The part of an update of a guarded weight that is let through, in the shape in which it is stored."""
        projector, transposed = self._by[weight]
        with torch.autocast(update.device.type, enabled=False):
            made = projector @ update.float() if transposed else update.float() @ projector
        return made.to(update.dtype)

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """What fresh adapters read of their inputs is let through P too: their updates build on it."""
        for name, found in guarded_weights(model).items():
            if ".lora_A." in name and found.weight in self:
                found.weight.copy_(self.project(found.weight, found.weight))


def soft_projector(moments: Float[Tensor, "k k"], softness: float) -> Float[Tensor, "k k"]:
    """λ (C + λ)⁻¹ with λ = softness × the median of the diagonal of C; the identity where nothing is used."""
    wide = moments.double()
    level = wide.diagonal().median()
    level = level if level > 0 else wide.diagonal().mean()
    if not level > 0:
        return torch.eye(len(moments))
    ridge = softness * level * torch.eye(len(wide), dtype=wide.dtype)
    return (softness * level * torch.linalg.inv(wide + ridge)).float()


def guarded_weights(model: nn.Module) -> dict[str, Guarded]:
    """Trained weights that read the inputs of linear layers, by parameter name: the layers' own, or of adapters."""
    adapters = dict(_adapters(model))
    if adapters:
        return adapters
    found = linear_weights(model).items()
    return {
        name: Guarded(each.weight, each.module, each.transposed) for name, each in found if each.weight.requires_grad
    }


def _adapters(model: nn.Module) -> Iterator[tuple[str, Guarded]]:
    for name, module in model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        for adapter, factor in factors.items() if factors is not None else ():
            yield f"{name}.lora_A.{adapter}.weight", Guarded(factor.weight, module.get_base_layer())


class ProjectedAdamW(AdamW):
    """AdamW whose steps on guarded weights are projected last, so that its scaling can't turn them back."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], guard: NullSpace, **settings: Any) -> None:
        super().__init__([dict(group) for group in groups], **settings)
        self.guard = guard

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as in arXiv:1711.05101."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        steps, (first, second), gradient = float(state["step"]), group["betas"], weight.grad
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        assert gradient is not None
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        update = (mean / (1 - first**steps)).div_(scale)
        if weight in self.guard:
            update = self.guard.project(weight, update)
        weight.mul_(1 - float(group["lr"]) * group["weight_decay"]).add_(update, alpha=-float(group["lr"]))
