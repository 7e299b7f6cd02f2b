"""What an objective is, what it declares about itself, and how it is registered."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from expunge.errors import UserError, did_you_mean
from expunge.registry import Registry

if TYPE_CHECKING:
    from expunge.methods.step import Step


@dataclass(frozen=True)
class Declaration:
    """What docs, CLI, trainer and tests need to know of an objective without running it."""

    name: str
    idea: str  # in about ten words
    formula: str
    paper: str  # arXiv id or "-"
    kind: str  # "removes" or "suppresses" the knowledge, as far as its literature shows
    reference: bool = False  # needs log-probs of the start model on the forget rows
    retain: bool = False  # can't do without retain rows
    nll: float = 0.0  # default weights of the retain terms
    kl: float = 0.0


class Objective(ABC):
    """Base of every objective: a frozen dataclass of hyper-parameters with a `loss`."""

    about: ClassVar[Declaration]

    @abstractmethod
    def loss(self, step: Step) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar; the trainer adds them up."""

    def check(self, model: nn.Module) -> None:  # noqa: B027  a hook: most objectives need nothing
        """Raise UserError before the first step if the model lacks what the objective needs."""

    def hidden_layer(self) -> int | None:
        """The decoder layer whose output the objective reads instead of logits; None for logits."""
        return None

    def trainable(self) -> list[str] | None:
        """Patterns (regular expressions) of the parameters that are trained by default; None for all."""
        return None

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Label → text, for `expunge list methods`, the docs and the report."""
        about = cls.about
        retain = " + ".join(f"{weight:g}·{term}" for term, weight in (("nll", about.nll), ("kl", about.kl)) if weight)
        needs = [
            label
            for label, needed in (("start model's log-probs", about.reference), ("retain rows", about.retain))
            if needed
        ]
        described = {
            "summary": about.idea,
            "loss": about.formula,
            "retain terms by default": retain or "none",
            "needs": ", ".join(needs) or "forget rows only",
            "kind": about.kind,
            "paper": about.paper,
        }
        fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
        for item in fields:
            described[f"parameter {item.name}"] = f"{item.default.default}: {item.default.description}"
        return described


OBJECTIVES: Registry[type[Objective]] = Registry("method", "expunge.methods")

#: A hyper-parameter: default, bounds and description; pydantic checks what a recipe gives.
hyper = Field


def objective(**declared: Any) -> Callable[[type[Any]], type[Objective]]:
    """Class decorator: file a dataclass of hyper-parameters with a `loss` under its name."""

    def register(cls: type[Any]) -> type[Objective]:
        made: Any = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
        made.about = Declaration(**declared)
        OBJECTIVES.register(made.about.name)(made)
        result: type[Objective] = made
        return result

    return register


def build_objective(name: str, parameters: Mapping[str, Any]) -> Objective:
    """The objective with its hyper-parameters. Raises UserError for an unknown name, key or value."""
    cls: Any = OBJECTIVES.get(name)
    valid = [item.name for item in dataclasses.fields(cls)]
    for key in parameters:
        if key not in valid:
            raise UserError(f"method {name} has no parameter '{key}'", did_you_mean(key, valid))
    try:
        built: Objective = TypeAdapter(cls).validate_python(dict(parameters))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"method {name}: {problems}", f"see: expunge list methods {name}") from None
    return built
