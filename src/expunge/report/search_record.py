"""search.json: which merges were tried, on which rows, what each measured, and which one was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.base import Frozen

NAME, PAGE = "search.json", "search.html"


class Estimate(Frozen):
    """A metric of a split, with its interval over rows."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unscored: int = 0


class Tried(Frozen):
    """A measured model: the target, the reference, one input alone, a point of the line, or a trial."""

    kind: Literal["target", "reference", "input", "line", "trial"]
    method: str = ""
    weights: list[Any] = Field(default_factory=list)
    density: Any = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="of the method; scale is λ")
    at: float | None = Field(None, description="t of base + (1 − t) Δ under + t Δ over")
    values: dict[str, Estimate] = Field(default_factory=dict, description="split:metric → what was measured")
    distance: float | None = Field(None, description="weighted sum over the aims; 0 meets them all")
    kept: dict[str, float] = Field(default_factory=dict, description="split:metric → part of the target's value")
    shortfall: float = Field(0.0, description="sum over the constraints of the part that is lacking; 0: all are met")
    failed: str = Field("", description="why nothing could be measured")
    seconds: float = 0.0

    @property
    def met(self) -> bool:
        """Whether every constraint holds."""
        return not self.failed and self.distance is not None and self.shortfall == 0


class Line(Frozen):
    """The line between two models: which one forgets less, and where the first aim is met."""

    under: int = Field(description="place among the models, from 0")
    over: int
    at: float = Field(description="t of the best point of the line")
    bracketed: bool = Field(description="whether the first aim lies between what the two models have")
    tried: int = Field(description="place of that point among the tried")


class Search(Frozen):
    """A search in numbers."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.search/1"] = Field("expunge.search/1", alias="schema")
    expunge: str
    base: str
    models: list[str]
    reference: str | None = None
    aims: list[str]
    keep: list[str]
    wanted: dict[str, float] = Field(description="split:metric → the number that is aimed at")
    least: dict[str, float] = Field(description="split:metric → the least value that keeps enough")
    methods: list[str]
    over: list[str] = Field(description="what was chosen")
    rows: dict[str, int] = Field(description="rows of each split that were looked at")
    against: str | None = None
    unused: list[str] = Field(default_factory=list, description="splits that the search did not look at")
    tried: list[Tried]
    chosen: int = Field(description="place among the tried")
    line: Line | None = None
    trials: int = Field(description="trials that were asked for")
    minutes: float | None = None
    seed: int
    dtype: str
    convention: str
    notes: list[str] = Field(default_factory=list)
    answer: str = Field(description="what was found, in a sentence")
    inputs: str = Field("", description="digest of models and rows")

    @property
    def best(self) -> Tried:
        """What was chosen."""
        return self.tried[self.chosen]

    @property
    def target(self) -> Tried:
        """The base, by which keeping is judged."""
        return next(one for one in self.tried if one.kind == "target")

    def to_json(self) -> dict[str, Any]:
        """Plain data of search.json."""
        return self.model_dump(mode="json", by_alias=True)


def holds_search(folder: Path) -> bool:
    """Whether a folder holds the result of a search."""
    return (Path(folder) / NAME).is_file()


def read_search(folder: Path) -> Search:
    """The search of a folder. Raises UserError where there is none, or where it can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(f"no search at {folder} (no {NAME})", "make one: expunge merge A B --base T --search -o OUT")
    try:
        return Search.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", "run the same search again: it writes the file anew") from None
