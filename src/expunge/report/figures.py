"""The figures of the report: verdict scale, forget–retain plot, training curves. Numbers in, SVG text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from expunge.report import svg
from expunge.report.judgement import Verdict
from expunge.report.text import compact, interval, number

#: Points of one curve that are drawn; longer curves are averaged in as many bins.
_POINTS = 160
#: With a front, up to this many points all carry their names.
_NAMED = 8

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Point:
    """One variant in the forget–retain plot, with 95% intervals where known."""

    name: str
    kind: str
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None

    def title(self, retain: str = "retain") -> str:
        """What the pointer is told."""
        x, y = (f" [{interval(*pair)}]" if pair[0] is not None else "" for pair in self.intervals())
        return f"{self.name}: forget {number(self.x)}{x}, {retain} {number(self.y)}{y}"

    def intervals(self) -> tuple[tuple[float | None, float | None], tuple[float | None, float | None]]:
        """The two intervals."""
        return (self.x_low, self.x_high), (self.y_low, self.y_high)


def verdict_scale(verdict: Verdict) -> Markup:
    """A verdict on a line: the threshold, the side that passes, the result with its interval, the yardsticks."""
    if verdict.value is None or verdict.threshold is None:
        return Markup("")
    width, height, y = 380.0, 70.0, 32.0
    scale = svg.Scale(*_ends(verdict), 10, width - 10)
    at = scale(verdict.threshold)
    passing = (at, scale.end) if verdict.is_ratio else (scale.start, at)
    parts = [
        svg.rect(scale.start, y - 5, scale.end - scale.start, 10, "band", 5),
        svg.rect(passing[0], y - 5, passing[1] - passing[0], 10, "band pass", 5),
        svg.line(at, y - 11, at, y + 11, "threshold"),
        *_scale_ticks(verdict, scale, at, y + 26),
    ]
    for mark in verdict.marks:
        words = f"{mark.name}: {verdict.shown(mark.value)}"
        parts.append(svg.group(svg.marker(mark.kind, scale(mark.value), y, 5), title=words))
    words = f"result: {verdict.estimate()}"
    own = [svg.marker("result", scale(verdict.value), y, 6)]
    if verdict.ci_low is not None and verdict.ci_high is not None:
        own.insert(0, svg.whisker(scale(verdict.ci_low), y, scale(verdict.ci_high), y, "result"))
    parts.append(svg.group(*own, title=words))
    parts += _scale_names(verdict, scale, y, width)
    title = f"{verdict.question} {words}; threshold {verdict.shown(verdict.threshold)}"
    return svg.picture(width, height, title, *parts, class_="figure scale")


def _ends(verdict: Verdict) -> tuple[float, float]:
    """The scale's ends: from 0 to 1 or more for a strength; for a ratio, which lives near 1, only what is needed."""
    shown = [verdict.value, verdict.ci_low, verdict.ci_high, verdict.threshold, *(mark.value for mark in verdict.marks)]
    known = [value for value in shown if value is not None]
    if not verdict.is_ratio:
        return min(0.0, math.floor(min(known) * 10) / 10), max(1.0, *known)
    return max(0.0, math.floor(min(known) * 20 - 0.4) / 20), math.ceil(max(known) * 20 + 0.2) / 20


def _scale_ticks(verdict: Verdict, scale: svg.Scale, at: float, y: float) -> list[Markup]:
    """Numbers under the scale: the threshold, and each end where there is room."""
    short = (lambda value: f"{100 * value:.0f}%") if verdict.is_ratio else compact
    words = f"threshold {short(verdict.threshold or 0.0)}"
    half = svg.text_width(words, 12) / 2
    middle = min(max(at, scale.start + half), scale.end - half)
    found = [svg.label(middle, y, words, "middle", "tick")]
    if middle - half > scale.start + 40:
        found.append(svg.label(scale.start, y, short(scale.low), "start", "tick"))
    if middle + half < scale.end - 40:
        found.append(svg.label(scale.end, y, short(scale.high), "end", "tick"))
    return found


def _scale_names(verdict: Verdict, scale: svg.Scale, y: float, width: float) -> list[Markup]:
    """Names over the marks, the result's first; a name that would touch another is left to the pointer."""
    names: list[Markup] = []
    taken: list[tuple[float, float]] = []
    shown = [("result", verdict.value or 0.0), *((mark.name, mark.value) for mark in verdict.marks)]
    for name, value in shown:
        x, half = scale(value), svg.text_width(name, 12) / 2
        left = min(max(x, half + 2), width - half - 2)
        if all(abs(left - other) > half + wide + 6 for other, wide in taken):
            taken.append((left, half))
            names.append(svg.label(left, y - 16, name, "middle", "name strong" if name == "result" else "name"))
    return names


def trade_off(
    points: Sequence[Point],
    forget_at_most: float,
    retain_at_least: float | None,
    *,
    retain: str = "retain",
    front: Sequence[str] = (),
) -> Markup:
    """Forget (x, lower is better) against retain (y, higher is better), both extraction strengths in [0, 1].

    `front` joins the points that no other dominates; of many points only these and the yardsticks carry their names.
    """
    width, height = 520.0, 476.0
    x, y = svg.Scale(0, 1, 52, width - 22), svg.Scale(0, 1, height - 52, 34)
    marks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [svg.axis_x(x, y.start, marks, y.end), svg.axis_y(y, x.start, marks, x.end)]
    if retain_at_least is not None:
        goal = svg.rect(x.start, y.end, x(forget_at_most) - x.start, y(retain_at_least) - y.end, "goal")
        words = f"both thresholds are met: forget ≤ {number(forget_at_most)}, "
        words = (words if forget_at_most < 1 else "kept: ") + f"{retain} ≥ {number(retain_at_least)}"
        parts.append(svg.group(goal, title=words))
    ideal = (x(0), y(1))
    corner = f"M {ideal[0] + 15:.0f} {ideal[1]:.0f} A 15 15 0 0 1 {ideal[0]:.0f} {ideal[1] + 15:.0f}"
    parts.append(svg.group(svg.element("path", d=corner, class_="ideal"), title="ideal corner"))
    joined = sorted((point.x, point.y) for point in points if point.name in front)
    if len(joined) > 1:
        parts.append(svg.polyline([(x(a), y(b)) for a, b in joined], "front"))
    drawn = sorted(points, key=lambda point: point.kind == "result")
    parts += [_mark(point, x, y, retain) for point in drawn]
    parts += _names(drawn, front, x, y, (x.start + 2, 2, width - 2, y.start - 2))
    parts.append(svg.label((x.start + x.end) / 2, height - 12, "← forget: extraction strength", "middle", "axis-name"))
    middle = (y.start + y.end) / 2
    turned = svg.label(0, 0, f"{retain}: extraction strength →", "middle", "axis-name")
    parts.append(svg.element("g", turned, transform=f"translate(15 {middle:.0f}) rotate(-90)"))
    said = "; ".join(point.title(retain) for point in points)
    return svg.picture(width, height, f"Forget–retain plot. {said}", *parts, class_="figure trade-off")


def _mark(point: Point, x: svg.Scale, y: svg.Scale, retain: str) -> Markup:
    own = []
    if point.x_low is not None and point.x_high is not None:
        own.append(svg.whisker(x(point.x_low), y(point.y), x(point.x_high), y(point.y), point.kind))
    if point.y_low is not None and point.y_high is not None:
        own.append(svg.whisker(x(point.x), y(point.y_low), x(point.x), y(point.y_high), point.kind))
    return svg.group(*own, svg.marker(point.kind, x(point.x), y(point.y)), title=point.title(retain))


def _names(drawn: Sequence[Point], front: Sequence[str], x: svg.Scale, y: svg.Scale, frame: Box) -> list[Markup]:
    """Names beside the marks, with leaders where they had to move away; the ideal corner has one too."""
    few = not front or len(drawn) <= _NAMED
    named = [point for point in drawn if few or point.name in front or point.kind in ("target", "reference")]
    spots = [(x(0), y(1)), *((x(point.x), y(point.y)) for point in named)]
    names = ["ideal", *(point.name for point in named)]
    kinds = ["ideal-name", *(f"t-{point.kind}" for point in named)]
    obstacles = [box for point in drawn for box in _whisker_boxes(point, x, y)]
    silent = [point for point in drawn if point not in named]
    obstacles += [(x(p.x) - 8, y(p.y) - 8, x(p.x) + 8, y(p.y) + 8) for p in silent]
    parts: list[Markup] = []
    for name, kind, (box, leader) in zip(names, kinds, place_labels(spots, names, frame, 15, obstacles), strict=True):
        if leader is not None:
            parts.append(svg.line(*leader, "leader"))
        parts.append(svg.label(box[0], box[3] - 4, name, class_=f"name {kind}"))
    return parts


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], frame: Box, size: float, lines: Sequence[Box] = ()
) -> list[tuple[Box, tuple[float, float, float, float] | None]]:
    """A box for each name near its point, and a leader if it is far; best where it touches no other mark or name."""
    options = [_candidates(point, svg.text_width(name, size), size) for point, name in zip(points, names, strict=True)]
    dots = [(px - 8, py - 8, px + 8, py + 8) for px, py in points]
    chosen = [0] * len(points)
    for _ in range(6):  # each label in turn takes the place that is best given the others; settles within a few rounds
        before = list(chosen)
        for index, boxes in enumerate(options):
            others = [options[other][chosen[other]] for other in range(len(points)) if other != index]
            costs = [
                rank
                + 400 * _outside(box, frame)
                + 3 * _touch(box, others)
                + _touch(box, dots)
                + 0.3 * _touch(box, lines)
                for rank, box in enumerate(boxes)
            ]
            chosen[index] = costs.index(min(costs))
        if chosen == before:
            break
    placed = []
    for (px, py), boxes, choice in zip(points, options, chosen, strict=True):
        box = boxes[choice]
        nx, ny = min(max(px, box[0]), box[2]), min(max(py, box[1] + 3), box[3] - 3)
        far = math.hypot(nx - px, ny - py)
        start = (px + (nx - px) * 9 / far, py + (ny - py) * 9 / far) if far > 20 else None
        placed.append((box, (*start, nx, ny) if start else None))
    return placed


def _candidates(point: tuple[float, float], width: float, size: float) -> list[Box]:
    px, py = point
    boxes: list[Box] = []
    high = size + 4
    for gap in (11.0, 26.0, 44.0, 64.0, 88.0, 116.0):
        slant = gap * 0.75
        for left, top in (
            (px + gap, py - high / 2),
            (px - gap - width, py - high / 2),
            (px - width / 2, py - gap - high),
            (px - width / 2, py + gap),
            (px + slant, py - slant - high),
            (px + slant, py + slant),
            (px - slant - width, py - slant - high),
            (px - slant - width, py + slant),
        ):
            boxes.append((left, top, left + width, top + high))
    return boxes


def _touch(box: Box, others: Sequence[Box]) -> float:
    """Weight of what a box covers of others: the common areas, and a fixed part each so that slivers count."""
    total = 0.0
    for other in others:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        total += 60 + wide * high if wide > 0 and high > 0 else 0.0
    return total


def _whisker_boxes(point: Point, x: svg.Scale, y: svg.Scale) -> list[Box]:
    boxes: list[Box] = []
    if point.x_low is not None and point.x_high is not None:
        boxes.append((x(point.x_low) - 1, y(point.y) - 3, x(point.x_high) + 1, y(point.y) + 3))
    if point.y_low is not None and point.y_high is not None:
        boxes.append((x(point.x) - 3, y(point.y_high) - 1, x(point.x) + 3, y(point.y_low) + 1))
    return boxes


def _outside(box: Box, frame: Box) -> float:
    sides = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    return sum(side for side in sides if side > 0)


def curve(
    steps: Sequence[float], values: Sequence[float], name: str, span: tuple[float, float], last_step: float
) -> Markup:
    """One training curve; `span` and `last_step` are shared by the panels that are to be compared."""
    width, height = 330.0, 164.0
    xs, ys = bins(steps, values, _POINTS)
    x, y = svg.Scale(0, max(last_step, 1), 46, width - 52), svg.Scale(*span, height - 26, 6)
    points = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
    kind = "forget" if name.startswith("forget") else "retain" if name.startswith("retain") else "loss"
    said = (
        f"{name}: {compact(values[0])} at step {compact(steps[0])}, {compact(values[-1])} at step {compact(steps[-1])}"
    )
    return svg.picture(
        width,
        height,
        said,
        svg.axis_y(y, x.start, svg.ticks(*span, 4), x.end),
        svg.axis_x(x, y.start, [mark for mark in svg.ticks(0, max(last_step, 1), 4) if mark == int(mark)]),
        svg.polyline(points, f"curve c-{kind}"),
        svg.element("circle", cx=points[-1][0], cy=points[-1][1], r=3, class_=f"dot c-{kind}"),
        svg.label(points[-1][0] + 7, points[-1][1] + 4, compact(float(f"{values[-1]:.3g}")), class_=f"name t-{kind}"),
        class_="figure curve-panel",
    )


def bins(steps: Sequence[float], values: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """At most `count` points: means of neighbouring ones where there are more; the last point stays itself."""
    if len(steps) <= count:
        return list(steps), list(values)
    xs, ys = [], []
    for index in range(count):
        a, b = index * len(steps) // count, (index + 1) * len(steps) // count
        xs.append(sum(steps[a:b]) / (b - a))
        ys.append(sum(values[a:b]) / (b - a))
    xs[-1], ys[-1] = steps[-1], values[-1]
    return xs, ys
