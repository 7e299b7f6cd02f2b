"""study.json: what a study found, as data that the page is drawn from. No torch, no run: numbers and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.model import Frozen

NAME = "study.json"
SCHEMA = "expunge.study/1"

Cell = tuple[int, int]  # row, column


class HeatMap(Frozen):
    """One measure in [0, 1] over a grid; None where nothing was measured."""

    kind: Literal["heat_map"] = "heat_map"
    title: str
    measure: str
    good: Literal["low", "high"]
    row_name: str
    rows: list[str]
    column_name: str
    columns: list[str]
    values: list[list[float | None]]  # rows × columns
    eligible: list[Cell] = Field(default_factory=list, description="cells that meet the rule")
    failed: list[Cell] = Field(default_factory=list, description="cells whose training broke off")
    best: Cell | None = None


class Profile(Frozen):
    """Positive numbers over positions, a curve per name; `levels` are horizontal lines to compare them with."""

    kind: Literal["profile"] = "profile"
    title: str
    x_name: str
    y_name: str
    x: list[float]
    curves: dict[str, list[float]]
    levels: dict[str, float] = Field(default_factory=dict)
    marked: list[float] = Field(default_factory=list, description="positions that carry a dot")


class Spot(Frozen):
    """One model in the plane of forget and retain, with the ends of its whiskers where known."""

    name: str
    role: Literal["result", "specialist", "target", "reference", "original"]
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


class Plane(Frozen):
    """Forget (lower is better) against retain (higher is better); `front` joins the names that nothing dominates."""

    kind: Literal["plane"] = "plane"
    title: str
    retain_name: str
    spots: list[Spot]
    front: list[str] = Field(default_factory=list)
    retain_at_least: float | None = None
    words: list[str] = Field(default_factory=list, description="paragraphs beside the figure")


class TableCell(Frozen):
    """Text of a cell, a smaller line under it, and its shade."""

    text: str
    under: str = ""
    shade: Literal["", "best", "worst"] = ""


class TableRow(Frozen):
    """One row; the first cell is its head. `role` colours it as the figures do."""

    cells: list[TableCell]
    role: str = ""


class Column(Frozen):
    """Head of a column, and what it means."""

    label: str
    hint: str = ""
    number: bool = True


class Table(Frozen):
    """A table; a long one is folded away until it is asked for."""

    title: str = ""
    columns: list[Column]
    rows: list[TableRow]
    folded: bool = False


Figure = Annotated[HeatMap | Profile | Plane, Field(discriminator="kind")]


class Section(Frozen):
    """A heading with words, figures side by side, and tables."""

    title: str
    lead: str = ""
    figures: list[Figure] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)


class StudyDocument(Frozen):
    """A study from question to answer."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.study/1"] = Field("expunge.study/1", alias="schema")
    study: str
    summary: str
    paper: str
    answer: str = Field(description="one sentence")
    rule: str = Field(description="how the answer was chosen, fixed before anything was measured")
    remarks: list[str] = Field(default_factory=list, description="what else a reader should know at once")
    planned: int
    done: int
    facts: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    sections: list[Section] = Field(default_factory=list)
    limits: list[str] = Field(default_factory=list)
    results: dict[str, Any] = Field(default_factory=dict, description="the same for machines")

    def to_json(self) -> dict[str, Any]:
        """Plain data of study.json."""
        return self.model_dump(mode="json", by_alias=True)


def read_study(folder: Path) -> StudyDocument:
    """The study of a run directory. Raises UserError where there is none, or where it can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(f"no study at {folder} (no {NAME})", "make one with: expunge study NAME --model MODEL -o DIR")
    try:
        return StudyDocument.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", "run the same study again: it writes the file anew") from None


def holds_study(folder: Path) -> bool:
    """Whether a run directory is a study's."""
    return (Path(folder) / NAME).is_file()
