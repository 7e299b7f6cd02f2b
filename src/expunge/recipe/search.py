"""The search of a merge: what is aimed at, what has to be kept, and among which merges it chooses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AllowInfNan, BeforeValidator, Field, model_validator

from expunge.recipe.base import Density, Frozen, Name, Positive

_AIM = re.compile(
    r"^(?:(?P<weight>[^*:]+)\*)?(?P<split>[^:*=<>]+):(?P<metric>[^:=<>]+?)(?P<side><=|>=|=)(?P<value>[^=<>]+)$"
)
_KEEP = re.compile(r"^(?P<split>[^:=<>]+):(?P<metric>[^:=<>]+)=(?P<part>[^=<>]+)$")

Finite = Annotated[float, AllowInfNan(False)]


class Aim(Frozen):
    """A value that a metric of a split is to have: `forget:mia_loss=0.5`, `2*forget:extraction_strength<=reference`."""

    split: Name
    metric: str
    value: Finite | Literal["reference"] = Field(description="a number, or `reference`: what the reference has")
    side: Literal["=", "<=", ">="] = Field("=", description="<= and >= are met on that side, too")
    weight: Positive = Field(1.0, description="of the distance, among several aims")

    def distance(self, found: float, wanted: float) -> float:
        """How far a value is from what is wanted; 0 where the aim is met."""
        away = found - wanted
        return max(0.0, away) if self.side == "<=" else max(0.0, -away) if self.side == ">=" else abs(away)

    def __str__(self) -> str:
        """As it is typed."""
        weight = f"{self.weight:g}*" if self.weight != 1 else ""
        value = self.value if isinstance(self.value, str) else f"{self.value:g}"
        return f"{weight}{self.split}:{self.metric}{self.side}{value}"


class Keep(Frozen):
    """The part of the target's value that a metric of a split must keep: `retain:extraction_strength=0.95`."""

    split: Name
    metric: str
    part: Positive

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.split}:{self.metric}={self.part:g}"


def _aim_from_string(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _AIM.match(re.sub(r"\s", "", value))
    if match is None:
        raise ValueError(f"'{value}' is not of the form SPLIT:METRIC=VALUE, e.g. forget:mia_loss=0.5")
    found: dict[str, Any] = {name: part for name, part in match.groupdict().items() if part is not None}
    if found["value"] != "reference":
        found["value"] = _number(found["value"], value)
    return found


def _keep_from_string(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _KEEP.match(re.sub(r"\s", "", value))
    if match is None:
        raise ValueError(f"'{value}' is not of the form SPLIT:METRIC=PART, e.g. retain:extraction_strength=0.95")
    return match.groupdict()


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"'{whole}': {text} is neither a number nor `reference`") from None


Range = tuple[Finite, Finite]
Chosen = Literal["weights", "density", "scale"]


class SearchConfig(Frozen):
    """Weights, density and scale of a merge, and which method, chosen on rows: aims are minimised, keeps must hold."""

    trials: int = Field(40, ge=0, description="merges that Optuna tries; 0: only the line between two models")
    minutes: Positive | None = Field(None, description="no trial begins after this time; no limit when absent")
    aims: list[Annotated[Aim, BeforeValidator(_aim_from_string)]] = Field(
        default_factory=list,
        description="such as forget:mia_loss=0.5 (=, <= or >=; a number or reference); a distance of 0 is best. When "
        "absent: AUC of the loss 0.5 where there are holdout rows, else forget extraction strength 0",
    )
    keep: list[Annotated[Keep, BeforeValidator(_keep_from_string)]] = Field(
        default_factory=list,
        description="such as retain:extraction_strength=0.95: at least that part of the target's; this one when absent",
    )
    methods: list[str] = Field(
        default_factory=list, description="methods to choose among; that of the merge, and linear, when absent"
    )
    over: list[Chosen] = Field(
        default_factory=lambda: list(get_args(Chosen)),
        description="what is chosen; the rest is as the merge says",
    )
    density: tuple[Density, Density] = Field((0.1, 1.0), description="least and largest density that is tried")
    scale: Range = Field((0.25, 1.5), description="least and largest scale (λ) that is tried; the weights sum to 1")
    line: bool = Field(True, description="of two models, begin with bisection on the line between them")
    holdout: Name | None = Field(
        None,
        description="split that stands for the holdout rows in AUCs; another one than `holdout` where there is one",
    )
    limit: int | None = Field(None, gt=0, description="rows of each split; all when absent")
    memory: float = Field(2.0, ge=0, description="GB for the models' differences; where they don't fit, files are read")
    seed: int = Field(0, ge=0, description="of Optuna's sampler")

    @model_validator(mode="after")
    def _sensible(self) -> SearchConfig:
        for name in ("density", "scale"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(f"{name}: {low:g} is not below {high:g}")
        if self.trials == 0 and not self.line:
            raise ValueError("trials: 0 leaves the line alone, and line is false: nothing would be searched")
        if self.trials and not self.over:
            raise ValueError("over: nothing is left to choose; name weights, density or scale")
        for what, entries in (("aims", self.aims), ("keep", self.keep)):
            places = [(entry.split, entry.metric) for entry in entries]
            twice = next((place for place in places if places.count(place) > 1), None)
            if twice:
                raise ValueError(f"{what}: {twice[0]}:{twice[1]} stands there twice")
        return self
