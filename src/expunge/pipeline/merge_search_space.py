"""What the search of a merge chooses among: settings, and how the numbers that Optuna draws become one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.errors import UserError
from expunge.merging.plan import Plan, plan_merge
from expunge.merging.registry import MERGES
from expunge.merging.values import Value
from expunge.pipeline.processes import process_count
from expunge.recipe import MergeConfig

#: The method of the line between two models.
LINE = "linear"
#: Decimals of what is chosen: as many as a person types.
_WEIGHTS, _DENSITY, _SCALE = 4, 3, 4


@dataclass(frozen=True)
class Setting:
    """One merge: what `merge_models` takes."""

    method: str
    weights: tuple[Value, ...]
    density: Value | Sequence[Value] | None = None  # None where the method does not trim
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """As keywords of `merge_models`."""
        return {
            "method": self.method,
            "weights": list(self.weights),
            "density": self.density,
            "parameters": dict(self.parameters),
        }

    @property
    def key(self) -> str:
        """The same text for the same merge."""
        return json.dumps(self.options, sort_keys=True)

    def plan(self) -> Plan:
        """The checked plan. Raises UserError."""
        return plan_merge(models=len(self.weights), **self.options)


class Space:
    """The merges of a recipe's `merge.search` for so many models."""

    def __init__(self, merge: MergeConfig, models: int) -> None:
        """Check that what is asked makes sense, for every method. Raises UserError."""
        assert merge.search is not None
        self.merge, self.search, self.models = merge, merge.search, models
        self.methods = list(dict.fromkeys(self.search.methods or [merge.method, LINE]))
        self.given = {("scale" if name == "lambda" else name): value for name, value in merge.parameters.items()}
        if not self.search.trials:
            self.methods = [LINE]
        self._check()

    @staticmethod
    def halfway(low: float, high: float) -> float:
        """The middle, with the decimals of a weight: a trial of the same weights is then the same merge."""
        return round((low + high) / 2, _WEIGHTS)

    @property
    def has_line(self) -> bool:
        """Whether the line between two models is part of the search."""
        return self.search.line and self.models == 2 and "weights" in self.search.over

    @property
    def line_counts(self) -> bool:
        """Whether points of the line, and inputs alone, are among what may be chosen."""
        search = self.search
        free = {"weights", "scale"} <= set(search.over) and search.scale[0] <= 1 <= search.scale[1]
        return not search.trials or (LINE in self.methods and free)

    def setting(self, method: str, weights: Sequence[Value] | None, density: Any, scale: float | None) -> Setting:
        """A merge; what is not among what is searched is as the recipe says."""
        entry, over = MERGES.get(method), self.search.over
        chosen = weights if "weights" in over and weights is not None else self.merge.weights or [1.0] * self.models
        part = density if "density" in over else self.merge.density
        own = {name: value for name, value in self.given.items() if name in entry.parameters.model_fields}
        if "scale" in over and scale is not None:
            own["scale"] = scale
        return Setting(method, tuple(chosen), part if entry.trims else None, own)

    def alone(self, number: int) -> Setting:
        """One input by itself, added to the base as it is."""
        weights = [float(place == number) for place in range(self.models)]
        return Setting(LINE, tuple(weights), None, {"scale": 1.0})

    def between(self, under: int, at: float) -> Setting:
        """base + (1 − t) Δ under + t Δ over."""
        rest = round(1 - at, _WEIGHTS)
        weights = (rest, at) if under == 0 else (at, rest)
        return Setting(LINE, weights, None, {"scale": 1.0})

    def drawn(self, trial: Any) -> Setting:
        """The merge of an Optuna trial."""
        search = self.search
        method = self.methods[0]
        if len(self.methods) > 1:
            method = trial.suggest_categorical("method", self.methods)
        shares = [trial.suggest_float(f"share_{place}", 0.0, 1.0) for place in range(self._shares)]
        density = None
        if "density" in search.over and MERGES.get(method).trims:
            density = round(trial.suggest_float("density", *search.density), _DENSITY)
        scale = round(trial.suggest_float("scale", *search.scale), _SCALE) if "scale" in search.over else None
        weights = weights_of(shares) if "weights" in search.over else None
        return self.setting(method, weights, density, scale)

    def starts(self, shares: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Numbers for Optuna to begin with: these weights for every method, undiminished where that is in range."""
        search, found = self.search, []
        scale = min(max(1.0, search.scale[0]), search.scale[1])
        for weights in shares if self._shares else [[]]:
            for method in self.methods:
                numbers: dict[str, Any] = {"method": method} if len(self.methods) > 1 else {}
                numbers |= {f"share_{place}": share for place, share in enumerate(shares_of(weights))}
                if "density" in search.over and MERGES.get(method).trims:
                    numbers["density"] = search.density[1]
                if "scale" in search.over:
                    numbers["scale"] = scale
                found.append(numbers)
        return found

    @property
    def _shares(self) -> int:
        return self.models - 1 if "weights" in self.search.over else 0

    def _check(self) -> None:
        search, merge = self.search, self.merge
        if not search.trials and self.models != 2:
            raise UserError(
                f"the line lies between two models, not {self.models}", "give two models, or search with --search"
            )
        fixed = {"weights": merge.weights is not None, "scale": "scale" in self.given}
        fixed["density"] = merge.density != type(merge).model_fields["density"].default
        for chosen in search.over:
            if fixed[chosen]:
                raise UserError(f"the search chooses {chosen}, and {chosen} is given", "leave it out of one of the two")
        if not search.trials and (self.given or "weights" not in search.over):
            hint = "leave out --weights and --set, or add --search"
            raise UserError("the line is linear: it chooses the weights, and has no parameters", hint)
        for name in self.given:
            if not any(name in MERGES.get(method).parameters.model_fields for method in self.methods):
                MERGES.get(self.methods[0]).check({name: self.given[name]})
        even = [round(1 / self.models, _WEIGHTS)] * self.models
        for method in self.methods:
            self.setting(method, even, search.density[0], search.scale[1]).plan()
        if self.models == 1 and not any(
            name == "scale" or (name == "density" and MERGES.get(method).trims)
            for name in search.over
            for method in self.methods
        ):
            raise UserError("with one model there are no weights to choose", "let the search choose scale or density")


def check_alone() -> None:
    """Raises UserError under a launcher of several processes."""
    if process_count() > 1:
        raise UserError(
            "the search of a merge runs in one process",
            "start it without accelerate launch or torchrun; train first, then: expunge merge A B --search",
        )


def weights_of(shares: Sequence[float]) -> list[float]:
    """Weights ≥ 0 with sum 1 from numbers in [0, 1]: uniform over all such weights if these are uniform."""
    rest, weights, count = 1.0, [], len(shares)
    for place, share in enumerate(shares):
        part = rest * (1 - share ** (1 / (count - place)))
        weights.append(round(part, _WEIGHTS))
        rest -= part
    return [*weights, round(max(0.0, 1.0 - sum(weights)), _WEIGHTS)]


def shares_of(weights: Sequence[float]) -> list[float]:
    """Numbers from which `weights_of` makes these weights (sum 1)."""
    rest, shares, count = 1.0, [], len(weights) - 1
    for place, weight in enumerate(weights[:-1]):
        left = max(0.0, 1 - weight / rest) if rest > 0 else 0.0
        shares.append(min(1.0, left ** (count - place)))
        rest -= weight
    return shares
