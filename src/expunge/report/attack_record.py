"""attack.json: what attacks got out of a model, beside what they get out of models that know and do not know.

A folder that `expunge attack` writes holds

    attack.json                                  this record, schema expunge.attack/1
    metrics.json                                 every record of every variant, in one list
    values.parquet                               per-example values, with the variants' names
    tables/SUBJECT/KIND/SPLIT.parquet            the models as they are
    tables/SUBJECT~ATTACK/LABEL/KIND/SPLIT.parquet   the same under a point of an attack

SUBJECT is model (the one in question), target (knew the forget rows) or reference (never saw them); KIND is scores,
generations or sampled (all samples of a sampling attack). The variant of a subject under a point is called
`SUBJECT~ATTACK-LABEL`. Where an attack asks a row in several ways, the table holds the one from which most was
extracted, and its column `candidate` says which.

`strength` is a metric's mean over the forget rows: extraction strength, or ROUGE-L recall where only texts are drawn.
`margin` is strength(model) − strength(reference) under the same point, row by row, with a bootstrap interval: a
reference learns under a training attack too, so that only the difference counts. A point at which the target itself
shows less than half of its own strength reads nothing: it is uninformative, and passing it is no evidence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from expunge.errors import UserError
from expunge.recipe.base import Frozen

NAME = "attack.json"
SCHEMA = "expunge.attack/1"

Verdict = Literal["yes", "no", "not shown"]


class Estimate(Frozen):
    """A mean over `n` rows and the ends of its 95% interval (None where there are too few rows)."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int


class Subject(Frozen):
    """A model that was attacked."""

    source: str = Field(description="as it was given: folder, hub id, alias")
    digest: str


class Dropped(Frozen):
    """What became of the rewritten prompts of the forget rows."""

    candidates: int = Field(0, description="prompts that contained the answer, and were not asked")
    rows: int = Field(0, description="rows for which no prompt was left")
    exempt: int = Field(0, description="rows whose own prompt contains the answer: nothing to keep from it")


class AttackPoint(Frozen):
    """An attack at one strength."""

    label: str
    budget: float = Field(description="its place on the x-axis, in the unit of the attack's `budget`")
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: dict[str, int] = Field(default_factory=dict, description="split → rows measured")
    strengths: dict[str, Estimate] = Field(default_factory=dict, description="subject → strength on the forget rows")
    retained: dict[str, Estimate] = Field(default_factory=dict, description="subject → the same on the retain rows")
    margin: Estimate | None = Field(None, description="model − reference, paired by row; None without a reference")
    recovered: Estimate | None = Field(None, description="model under the attack − model as it is, paired by row")
    informative: bool | None = Field(None, description="the target still shows what it knows; None without a target")
    verdict: Verdict = "not shown"
    dropped: Dropped = Dropped()
    notes: list[str] = Field(default_factory=list)
    records: list[dict[str, Any]] = Field(
        default_factory=list, description="every metric (RECORD_KEYS); `variant` is SUBJECT~ATTACK-LABEL"
    )


class AttackResult(Frozen):
    """An attack over all of its points, weakest first."""

    name: str
    idea: str
    paper: str
    kind: Literal["behaviour", "knowledge", "weights"]
    budget: str = Field(description="what the x-axis counts")
    settings: dict[str, Any] = Field(default_factory=dict)
    strength: str = Field(description="the metric behind `strengths`")
    before: AttackPoint = Field(description="the same rows without the attack, budget 0")
    points: list[AttackPoint]
    verdict: Verdict
    reason: str = Field(description="why, in a sentence")


class LeftOut(Frozen):
    """An attack, or one point of it, that could not be run."""

    attack: str
    point: str | None = None
    subject: str | None = None
    reason: str


class AttackRecord(Frozen):
    """All attacks on a model."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["expunge.attack/1"] = Field("expunge.attack/1", alias="schema")
    expunge: str
    seed: int
    convention: str
    subjects: dict[str, Subject] = Field(description="model, and target and reference where they were given")
    splits: dict[str, str] = Field(description="split → role")
    robust_margin: float = Field(description="Robust: the margin is at most this (thresholds.robust_margin)")
    records: list[dict[str, Any]] = Field(default_factory=list, description="the subjects without any attack")
    attacks: list[AttackResult]
    left_out: list[LeftOut] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    verdict: Verdict = Field(description="over all attacks: no if any is no, yes if all are yes")
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data of attack.json."""
        return self.model_dump(mode="json", by_alias=True)

    def attack(self, name: str) -> AttackResult:
        """The attack of that name. Raises KeyError."""
        for entry in self.attacks:
            if entry.name == name:
                return entry
        raise KeyError(name)


def read_attack(folder: Path) -> AttackRecord:
    """The attacks of a folder. Raises UserError where there are none, or where they can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(f"no attacks at {folder} (no {NAME})", "run some: expunge attack MODEL --forget FILE -o DIR")
    try:
        return AttackRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{path} can't be read", "run the same command again: it writes the file anew") from None


def holds_attack(folder: Path) -> bool:
    """Whether a folder was written by `expunge attack`."""
    return (Path(folder) / NAME).is_file()
