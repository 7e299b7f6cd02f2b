"""Figures of lines and dots: curves with bands, distribution functions, ROC, before against after. SVG text out."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence

from markupsafe import Markup

from expunge.report import svg
from expunge.report.figure_data import Curves, Distributions, Forest, Line, Roc, Sample, Scatter
from expunge.report.figures import place_labels
from expunge.report.text import compact, interval, number, plural

#: Steps of a distribution function, and points of a ROC, that are drawn.
_STEPS = 240
#: Up to this many dots all carry their names.
_NAMED = 8
_HUES = 5  # as many specialists as have a colour of their own

Scale = Callable[[float], float]


def hues(parts: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Name → CSS classes, from (name, role): several specialists of one figure differ in hue."""
    classes, count = {}, 0
    for name, role in parts:
        classes[name] = f"v-{role}"
        if role in ("specialist", "other"):
            classes[name] = f"v-specialist h{count % _HUES}"
            count += 1
    return classes


def curves(shown: Curves) -> Markup:
    """Curves over a budget, a number of samples or a share, with their intervals as bands."""
    lines = [line for line in shown.lines if any(value is not None for value in line.y)]
    if not lines:
        return Markup("")
    names = [*(line.name for line in lines), *shown.levels]
    right = min(190.0, 16 + max(svg.text_width(name, 12) for name in names))
    width, height, top = 400.0 + right, 300.0, 26.0 if shown.marks else 12.0
    places = sorted({x for line in lines for x in line.x} | set(shown.marks.values()))
    x, x_axis, deeper = _x_scale(shown, places, 58, width - right, height - 48)
    y = svg.Scale(*(shown.y_range or svg.domain(_values(lines, shown.levels))), height - 48, top)
    parts = [svg.axis_y(y, 58, svg.ticks(y.low, y.high, 5), width - right), x_axis]
    classes = hues([(line.name, line.role) for line in lines])
    ends: list[tuple[float, str, str]] = []
    for name, level in shown.levels.items():
        parts.append(svg.group(svg.line(58, y(level), width - right, y(level), "level"), title=_named(name, level)))
        ends.append((y(level), name, "name"))
    for name, place in shown.marks.items():
        anchor = "end" if x(place) > (width - right) * 0.7 else "start" if x(place) < 120 else "middle"
        parts.append(svg.line(x(place), top, x(place), y.start, "level"))
        parts.append(svg.label(x(place), top - 8, name, anchor, "name"))
    parts += [area for line in lines for area in _areas(shown, line, x, y, classes[line.name])]
    for line in lines:
        parts += _line(shown, line, x, y, classes[line.name])
        last = next(value for value in reversed(line.y) if value is not None)
        ends.append((y(last), line.name, f"name t-{classes[line.name].removeprefix('v-')}"))
    for at, name, class_ in svg.apart(ends, 14.0, y.start - 4):
        parts.append(svg.label(width - right + 8, at + 4, name, class_=class_))
    parts += svg.axis_names(shown.x_name, shown.y_name, (58, top, width - right, height - 48), deeper)
    said = "; ".join(_said(shown, line) for line in lines)
    return svg.picture(width, height + deeper, f"{shown.title}. {said}", *parts, class_="figure curves")


def _values(lines: Sequence[Line], levels: Mapping[str, float]) -> list[float]:
    columns = [column for line in lines for column in (line.y, line.low, line.high)]
    return [*(value for column in columns for value in column if value is not None), *levels.values()]


def _x_scale(shown: Curves, places: Sequence[float], start: float, end: float, y: float) -> tuple[Scale, Markup, float]:
    """The map of positions to pixels, its axis, and how much deeper than one row of numbers that is."""
    even = shown.x_scale == "even" or (shown.x_scale == "log" and places[0] <= 0)
    if even or shown.x_labels:
        inner: Scale = svg.Scale(0, max(1, len(places) - 1), start + 14, end - 14) if even else _plain(shown, places)
        scale: Scale = (lambda value: inner(bisect_right(places, value) - 1)) if even else inner
        names = [(scale(place), shown.x_labels.get(f"{place:g}", compact(place))) for place in places]
        labels, deeper = _staggered(names, y)
        return scale, svg.group(svg.line(start, y, end, y, "axis"), *labels), deeper
    if shown.x_scale == "log" and len(places) > 1:
        logarithmic = svg.LogScale(places[0], places[-1], start, end)
        ticks = list(places) if len(places) <= 9 else svg.log_ticks(places[0], places[-1])
        return logarithmic, svg.axis_x(logarithmic, y, ticks), 0.0
    linear = svg.Scale(places[0], places[-1], start, end)
    return linear, svg.axis_x(linear, y, svg.ticks(places[0], places[-1], 6)), 0.0


def _staggered(names: Sequence[tuple[float, str]], y: float) -> tuple[list[Markup], float]:
    """Names under their places: in one row, else in two in turn; what still touches is left to the pointer."""
    halves = [svg.text_width(name, 12) / 2 for _, name in names]
    ends = [(at - half, at + half) for (at, _), half in zip(names, halves, strict=True)]
    rows = 1 if all(left[1] + 4 <= right[0] for left, right in itertools.pairwise(ends)) else 2
    taken, labels = [-1e9] * rows, []
    for index, (at, name) in enumerate(names):
        row = index % rows
        if ends[index][0] > taken[row]:
            labels.append(svg.label(at, y + 16 + 14 * row, name, "middle", "tick"))
            taken[row] = ends[index][1] + 4
    return labels, 14.0 * (rows - 1)


def _plain(shown: Curves, places: Sequence[float]) -> Scale:
    made = svg.LogScale if shown.x_scale == "log" and len(places) > 1 else svg.Scale
    return made(places[0], places[-1], 72, 386)


def _areas(shown: Curves, line: Line, x: Scale, y: svg.Scale, class_: str) -> Iterator[Markup]:
    """The interval as a band, and what lies under the curve where that is asked for."""
    known = [(at, low, high) for at, low, high in zip(line.x, line.low, line.high, strict=False) if _both(low, high)]
    if len(known) > 1:
        there = [(x(at), y(high)) for at, _, high in known if high is not None]
        back = [(x(at), y(low)) for at, low, _ in reversed(known) if low is not None]
        yield svg.polygon([*there, *back], f"spread {class_}")
    points = _corners(shown, line, x, y)
    if shown.filled and len(points) > 1:
        yield svg.polygon([(points[0][0], y.start), *points, (points[-1][0], y.start)], f"spread {class_}")


def _corners(shown: Curves, line: Line, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """The points of a curve, with a corner before each where it goes in steps."""
    points = [(x(at), y(value)) for at, value in zip(line.x, line.y, strict=True) if value is not None]
    if not shown.stepped:
        return points
    corners = points[:1]
    for (before, _), (at, value) in itertools.pairwise(points):
        corners += [(before, value), (at, value)]
    return corners


def _both(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None


def _line(shown: Curves, line: Line, x: Scale, y: svg.Scale, class_: str) -> Iterator[Markup]:
    points = [(x(at), y(value)) for at, value in zip(line.x, line.y, strict=True) if value is not None]
    if len(points) > 1:
        yield svg.polyline(_corners(shown, line, x, y), f"curve {class_}")
    if len(points) > 40:  # a dense curve speaks for itself
        return
    for index, (at, value) in enumerate(zip(line.x, line.y, strict=True)):
        if value is not None:
            low, high = (ends[index] if ends else None for ends in (line.low, line.high))
            silent = at in shown.silent
            dot = svg.element("circle", cx=x(at), cy=y(value), r=3.4, class_="silent" if silent else f"dot {class_}")
            alone = len(points) == 1 and low is not None and high is not None
            ends = [svg.whisker(x(at), y(low or 0), x(at), y(high or 0), line.role)] if alone else []
            spread = f" [{between}]" if (between := interval(low, high)) else ""
            words = f"{line.name}, {_place(shown, at)}: {number(value)}{spread}{', says nothing' if silent else ''}"
            yield svg.group(*ends, dot, title=words)


def _place(shown: Curves, at: float) -> str:
    name = shown.x_labels.get(f"{at:g}")
    return name if name is not None else f"{shown.x_name} {compact(at)}"


def _said(shown: Curves, line: Line) -> str:
    points = [(at, value) for at, value in zip(line.x, line.y, strict=True) if value is not None]
    (first, before), (last, after) = points[0], points[-1]
    if len(points) == 1:
        return f"{line.name}: {number(before)} at {_place(shown, first)}"
    return f"{line.name}: {number(before)} at {_place(shown, first)}, {number(after)} at {_place(shown, last)}"


def _named(name: str, value: float) -> str:
    return f"{name}: {number(value)}"


def forest(shown: Forest) -> Markup:
    """Estimates with intervals below each other; the side of the line that passes is shaded."""
    if not shown.rows:
        return Markup("")
    left = min(230.0, 18 + max(svg.text_width(row.name, 13) for row in shown.rows))
    high, top, width = 25.0, 34.0, left + 470.0
    bottom = top + high * len(shown.rows) + 4
    known = [v for row in shown.rows for v in (row.value, row.low, row.high) if v is not None]
    x = svg.Scale(*svg.domain([*known, shown.threshold, 0.0]), left, width - 20)
    at = x(shown.threshold)
    parts = [
        svg.rect(*((at, top, x.end - at) if shown.above else (left, top, at - left)), bottom - top, "band pass"),
        svg.axis_x(x, bottom, svg.ticks(x.low, x.high, 6), top),
        svg.line(at, top, at, bottom, "threshold"),
    ]
    name = f"{shown.threshold_name} {number(shown.threshold)}"
    half = svg.text_width(name, 12) / 2
    parts.append(svg.label(min(max(at, left + half), width - half - 4), top - 9, name, "middle", "name strong"))
    for index, row in enumerate(shown.rows):
        y = top + (index + 0.5) * high + 2
        class_ = f"s-{row.state.replace(' ', '-')}"
        words = f"{row.name}: {number(row.value)}"
        words += f" [{interval(row.low, row.high)}]" if row.low is not None else ""
        words += f", {row.hint}" if row.hint else ""
        own = [svg.element("circle", cx=x(row.value), cy=y, r=5, class_=f"spot {class_}")]
        if row.low is not None and row.high is not None:
            own.insert(0, svg.line(x(row.low), y, x(row.high), y, f"stretch {class_}"))
        parts.append(svg.group(*own, title=words))
        parts.append(svg.label(left - 10, y + 4, row.name, "end", f"name {class_}"))
    parts.append(svg.label((left + width) / 2, bottom + 38, shown.x_name, "middle", "axis-name"))
    said = "; ".join(f"{row.name} {number(row.value)}" for row in shown.rows)
    return svg.picture(width, bottom + 46, f"{shown.title}. {said}", *parts, class_="figure forest")


def steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """Corners (value, share of values at or below it) of the empirical distribution function, thinned evenly."""
    ordered = sorted(values)
    n = len(ordered)
    chosen = range(n) if n <= _STEPS else [round(index * (n - 1) / (_STEPS - 1)) for index in range(_STEPS)]
    corners: list[tuple[float, float]] = []
    below = 0.0
    for index in chosen:
        corners += [(ordered[index], below), (ordered[index], (index + 1) / n)]
        below = (index + 1) / n
    return corners


def distributions(shown: Distributions) -> Markup:
    """Empirical distribution functions; where two of them are furthest apart, a line says how far."""
    samples = [sample for sample in shown.samples if sample.values]
    if not samples:
        return Markup("")
    width, height = 520.0, 306.0
    every = [value for sample in samples for value in sample.values]
    logarithmic = shown.x_scale == "log" and min(every) > 0 and max(every) > min(every)
    low, high = (min(every), max(every)) if logarithmic or min(every) < max(every) else svg.domain(every)
    x = (svg.LogScale if logarithmic else svg.Scale)(low, high, 58, width - 18)
    y = svg.Scale(0, 1, height - 48, 34)
    ticks = svg.log_ticks(low, high) if logarithmic else svg.ticks(low, high, 6)
    axis = svg.axis_x(x, y.start, ticks)
    parts = [
        svg.axis_y(y, 58, svg.ticks(0, 1, 5), width - 18),
        axis,
        svg.line(58, y.start, width - 18, y.start, "axis"),
    ]
    classes = hues([(sample.name, sample.role) for sample in samples])
    for sample in samples:
        parts.append(_step_line(sample, x, y, high, classes[sample.name]))
    parts += _distance(shown, samples, x, y)
    parts += svg.legend([(sample.name, classes[sample.name]) for sample in samples], 58, 14)
    parts += svg.axis_names(shown.x_name, "share of rows at or below", (58, 34, width - 18, height - 48))
    said = "; ".join(f"{sample.name}: {plural(len(sample.values), 'row')}" for sample in samples)
    far = f"; KS distance {number(shown.distance.statistic)}" if shown.distance else ""
    return svg.picture(width, height, f"{shown.title}. {said}{far}", *parts, class_="figure distributions")


def _step_line(sample: Sample, x: Scale, y: Scale, high: float, class_: str) -> Markup:
    corners = [*steps(sample.values), (high, 1.0)]
    return svg.polyline([(x(value), y(share)) for value, share in corners], f"curve {class_}")


def _distance(shown: Distributions, samples: Sequence[Sample], x: Scale, y: Scale) -> list[Markup]:
    if shown.distance is None or shown.distance.statistic == 0:
        return []
    by_name = {sample.name: sorted(sample.values) for sample in samples}
    pair = [by_name[name] for name in (shown.distance.first, shown.distance.second) if name in by_name]
    if len(pair) < 2:
        return []
    at = x(shown.distance.at)
    ends = [y(bisect_right(values, shown.distance.at) / len(values)) for values in pair]
    words = f"D = {number(shown.distance.statistic)}"
    side = "end" if at > 340 else "start"
    shift = -8 if side == "end" else 8
    line = svg.group(svg.line(at, ends[0], at, ends[1], "gap"), title=f"furthest apart at {compact(shown.distance.at)}")
    return [line, svg.label(at + shift, sum(ends) / 2 + 4, words, side, "name strong halo")]


def roc(shown: Roc) -> Markup:
    """Rates of true against false positives; areas with their standard errors stand in the figure."""
    if not shown.lines:
        return Markup("")
    size = 400.0
    x, y = svg.Scale(0, 1, 58, size - 12), svg.Scale(0, 1, size - 50, 12)
    marks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [svg.axis_x(x, y.start, marks, y.end), svg.axis_y(y, x.start, marks, x.end)]
    diagonal = svg.line(x(0), y(0), x(1), y(1), "level")
    parts.append(svg.group(diagonal, title="a coin: members can't be told from non-members"))
    classes = hues([(line.name, line.role) for line in shown.lines])
    said = []
    for index, line in enumerate(shown.lines):
        pairs = list(zip(line.false_positive, line.true_positive, strict=True))
        if len(pairs) > _STEPS:
            pairs = [pairs[round(i * (len(pairs) - 1) / (_STEPS - 1))] for i in range(_STEPS)]
        words = f"{line.name}: AUC {number(line.auc)}" + (f" ± {number(line.error)}" if line.error is not None else "")
        path = svg.polyline([(x(a), y(b)) for a, b in pairs], f"curve {classes[line.name]}")
        parts.append(svg.group(path, title=words))
        place = y(0) - 12 - 16 * (len(shown.lines) - 1 - index)
        class_ = f"name strong halo t-{classes[line.name].removeprefix('v-')}"
        parts.append(svg.label(x(1) - 6, place, words, "end", class_))
        said.append(words)
    parts += svg.axis_names("false positives: non-members called members", "members called members", (58, 12, 388, 350))
    return svg.picture(size, size, f"{shown.title}. {'; '.join(said)}", *parts, class_="figure roc")


def scatter(shown: Scatter) -> Markup:
    """Before (x) against after (y) on equal axes, with the line on which nothing changes."""
    values = [value for dot in shown.dots for value in (dot.x, dot.y)]
    if not values:
        return Markup("")
    size = 400.0
    logarithmic = shown.scale == "log" and min(values) > 0
    low, high = _square(values, logarithmic)
    made = svg.LogScale if logarithmic else svg.Scale
    x, y = made(low, high, 58, size - 14), made(low, high, size - 50, 14)
    marks = svg.log_ticks(low, high) if logarithmic else svg.ticks(low, high, 5)
    axes = [svg.axis_x(x, y.start, marks, y.end), svg.axis_y(y, x.start, marks, x.end)]
    parts = [*axes, svg.group(svg.line(x(low), y(low), x(high), y(high), "level"), title="nothing changed")]
    for dot in shown.dots:
        mark = svg.marker(dot.role, x(dot.x), y(dot.y), 5)
        parts.append(svg.group(mark, title=f"{dot.name}: {number(dot.x)} → {number(dot.y)}"))
    if len(shown.dots) <= _NAMED:
        names = [dot.name for dot in shown.dots]
        spots = [(x(dot.x), y(dot.y)) for dot in shown.dots]
        places = place_labels(spots, names, (60, 4, size - 4, size - 52), 12)
        for dot, (box, leader) in zip(shown.dots, places, strict=True):
            parts += [svg.line(*leader, "leader")] if leader is not None else []
            parts.append(svg.label(box[0], box[3] - 4, dot.name, class_=f"name halo t-{dot.role}"))
    parts += svg.axis_names(shown.x_name, shown.y_name, (58, 14, size - 14, size - 50))
    said = f"{plural(len(shown.dots), 'model')}{correlations(shown)}"
    return svg.picture(size, size, f"{shown.title}. {said}", *parts, class_="figure scatter")


def correlations(shown: Scatter) -> str:
    """`, Pearson 0.98, Spearman 0.91`, as far as they are known."""
    pairs = (("Pearson", shown.pearson), ("Spearman", shown.spearman))
    return "".join(f", {name} {number(value)}" for name, value in pairs if value is not None)


def _square(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """One range for both axes: [0, 1] where everything lies in it."""
    if logarithmic:
        return min(values) / 1.15, max(values) * 1.15
    if min(values) >= 0 and max(values) <= 1:
        return 0.0, 1.0
    return svg.domain(values)
