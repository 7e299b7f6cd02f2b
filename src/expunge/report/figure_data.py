"""What figures show, as plain data: numbers and names, drawn by `drawing` when a page is made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expunge.recipe.base import Frozen

Cell = tuple[int, int]  # row, column
#: The part that a model plays; it decides colour and shape. The reference is the control: its lines are dashed.
Role = Literal["result", "specialist", "target", "reference", "original", "other"]
#: What a curve may be beside a model: a measure on rows to forget, the same asked in other words, on rows to keep.
LineRole = Role | Literal["forget", "paraphrase", "retain", "retain_paraphrase"]
Scaling = Literal["linear", "log", "even"]


class _Figure(Frozen):
    """A title above and sentences below."""

    title: str
    words: list[str] = Field(default_factory=list, description="sentences beside or below the figure")


class HeatMap(_Figure):
    """One measure over a grid; None where nothing was measured. Shades run over [0, 1]."""

    kind: Literal["heat_map"] = "heat_map"
    measure: str
    good: Literal["low", "high"]
    row_name: str
    rows: list[str]
    column_name: str
    columns: list[str]
    values: list[list[float | None]]  # rows × columns
    eligible: list[Cell] = Field(default_factory=list, description="cells that meet the rule")
    failed: list[Cell] = Field(default_factory=list, description="cells whose training broke off")
    uninformative: list[Cell] = Field(default_factory=list, description="cells that say nothing: grey, with a number")
    best: Cell | None = None


class Heat(_Figure):
    """One measure over many small cells without numbers, with a legend of its colours; None: not measured.

    Shades run over [low, high], what lies outside has the last one; where `middle` is given, two colours part there.
    """

    kind: Literal["heat"] = "heat"
    measure: str
    row_name: str
    rows: list[str]
    column_name: str
    columns: list[str]
    values: list[list[float | None]]  # rows × columns
    low: float = 0.0
    high: float = 1.0
    middle: float | None = Field(None, description="above it one colour, below it another")
    turned: bool = Field(False, description="the colours change sides: for a measure that is better when it is low")

    @model_validator(mode="after")
    def _rectangular(self) -> Heat:
        if len(self.values) != len(self.rows) or any(len(line) != len(self.columns) for line in self.values):
            raise ValueError(f"heat map {self.title}: values are not rows × columns")
        if not self.low <= (self.low if self.middle is None else self.middle) <= self.high:
            raise ValueError(f"heat map {self.title}: the middle does not lie between low and high")
        return self


class Profile(_Figure):
    """Positive numbers over positions, a curve per name; `levels` are horizontal lines to compare them with."""

    kind: Literal["profile"] = "profile"
    x_name: str
    y_name: str
    x: list[float]
    curves: dict[str, list[float]]
    levels: dict[str, float] = Field(default_factory=dict)
    marked: list[float] = Field(default_factory=list, description="positions that carry a dot")


class Spot(Frozen):
    """One model in the plane of forget and retain, with the ends of its whiskers where known."""

    name: str
    role: Role
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


class Plane(_Figure):
    """Forget (lower is better) against retain (higher is better); `front` joins the names that nothing dominates."""

    kind: Literal["plane"] = "plane"
    retain_name: str
    spots: list[Spot]
    front: list[str] = Field(default_factory=list)
    retain_at_least: float | None = None


class Line(Frozen):
    """One subject's curve, with the ends of each point's interval where known."""

    name: str
    role: LineRole = "result"
    x: list[float]
    y: list[float | None]
    low: list[float | None] = Field(default_factory=list)
    high: list[float | None] = Field(default_factory=list)

    @model_validator(mode="after")
    def _same_length(self) -> Line:
        if len(self.y) != len(self.x) or any(len(ends) not in (0, len(self.x)) for ends in (self.low, self.high)):
            raise ValueError(f"line {self.name}: x, y, low and high differ in length")
        return self


class Curves(_Figure):
    """Curves with their intervals as bands: robustness against budget, leak@k, a τ-curve (`filled`).

    `x_scale` even puts the positions at equal distances, named by `x_labels` or their numbers.
    """

    kind: Literal["curves"] = "curves"
    x_name: str
    y_name: str
    lines: list[Line]
    x_scale: Scaling = "linear"
    x_labels: dict[str, str] = Field(default_factory=dict, description="position (as %g) → its name under the axis")
    y_range: tuple[float, float] | None = Field((0.0, 1.0), description="None: as the values need")
    filled: bool = Field(False, description="shade what lies under each curve")
    stepped: bool = Field(False, description="a value holds back to the position before it")
    levels: dict[str, float] = Field(default_factory=dict, description="horizontal lines, e.g. a threshold")
    marks: dict[str, float] = Field(default_factory=dict, description="vertical lines, e.g. where something is read")
    silent: list[float] = Field(default_factory=list, description="positions that say nothing: hollow grey dots")


class Stretch(Frozen):
    """An estimate with its interval; `silent` says nothing, whatever its number."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    state: Literal["yes", "no", "not shown", "silent"] = "not shown"
    hint: str = ""


class Forest(_Figure):
    """Estimates below each other on one axis, with the line that they are judged by."""

    kind: Literal["forest"] = "forest"
    x_name: str
    rows: list[Stretch]
    threshold: float
    threshold_name: str = "threshold"
    above: bool = Field(False, description="what lies right of the line passes, not what lies left of it")


class Sample(Frozen):
    """Values of one model, one per example."""

    name: str
    role: Role = "result"
    values: list[float]


class Distance(Frozen):
    """Where two empirical distribution functions lie furthest apart (Kolmogorov–Smirnov)."""

    first: str
    second: str
    statistic: float
    at: float


class Distributions(_Figure):
    """Empirical distribution functions, with the KS distance of two of them marked."""

    kind: Literal["distributions"] = "distributions"
    x_name: str
    samples: list[Sample]
    distance: Distance | None = None
    x_scale: Literal["linear", "log"] = "linear"


class RocLine(Frozen):
    """One receiver operating characteristic: rates in [0, 1], area and its standard error."""

    name: str
    role: Role = "result"
    false_positive: list[float]
    true_positive: list[float]
    auc: float
    error: float | None = None


class Roc(_Figure):
    """Members against non-members for every threshold, with the diagonal of a coin."""

    kind: Literal["roc"] = "roc"
    lines: list[RocLine]


class Dot(Frozen):
    """One model before and after."""

    name: str
    x: float
    y: float
    role: Role = "specialist"


class Scatter(_Figure):
    """The same measure before (x) and after (y), with the line on which nothing changes."""

    kind: Literal["scatter"] = "scatter"
    x_name: str
    y_name: str
    dots: list[Dot]
    scale: Literal["linear", "log"] = "linear"
    pearson: float | None = None
    spearman: float | None = None


AnyFigure = HeatMap | Heat | Profile | Plane | Curves | Forest | Distributions | Roc | Scatter
Figure = Annotated[AnyFigure, Field(discriminator="kind")]
