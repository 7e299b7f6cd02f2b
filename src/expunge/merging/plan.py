"""A merge before anything is read: the method, its parameters, and the weight and density of every model, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.draw import Draw
from expunge.merging.registry import COMMON, MERGES, Merge
from expunge.merging.values import Value, Values
from expunge.models.names import layers_in


@dataclass(frozen=True)
class Plan:
    """A merge whose settings have been checked; `parameters` has what every method has, too."""

    method: Merge
    parameters: Mapping[str, Any]
    weights: Values
    density: Values

    @property
    def scope(self) -> str:
        """tensor, model or factor."""
        return str(self.parameters["scope"])

    @property
    def trims(self) -> bool:
        """Whether anything is cut away."""
        return self.method.trims and any(part < 1 for part in self.density.numbers)

    def check(self, names: Sequence[str] = ()) -> None:
        """Let the method merge ones with all the weights and densities there are, so that it refuses before it is used.

        Without the names of a model's parameters, weights in a map are left out: which meet is not known. Raises
        UserError.
        """
        models, layers = len(self.weights.given), layers_in(names)
        rows = [self.weights.at(name, layers) for name in names] or self.weights.rows
        trials = [(row, (1.0,) * models) for row in dict.fromkeys(map(tuple, rows))]
        trials += [((1.0,) * models, (part,) * models) for part in dict.fromkeys(self.density.numbers)]
        for weights, density in trials:
            self.merged([torch.ones(1) + number / 8 for number in range(models)], list(weights), list(density))

    def merged(self, deltas: list[Tensor], weights: list[float], density: list[float], name: str = "") -> Tensor:
        """The merged delta of one parameter, before it is rescaled."""
        own = {key: value for key, value in self.parameters.items() if key not in COMMON}
        if self.method.random:
            own["draw"] = Draw(own.pop("seed"), name)
        result: Tensor = self.method.function(deltas, weights, density, **own)
        return result


def plan_merge(
    method: str,
    models: int,
    weights: Sequence[Value] | None = None,
    density: Value | Sequence[Value] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Plan:
    """Check method, parameters, weights and density for that many models, without reading any. Raises UserError."""
    entry = MERGES.get(method)
    checked = entry.check(parameters or {})
    factors = Values.of("weights", weights, models, 1.0)
    parts = Values.of("density", density, models, 1.0)
    for part in parts.numbers:
        if not 0 < part <= 1:
            raise UserError(f"density {part:g} is not a part of the whole", "give a number above 0 and at most 1")
    _check_models(entry, models, factors)
    plan = Plan(entry, checked, factors, parts)
    if models:
        plan.check()
    return plan


def _check_models(entry: Merge, models: int, weights: Values) -> None:
    least, most = entry.models
    if models and (models < least or (most is not None and models > most)):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        noun = "model" if wanted == "1" else "models"
        raise UserError(f"{entry.name} merges {wanted} {noun}, not {models}", "see: expunge list merges")
    if not entry.weighs and any(weight != 1 for weight in weights.numbers):
        own = "alpha" if "alpha" in entry.parameters.model_fields else "scale"
        raise UserError(f"{entry.name} uses no weights", f"leave them out; what there is: --set {own}=0.5")
