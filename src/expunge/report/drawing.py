"""The figures of documents: heat maps, profile over layers, plane. Numbers in, SVG text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from expunge.report import curves, svg
from expunge.report.document import Section
from expunge.report.figure_data import (
    AnyFigure,
    Curves,
    Distributions,
    Forest,
    Heat,
    HeatMap,
    Plane,
    Profile,
    Roc,
    Scatter,
)
from expunge.report.figures import Point, trade_off
from expunge.report.text import compact, human, number

#: A profile whose largest value is this many times its smallest is drawn on a logarithmic axis.
_WIDE = 12.0


def heat_map(shown: HeatMap) -> Markup:
    """Cells from pale (0) to strong (1) with their numbers; bold where the rule is met, a frame around the best.

    Grey cells say nothing. Long names of rows and columns widen it.
    """
    left = min(230.0, max(44.0, 14 + max((svg.text_width(name, 12) for name in shown.rows), default=0.0)))
    heads = [_folded(name) for name in shown.columns]
    needed = 8 + max((svg.text_width(part, 12) for head in heads for part in head), default=0.0)
    wide = max(min(92.0, (300.0 - left - 4) / max(1, len(heads))), min(130.0, max(needed, 40.0)))
    lines, high = max((len(head) for head in heads), default=1), 27.0
    width, top = max(300.0, left + wide * len(heads) + 4), 24.0 + 14 * lines
    parts = [
        svg.label(left, 13, shown.column_name, class_="axis-name"),
        svg.label(0, top - 7 if left > 60 else 13, shown.row_name, class_="tick"),
    ]
    for column, head in enumerate(heads):
        for line, name in enumerate(reversed(head)):
            parts.append(svg.label(left + (column + 0.5) * wide, top - 7 - 14 * line, name, "middle", "tick"))
    for row, name in enumerate(shown.rows):
        parts.append(svg.label(left - 8, top + (row + 0.5) * high + 4, name, "end", "tick"))
    order = [(row, column) for row in range(len(shown.rows)) for column in range(len(shown.columns))]
    order.sort(key=lambda place: place == shown.best)  # its frame lies over the neighbours
    for row, column in order:
        box = (left + column * wide, top + row * high, wide, high)
        parts.append(_cell(shown, row, column, box))
    height = top + high * len(shown.rows) + 3
    wider = " wider" if width > 300 else ""
    return svg.picture(width, height, _said(shown), *parts, class_=f"figure heat-map{wider}")


def _folded(name: str) -> list[str]:
    """A long name in two lines, cut at a blank or an underscore near its middle."""
    cuts = [index for index, letter in enumerate(name) if letter in " _"]
    if svg.text_width(name, 12) <= 60 or not cuts:
        return [name]
    cut = min(cuts, key=lambda index: abs(index - len(name) / 2))
    return [name[:cut], name[cut + 1 :]]


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
    if (row, column) in shown.uninformative:
        text = svg.label(x + wide / 2, y + high / 2 + 4, f"{value:.2f}", "middle", "value silent")
        words = f"{where}: {shown.measure} {number(value)}, says nothing"
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


#: Steps of colour in the legend of a heat map without numbers.
_STEPS = 24


def heat(shown: Heat) -> Markup:
    """Many small cells; their numbers show under the pointer, and a legend has the ends of the scale."""
    if not any(value is not None for line in shown.values for value in line):
        return Markup("")
    left = min(230.0, 12 + max((svg.text_width(name, 14) for name in shown.rows), default=0.0))
    wide, high, top = max(8.0, min(34.0, 420.0 / max(1, len(shown.columns)))), 20.0, 44.0
    right, bottom = left + wide * len(shown.columns), top + high * len(shown.rows)
    parts = _legend(shown, max(left, right - 168), right)
    for row, name in enumerate(shown.rows):
        parts.append(svg.label(left - 7, top + (row + 0.5) * high + 4, name, "end", "tick"))
    every = _every(shown.columns, wide)
    first = next((place for place, name in enumerate(shown.columns) if name.isdigit()), 0)
    for column, name in enumerate(shown.columns):
        if column < first or (column - first) % every == 0:
            parts.append(svg.label(left + (column + 0.5) * wide, bottom + 15, name, "middle", "tick"))
    for row, line in enumerate(shown.values):
        for column, value in enumerate(line):
            where = f"{shown.column_name} {shown.columns[column]}, {shown.rows[row]}: "
            words = where + ("not measured" if value is None else f"{shown.measure} {number(value)}")
            box = (left + column * wide + 0.5, top + row * high + 0.5, wide - 1, high - 1)
            parts.append(svg.group(_shaded(shown, value, box), title=words))
    parts.append(svg.label((left + right) / 2, bottom + 34, shown.column_name, "middle", "axis-name"))
    parts.append(svg.label(0, 13, shown.row_name, class_="axis-name"))
    known = [value for line in shown.values for value in line if value is not None]
    said = (
        f"{shown.measure} over {shown.row_name} and {shown.column_name}, {number(min(known))} to {number(max(known))}"
    )
    width = max(right + 12, 400.0)  # few columns are not blown up to the width of the page
    return svg.picture(width, bottom + 42, f"{shown.title}: {said}", *parts, class_="figure heat-map heat")


def _legend(shown: Heat, start: float, end: float) -> list[Markup]:
    """The scale from low to high above the cells, with its ends and its middle."""
    wide, parts = (end - start) / _STEPS, []
    for step in range(_STEPS):
        value = shown.low + (step + 0.5) / _STEPS * (shown.high - shown.low)
        parts.append(_shaded(shown, value, (start + step * wide, 6, wide + 0.3, 9), 0))
    scale = svg.Scale(shown.low, shown.high, start, end)
    parts.append(svg.label(start, 29, compact(shown.low, 2), class_="tick"))
    parts.append(svg.label(end, 29, compact(shown.high, 2), "end", "tick"))
    if shown.middle is not None and start + 30 < scale(shown.middle) < end - 30:
        parts.append(svg.label(scale(shown.middle), 29, compact(shown.middle, 2), "middle", "tick"))
    return [svg.group(*parts, title=f"{shown.measure}: from {compact(shown.low)} to {compact(shown.high)}")]


def _shaded(shown: Heat, value: float | None, box: tuple[float, float, float, float], rx: float = 1.5) -> Markup:
    if value is None:
        return svg.rect(*box, "band", rx)
    if shown.middle is None:
        depth, colour = svg.Scale(shown.low, shown.high, 0, 1)(value), "low" if shown.turned else "high"
    else:
        end = shown.high if value >= shown.middle else shown.low
        depth = svg.Scale(0, abs(end - shown.middle), 0, 1)(abs(value - shown.middle)) if end != shown.middle else 0.0
        colour = "high" if (value >= shown.middle) != shown.turned else "low"
    sides = dict(zip(("x", "y", "width", "height"), box, strict=True))
    return svg.element("rect", **sides, rx=rx, class_=f"cell {colour}", style=f"--v:{depth:.3f}")


def _every(names: Sequence[str], wide: float) -> int:
    """Each how many-th column carries its name, so that none touches the next."""
    needed = max((svg.text_width(name, 12) for name in names), default=0.0) + 6
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * wide >= needed), 100)


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
    y = (svg.LogScale if logarithmic else svg.Scale)(y_low, y_high, height - 48, 12)
    marks = svg.log_ticks(y_low, y_high) if logarithmic else svg.ticks(y_low, y_high, 5)
    whole = [mark for mark in svg.ticks(min(shown.x), max(shown.x), 8) if mark == int(mark)]
    parts = [svg.axis_y(y, x.start, marks, x.end), svg.axis_x(x, y.start, whole)]
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
    for at, name, class_ in svg.apart(ends, 14.0, y.start - 4):
        parts.append(svg.label(x.end + 6, at + 4, name, class_=class_))
    parts += svg.axis_names(shown.x_name, shown.y_name, (x.start, y.end, x.end, y.start))
    spans = (f"{human(name)} {number(min(curve))} to {number(max(curve))}" for name, curve in shown.curves.items())
    return svg.picture(width, height, f"{shown.title}. {'; '.join(spans)}", *parts, class_="figure profile")


def plane(shown: Plane) -> Markup:
    """Forget against retain, with the front of what nothing dominates."""
    points = []
    for spot in shown.spots:
        (x_low, x_high), (y_low, y_high) = spot.x_ends or (None, None), spot.y_ends or (None, None)
        points.append(Point(spot.name, spot.role, spot.x, spot.y, x_low, x_high, y_low, y_high))
    return trade_off(points, 1.0, shown.retain_at_least, retain=shown.retain_name, front=shown.front)


def draw(figure: AnyFigure) -> Markup:
    """The picture of a figure; nothing where it has no numbers."""
    if isinstance(figure, HeatMap):
        return heat_map(figure)
    if isinstance(figure, Heat):
        return heat(figure)
    if isinstance(figure, Profile):
        return profile(figure)
    if isinstance(figure, Plane):
        return plane(figure)
    if isinstance(figure, Curves):
        return curves.curves(figure)
    if isinstance(figure, Forest):
        return curves.forest(figure)
    if isinstance(figure, Distributions):
        return curves.distributions(figure)
    return curves.roc(figure) if isinstance(figure, Roc) else curves.scatter(figure)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as the template shows it."""

    layout: str  # small: several in a row; beside: with words beside it; half: two in a row; wide: a row of its own
    title: str
    picture: Markup
    words: tuple[str, ...] = ()


def drawn_figures(section: Section) -> list[Drawn]:
    """The figures of a section that have something to show."""
    return [drawn for drawn in map(_drawn, section.figures) if drawn.picture]


def _drawn(figure: AnyFigure) -> Drawn:
    picture, words = draw(figure), list(figure.words)
    if isinstance(figure, HeatMap):
        layout = "wide" if len(figure.columns) > 4 else "small"
    elif isinstance(figure, Forest):
        layout = "wide"
    elif isinstance(figure, Plane) or figure.kind == "profile":
        layout = "beside"
    else:
        layout = "half"
    if isinstance(figure, Scatter):
        said = curves.correlations(figure).removeprefix(", ")
        words = [f"{said}." if said else "No correlation: too few models differ.", *words]
    return Drawn(layout, figure.title, picture, tuple(words))
