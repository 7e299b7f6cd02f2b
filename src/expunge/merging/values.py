"""Numbers per model that may differ from tensor to tensor: one number, a list over the layers, or a map of patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from expunge.errors import UserError
from expunge.models.names import layer_of, layers_in

#: A number for all tensors, numbers along the layers, or {pattern of parameter names: one of these, "default": …}.
Value = float | Sequence[float] | Mapping[str, "float | Sequence[float]"]

#: Key of a map for the tensors that no other pattern matches.
DEFAULT = "default"

# What comes before the first layer; heads that are called embeddings come after the last.
_INPUT = re.compile(r"embed(?!_out)|\bw[tp]e\b")


@dataclass(frozen=True)
class Values:
    """One value per model, for messages called `what`; `at` gives the numbers for a tensor."""

    what: str
    given: tuple[Value, ...]

    @classmethod
    def of(cls, what: str, given: Any, models: int, default: float) -> Values:
        """Checked: a value per model, or a single number or map for all. Raises UserError."""
        if given is None:
            return cls(what, (default,) * models)
        if isinstance(given, int | float | Mapping):
            given = [given] * models
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise UserError(f"{what} {given!r} is neither a number, a list nor a map", f"for instance: --{what} 1,0.5")
        if len(given) != models:
            counted = f"{len(given)} {'densities' if what == 'density' else what} for {models} models"
            raise UserError(counted, f"give one per model: --{what} 1,0.5; layers: a list within that list")
        return cls(what, tuple(_checked(what, value) for value in given))

    def at(self, name: str, layers: int) -> list[float]:
        """The number of each model for a parameter of a model with so many layers. Raises UserError for a bad list."""
        return [_at(self.what, value, name, layers) for value in self.given]

    @property
    def numbers(self) -> list[float]:
        """Every number that is given, whatever it is for."""
        return [number for value in self.given for number in _numbers(value)]

    @property
    def uniform(self) -> list[float] | None:
        """The number per model, if each has one for all its tensors."""
        return None if any(not isinstance(value, float) for value in self.given) else [*map(float, self.given)]  # type: ignore[arg-type]

    @property
    def rows(self) -> list[list[float]]:
        """The numbers of all models, layer by layer, as far as no map leaves open which of them meet."""
        if any(isinstance(value, Mapping) for value in self.given):
            return []
        layers = max((len(value) for value in self.given if isinstance(value, tuple)), default=1)
        columns = [value if isinstance(value, tuple) else (value,) * layers for value in self.given]
        return [list(row) for row in zip(*columns, strict=False)]  # lists of two lengths are refused with the layers

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError for a pattern that matches none of a model's parameters."""
        layers = layers_in(names)
        for value in self.given:
            for pattern in value if isinstance(value, Mapping) else ():
                if pattern != DEFAULT and not any(re.search(pattern, name) for name in names):
                    raise UserError(
                        f"{self.what}: no parameter matches {pattern}",
                        "patterns are regular expressions on names such as model.layers.7.mlp.down_proj.weight",
                    )
        for name in names:
            self.at(name, layers)

    def to_json(self) -> list[Any]:
        """As it was given."""
        return [dict(value) if isinstance(value, Mapping) else value for value in self.given]


def _checked(what: str, value: Any) -> Value:
    if isinstance(value, bool) or not isinstance(value, int | float | Sequence | Mapping) or isinstance(value, str):
        raise UserError(f"{what}: {value!r} is neither a number, a list nor a map", "for instance: 0.5")
    if isinstance(value, Mapping):
        for pattern in value:
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise UserError(f"{what}: '{pattern}' is not a regular expression: {error}", "see: pydoc re") from None
        if DEFAULT not in value:
            raise UserError(f"{what}: a map needs a number for all other parameters", "add: default: 1.0")
        return {str(pattern): _series(what, inner) for pattern, inner in value.items()}
    return _series(what, value)


def _series(what: str, value: Any) -> float | tuple[float, ...]:
    inner = (value,) if isinstance(value, int | float) else value
    plain = isinstance(inner, Sequence) and not isinstance(inner, str)
    if not plain or any(isinstance(number, bool) or not isinstance(number, int | float) for number in inner):
        raise UserError(f"{what}: {value!r} is no number and no list of numbers", "for instance: 0.5")
    numbers = tuple(float(number) for number in inner)
    if not numbers:
        raise UserError(f"{what}: a list over the layers is empty", "give a number per layer, or one for all")
    if not all(isfinite(number) for number in numbers):
        raise UserError(f"{what} must be finite, not {value!r}", f"for instance: --{what} 1,0.5")
    return numbers if inner is value else numbers[0]


def _numbers(value: Value) -> list[float]:
    if isinstance(value, Mapping):
        return [number for inner in value.values() for number in _numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else [float(number) for number in value]


def _at(what: str, value: Value, name: str, layers: int) -> float:
    if isinstance(value, Mapping):
        found = next((inner for key, inner in value.items() if key != DEFAULT and re.search(key, name)), value[DEFAULT])
        return _at(what, found, name, layers)
    if isinstance(value, int | float):
        return float(value)
    layer = layer_of(name)
    if len(value) != layers:
        raise UserError(
            f"{what}: {len(value)} numbers for a model of {layers} layers",
            "give one per layer, from the first to the last; the embedding takes the first, norm and head the last",
        )
    if layer is None:
        layer = 0 if _INPUT.search(name) else layers - 1
    return float(value[layer])
