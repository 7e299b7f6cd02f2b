"""A page as data: what a study, an attack, a calibration, an audit or an evaluation found, drawn by one template.

No torch, no run: numbers and words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from expunge.errors import UserError
from expunge.recipe.base import Frozen
from expunge.report.figure_data import Figure
from expunge.report.judgement import Verdict

#: File → kind of what was found. These files hold a whole Document.
STUDY, AUDIT = "study.json", "audit.json"
SCHEMA = "expunge.document/1"
Kind = Literal["study", "attack", "calibration", "evaluation", "audit", "search", "localization"]


class TableCell(Frozen):
    """Text of a cell, smaller lines under it, its shade (grey: says nothing), and spans to be marked."""

    text: str
    under: str = ""
    note: str = Field("", description="a last smaller line, for a warning")
    shade: Literal["", "best", "worst", "grey"] = ""
    marked: list[tuple[int, int]] = Field(default_factory=list, description="spans of `text` inside <mark>")


class TableRow(Frozen):
    """One row; the first cell is its head. `role` colours it as the figures do."""

    cells: list[TableCell]
    role: str = ""


class Column(Frozen):
    """Head of a column, and what it means."""

    label: str
    hint: str = ""
    number: bool = True
    under: str = ""
    arrow: Literal["", "↓", "↑"] = Field("", description="the better direction")


class Table(Frozen):
    """A table; a long one is folded away until it is asked for, one of whole texts is set for reading."""

    title: str = ""
    words: str = Field("", description="beside the title")
    columns: list[Column]
    rows: list[TableRow]
    notes: list[str] = Field(default_factory=list, description="small sentences below")
    folded: bool = False
    group: str = Field("", description="neighbours of one group are folded away together under this title")
    texts: bool = False


class Section(Frozen):
    """A heading with words, figures side by side, and tables."""

    title: str
    lead: str = ""
    figures: list[Figure] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    words: list[str] = Field(default_factory=list, description="paragraphs after figures and tables")
    glossary: list[tuple[str, str]] = Field(default_factory=list, description="name → meaning, folded away")


class Document(Frozen):
    """From question to answer."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.document/1"] = Field("expunge.document/1", alias="schema")
    kind: Kind = "study"
    name: str
    summary: str = ""
    paper: str = ""
    answer: str = Field(description="one sentence")
    rule: str = Field("", description="how the answer was chosen, fixed before anything was measured")
    remarks: list[str] = Field(default_factory=list, description="what else a reader should know at once")
    verdicts: list[Verdict] = Field(default_factory=list)
    planned: int = 0
    done: int = 0
    facts: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    command: str = Field("", description="what makes it again; that of run.json when empty")
    sections: list[Section] = Field(default_factory=list)
    left_out: dict[str, str] = Field(default_factory=dict, description="what was not measured → why")
    limits: list[str] = Field(default_factory=list)
    results: dict[str, Any] = Field(default_factory=dict, description="the same for machines")

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, data: Any) -> Any:
        """study.json of earlier versions had a schema of its own and called the name `study`."""
        if isinstance(data, dict) and data.get("schema") == "expunge.study/1":
            rest = {key: value for key, value in data.items() if key not in ("schema", "study")}
            return {**rest, "kind": "study", "name": data.get("study")}
        return data

    def to_json(self) -> dict[str, Any]:
        """Plain data, for study.json and audit.json."""
        return self.model_dump(mode="json", by_alias=True)


def read_document(folder: Path, name: str = STUDY) -> Document:
    """The document that a folder holds in file `name`. Raises UserError where there is none, or it can't be read."""
    path = Path(folder) / name
    kind = name.removesuffix(".json")
    if not path.is_file():
        hints = {STUDY: "expunge study NAME --model MODEL -o DIR", AUDIT: "expunge audit --help"}
        raise UserError(f"no {kind} at {folder} (no {name})", f"make one with: {hints.get(name, 'expunge --help')}")
    try:
        return Document.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", f"run the same {kind} again: it writes the file anew") from None
