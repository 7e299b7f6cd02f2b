"""The figures of studies: heat map over a grid, profile over layers. Numbers in, SVG text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from expunge.report import svg
from expunge.report.figures import Point, trade_off
from expunge.report.study_document import HeatMap, Plane, Profile
from expunge.report.text import compact, human, number

#: A profile whose largest value is this many times its smallest is drawn on a logarithmic axis.
_WIDE = 12.0


def heat_map(shown: HeatMap) -> Markup:
    """Cells from pale (0) to strong (1) with their numbers; bold where the rule is met, a frame around the best."""
    width, left, top, high = 300.0, 44.0, 38.0, 27.0
    wide = min(92.0, (width - left - 4) / max(1, len(shown.columns)))
    parts = [
        svg.label(left, 13, shown.column_name, class_="axis-name"),
        svg.label(0, 13, shown.row_name, class_="tick"),
    ]
    for column, name in enumerate(shown.columns):
        parts.append(svg.label(left + (column + 0.5) * wide, top - 7, name, "middle", "tick"))
    for row, name in enumerate(shown.rows):
        parts.append(svg.label(left - 8, top + (row + 0.5) * high + 4, name, "end", "tick"))
    order = [(row, column) for row in range(len(shown.rows)) for column in range(len(shown.columns))]
    order.sort(key=lambda place: place == shown.best)  # its frame lies over the neighbours
    for row, column in order:
        box = (left + column * wide, top + row * high, wide, high)
        parts.append(_cell(shown, row, column, box))
    height = top + high * len(shown.rows) + 3
    return svg.picture(width, height, _said(shown), *parts, class_="figure heat-map")


def _cell(shown: HeatMap, row: int, column: int, box: tuple[float, float, float, float]) -> Markup:
    x, y, wide, high = box
    value = shown.values[row][column]
    where = f"{shown.row_name} {shown.rows[row]}, {shown.column_name} {shown.columns[column]}"
    inner = (x + 1, y + 1, wide - 2, high - 2)
    if value is None:
        failed = (row, column) in shown.failed
        words = f"{where}: {'training broke off' if failed else 'not measured'}"
        text = svg.label(x + wide / 2, y + high / 2 + 4, "✕" if failed else "–", "middle", "tick")
        return svg.group(svg.rect(*inner, "band", 2), text, title=words)
    met = (row, column) in shown.eligible
    best = (row, column) == shown.best
    depth = min(1.0, max(0.0, value))
    fill = svg.element(
        "rect",
        **dict(zip(("x", "y", "width", "height"), inner, strict=True)),
        rx=2,
        class_=f"cell {shown.good}",
        style=f"--v:{depth:.3f}",
    )
    text = svg.label(x + wide / 2, y + high / 2 + 4, f"{value:.2f}", "middle", f"value{' met' if met else ''}")
    frame = [svg.rect(*inner, "chosen", 2)] if best else []
    note = ", chosen" if best else ", meets the rule" if met else ""
    return svg.group(fill, text, *frame, title=f"{where}: {shown.measure} {number(value)}{note}")


def _said(shown: HeatMap) -> str:
    known = [value for line in shown.values for value in line if value is not None]
    span = f"{number(min(known))} to {number(max(known))}" if known else "nothing measured"
    said = f"{shown.title}: {shown.measure} over {shown.row_name} and {shown.column_name}, {span}"
    if shown.best is not None:
        row, column = shown.best
        said += f"; chosen: {shown.row_name} {shown.rows[row]}, {shown.column_name} {shown.columns[column]}"
    return said


@dataclass(frozen=True, slots=True)
class LogScale:
    """A logarithmic map from positive data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a positive value; values outside the domain stay at its edge."""
        inner = svg.Scale(math.log(self.low), math.log(self.high), self.start, self.end)
        return inner(math.log(max(value, self.low)))


def profile(shown: Profile) -> Markup:
    """Curves over positions, with dots where the study looked; logarithmic where the values span much."""
    width, height, right = 520.0, 300.0, 62.0
    values = [value for curve in shown.curves.values() for value in curve if value > 0]
    if not values or not shown.x:
        return Markup("")
    every = [*values, *(level for level in shown.levels.values() if level > 0)]
    logarithmic = max(every) / min(every) > _WIDE
    y_low, y_high = (min(every) / 1.15, max(every) * 1.15) if logarithmic else (0.0, max(every) * 1.06)
    x = svg.Scale(min(shown.x), max(shown.x), 58, width - right)
    y = (LogScale if logarithmic else svg.Scale)(y_low, y_high, height - 48, 12)
    marks = log_ticks(y_low, y_high) if logarithmic else svg.ticks(y_low, y_high, 5)
    whole = [mark for mark in svg.ticks(min(shown.x), max(shown.x), 8) if mark == int(mark)]
    parts = [svg.axis_y(y, x.start, marks, x.end), svg.axis_x(x, y.start, whole)]  # type: ignore[arg-type]
    for name, level in shown.levels.items():
        words = f"{name}: {number(level)}"
        parts.append(svg.group(svg.line(x.start, y(level), x.end, y(level), "level"), title=words))
    ends: list[tuple[float, str, str]] = []
    for name, curve in shown.curves.items():
        kind = "forget" if name.startswith("forget") else "retain" if name.startswith("retain") else "loss"
        points = [(x(a), y(b)) for a, b in zip(shown.x, curve, strict=True)]
        parts.append(svg.polyline(points, f"curve c-{kind}"))
        for at, value in zip(shown.x, curve, strict=True):
            if at in shown.marked:
                dot = svg.element("circle", cx=x(at), cy=y(value), r=4, class_=f"dot c-{kind}")
                parts.append(svg.group(dot, title=f"{shown.x_name} {compact(at)}: {human(name)} {number(value)}"))
        ends.append((points[-1][1], name, f"name t-{kind}"))
    ends += [(y(level), name, "name") for name, level in shown.levels.items()]
    for at, name, class_ in _apart(ends, 14.0):
        parts.append(svg.label(x.end + 6, at + 4, name, class_=class_))
    parts.append(svg.label((x.start + x.end) / 2, height - 10, shown.x_name, "middle", "axis-name"))
    turned = svg.label(0, 0, shown.y_name, "middle", "axis-name")
    middle = (y.start + y.end) / 2
    parts.append(svg.element("g", turned, transform=f"translate(13 {middle:.0f}) rotate(-90)"))
    spans = (f"{human(name)} {number(min(curve))} to {number(max(curve))}" for name, curve in shown.curves.items())
    return svg.picture(width, height, f"{shown.title}. {'; '.join(spans)}", *parts, class_="figure profile")


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; the powers alone where those would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    made = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [mark for mark in made if low <= mark <= high]


def _apart(places: Sequence[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """The same labels, pushed down where one would cover another."""
    moved: list[tuple[float, str, str]] = []
    for at, name, class_ in sorted(places):
        moved.append((max(at, moved[-1][0] + gap) if moved else at, name, class_))
    return moved


def plane(shown: Plane) -> Markup:
    """Forget against retain, with the front of what nothing dominates."""
    points = []
    for spot in shown.spots:
        (x_low, x_high), (y_low, y_high) = spot.x_ends or (None, None), spot.y_ends or (None, None)
        points.append(Point(spot.name, spot.role, spot.x, spot.y, x_low, x_high, y_low, y_high))
    return trade_off(points, 1.0, shown.retain_at_least, retain=shown.retain_name, front=shown.front)


def draw(figure: HeatMap | Profile | Plane) -> Markup:
    """The picture of a figure."""
    if isinstance(figure, HeatMap):
        return heat_map(figure)
    return profile(figure) if isinstance(figure, Profile) else plane(figure)
