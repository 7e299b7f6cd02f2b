"""The record beside a mask: by what a part of a model was chosen, on which rows, and where in the model it lies.

A mask `NAME.safetensors` has the pooled scores of every unit in `NAME.scores.safetensors`, this record in `NAME.json`
and its page in `NAME.html`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.base import Frozen

SCHEMA = "expunge.localization/1"
SUFFIX = ".safetensors"


class Place(Frozen):
    """The units of one module in one layer: how many there are and are chosen, and their mean score."""

    layer: int | None = Field(description="decoder layer, from 0; None: outside the layers")
    module: str
    units: int
    chosen: int
    score: float | None = Field(None, description="mean of the units' scores; None: not attributed to")
    highest: float | None = Field(None, description="highest score of a unit")

    @property
    def part(self) -> float:
        """Part of the units that is chosen."""
        return self.chosen / self.units


class Rows(Frozen):
    """Rows of a split that the attribution read."""

    rows: int
    tokens: int = Field(description="supervised tokens")
    digest: str


class Agreement(Frozen):
    """How well the choice agrees with a known region of the same units; None where nothing could be compared."""

    file: str = Field("", description="the mask of the region")
    units: int = Field(description="units inside the region")
    precision: float | None = Field(description="part of the chosen units that lies inside the region")
    recall: float | None = Field(description="part of the region's units that is chosen")
    overlap: float | None = Field(description="units inside both over units inside either (Jaccard)")
    auc: float | None = Field(description="probability that a unit inside scores higher than one outside")
    chance: float = Field(description="part of all units that is inside: the precision of a random choice")


class Localization(Frozen):
    """What was chosen, in numbers."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.localization/1"] = Field("expunge.localization/1", alias="schema")
    expunge: str
    model: str
    model_digest: str
    mask: str = Field(description="name of the mask's file")
    mask_digest: str
    by: str
    control: bool = Field(False, description="the attribution does not look for the knowledge")
    paper: str = "-"
    parameters: dict[str, Any] = Field(default_factory=dict, description="settings of the attribution")
    unit: str
    density: float
    strata: str
    seed: int
    rows: dict[str, Rows] = Field(default_factory=dict, description="split → what was read of it")
    weights: int = Field(description="weights of the model")
    inside: int = Field(description="weights that may change")
    places: list[Place]
    against: Agreement | None = None
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    command: str = ""
    answer: str = Field(description="what was chosen, in a sentence")

    @property
    def units(self) -> int:
        """Units of this kind in the model."""
        return sum(place.units for place in self.places)

    @property
    def chosen(self) -> int:
        """Units that were chosen."""
        return sum(place.chosen for place in self.places)

    def to_json(self) -> dict[str, Any]:
        """Plain data of the file beside the mask."""
        return self.model_dump(mode="json", by_alias=True)


def beside(mask: Path) -> dict[str, Path]:
    """What lies beside a mask: scores, record and page."""
    stem = Path(mask).name.removesuffix(SUFFIX)
    names = {"scores": f"{stem}.scores{SUFFIX}", "record": f"{stem}.json", "page": f"{stem}.html"}
    return {kind: Path(mask).with_name(name) for kind, name in names.items()}


def holds_localization(record: Path) -> bool:
    """Whether a file is the record of a localization."""
    try:
        content = json.loads(Path(record).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def read_localization(record: Path) -> Localization:
    """The record of a localization. Raises UserError where there is none, or where it can't be read."""
    path = Path(record)
    if not path.is_file():
        hint = "make one: expunge localize MODEL --forget ROWS -o mask.safetensors"
        raise UserError(f"no localization at {path}", hint)
    try:
        return Localization.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", "run the same command again: it writes the file anew") from None
