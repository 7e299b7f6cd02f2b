"""What an attribution is, what it may look at, what it declares about itself, and how it is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from expunge.registry import Registry
from expunge.settings import build, described_settings, setting, with_settings

if TYPE_CHECKING:
    from expunge.localize.evidence import Evidence

#: Parameter name → scores that broadcast to its shape, float32: larger means more to do with the forget rows.
#: Parameters that are missing are not attributed to, and are never chosen.
Saliency = Mapping[str, Tensor]

#: How the scores of a unit's weights become the unit's: their mean, or the mean of the largest tenth of them.
Pool = Literal["mean", "top"]


@dataclass(frozen=True)
class AttributionDeclaration:
    """What docs, CLI and study need to know of an attribution without running it."""

    name: str
    idea: str  # in about ten words
    formula: str
    paper: str  # arXiv id or "-"
    needs: tuple[str, ...] = ()  # beside the model: forget, retain, region (a mask that is known)
    pool: Pool = "mean"
    #: units that it can tell apart; empty: all
    units: tuple[str, ...] = ()
    control: bool = False  # it does not look for the knowledge: what others are compared with
    #: where a choice that a known region bounds has to stay; "": anywhere
    side: Literal["", "inside", "outside"] = ""


class Attribution(ABC):
    """Base of every attribution: a frozen dataclass of settings with a `saliency`."""

    about: ClassVar[AttributionDeclaration]

    @abstractmethod
    def saliency(self, evidence: Evidence) -> Saliency:
        """Scores of the parameters that the units are made of. Raises UserError for what the model lacks."""

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Label → text, for `expunge list attributions` and the generated tables."""
        about = cls.about
        described = {
            "summary": about.idea,
            "score": about.formula,
            "needs": ", ".join(about.needs) or "the model alone",
            "units": ", ".join(about.units) or "all",
            "paper": about.paper,
        }
        return described | described_settings(cls)


ATTRIBUTIONS: Registry[type[Attribution]] = Registry("attribution", "expunge.localize")


def attribution(**declared: Any) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: file a dataclass of settings with a `saliency` under its name."""

    def register(cls: type[Any]) -> type[Any]:
        made: Any = with_settings(cls)
        made.about = AttributionDeclaration(**declared)
        ATTRIBUTIONS.register(made.about.name)(made)
        return made

    return register


def build_attribution(name: str, parameters: Mapping[str, Any]) -> Attribution:
    """The attribution with its settings. Raises UserError for an unknown name, key or value."""
    return build("attribution", name, ATTRIBUTIONS.get(name), parameters)


__all__ = [
    "ATTRIBUTIONS",
    "Attribution",
    "AttributionDeclaration",
    "Pool",
    "Saliency",
    "attribution",
    "build_attribution",
    "setting",
]
