"""Inline SVG by hand: elements, scales, axes, marks. Colours come from the page's classes, so that dark mode works."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from expunge.report.text import clean, compact

Attribute = str | float | None


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """One SVG element. `class_` is class, underscores are hyphens, None is left out; text children are escaped."""
    parts = []
    for key, value in attributes.items():
        if value is not None:
            name = key if key == "viewBox" else key.rstrip("_").replace("_", "-")
            parts.append(f' {name}="{escape(_text(value))}"')
    inside = Markup("").join(escape(clean(child)) for child in children)
    return Markup(f"<{tag}{''.join(parts)}>{inside}</{tag}>") if inside else Markup(f"<{tag}{''.join(parts)}/>")


def _text(value: Attribute) -> str:
    return clean(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def picture(width: float, height: float, title: str, *children: str, class_: str = "") -> Markup:
    """The outermost <svg>: scales with its box, and says in `title` what it shows."""
    named = element("title", title)
    box = f"0 0 {width:g} {height:g}"
    return element("svg", named, *children, viewBox=box, role="img", aria_label=title, class_=class_ or None)


def group(*children: str, title: str = "", class_: str | None = None) -> Markup:
    """A <g>; its title shows when the pointer rests on it."""
    return element("g", *([element("title", title)] if title else []), *children, class_=class_)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside the domain stay at its edge."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class LogScale:
    """A logarithmic map from positive data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a positive value; values outside the domain stay at its edge."""
        inner = Scale(math.log(self.low), math.log(self.high), self.start, self.end)
        return inner(math.log(max(value, self.low)))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high]: 1, 2 or 5 times a power of ten apart."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # the product is rounded to the step's own decimals, or 3 * 0.1 would be labelled 0.30000000000000004
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; the powers alone where those would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    made = [float(f"{factor}e{power}") for power in powers for factor in factors]
    found = [mark for mark in made if low <= mark <= high]
    return found if len(found) > 1 else ticks(low, high)


def tick_labels(marks: Sequence[float]) -> list[str]:
    """The numbers of an axis, with as many digits as tell them apart."""
    found = [compact(mark) for mark in marks]
    for digits in range(5, 12):
        if len(set(found)) == len(set(marks)):
            break
        found = [compact(mark, digits) for mark in marks]
    return found


def domain(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """An interval around the values with some room; never empty."""
    low, high = min(values), max(values)
    if low == high:
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - room * (high - low), high + room * (high - low)


def label(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """A text at a point."""
    return element("text", text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, rx: float | None = None) -> Markup:
    """A rectangle; sides are never negative."""
    return element("rect", x=x, y=y, width=max(0.0, width), height=max(0.0, height), rx=rx, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def polygon(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """An area within points."""
    return element("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def axis_x(scale: Scale | LogScale, y: float, marks: Sequence[float], grid_to: float | None = None) -> Markup:
    """Ticks with numbers under a horizontal axis, with grid lines up to `grid_to`."""
    parts = [line(scale.start, y, scale.end, y, "axis")]
    for mark, words in zip(marks, tick_labels(marks), strict=True):
        x = scale(mark)
        parts.append(line(x, y, x, grid_to, "grid") if grid_to is not None else line(x, y, x, y + 4, "axis"))
        parts.append(label(x, y + 16, words, "middle", "tick"))
    return group(*parts)


def axis_y(scale: Scale | LogScale, x: float, marks: Sequence[float], grid_to: float | None = None) -> Markup:
    """Ticks with numbers left of a vertical axis, with grid lines up to `grid_to`."""
    parts = []
    for mark, words in zip(marks, tick_labels(marks), strict=True):
        y = scale(mark)
        parts.append(line(x, y, grid_to, y, "grid") if grid_to is not None else line(x - 4, y, x, y, "axis"))
        parts.append(label(x - 7, y + 4, words, "end", "tick"))
    return group(*parts)


def axis_names(x_name: str, y_name: str, frame: tuple[float, float, float, float], deeper: float = 0.0) -> list[Markup]:
    """Names under (by so much deeper) and left of a frame (left, top, right, bottom); the left one is turned."""
    left, top, right, bottom = frame
    turned = label(0, 0, y_name, "middle", "axis-name")
    return [
        label((left + right) / 2, bottom + 38 + deeper, x_name, "middle", "axis-name"),
        element("g", turned, transform=f"translate(13 {(top + bottom) / 2:.0f}) rotate(-90)"),
    ]


def apart(places: Sequence[tuple[float, str, str]], gap: float, lowest: float) -> list[tuple[float, str, str]]:
    """The same labels (place, text, class), moved so that none covers another and none lies below `lowest`."""
    moved: list[tuple[float, str, str]] = []
    for at, name, class_ in sorted(places):
        moved.append((max(at, moved[-1][0] + gap) if moved else at, name, class_))
    for index in range(len(moved) - 1, -1, -1):
        at, name, class_ = moved[index]
        limit = moved[index + 1][0] - gap if index + 1 < len(moved) else lowest
        moved[index] = (min(at, limit), name, class_)
    return moved


def legend(entries: Sequence[tuple[str, str]], x: float, y: float) -> list[Markup]:
    """Names in a row, each after a piece of its line; `entries` are (name, classes)."""
    parts = []
    for name, class_ in entries:
        parts.append(line(x, y - 4, x + 18, y - 4, f"curve {class_}"))
        parts.append(label(x + 24, y, name, class_="name"))
        x += 24 + text_width(name, 12) + 18
    return parts


def marker(kind: str, x: float, y: float, size: float = 6) -> Markup:
    """A variant's mark. Shape and colour both tell the kind, so that neither is needed alone."""
    class_ = f"mark v-{kind}"
    if kind == "target":
        return _polygon(x, y, size * 1.3, ((0, -1), (1, 0), (0, 1), (-1, 0)), class_)
    if kind == "reference":
        return rect(x - size, y - size, 2 * size, 2 * size, class_)
    if kind == "specialist":
        return _polygon(x, y, size * 1.15, ((0, -1), (1, 0.75), (-1, 0.75)), class_)
    return element("circle", cx=x, cy=y, r=size * (1.25 if kind == "result" else 1), class_=class_)


def _polygon(x: float, y: float, size: float, corners: Sequence[tuple[float, float]], class_: str) -> Markup:
    return polygon([(x + size * dx, y + size * dy) for dx, dy in corners], class_)


def whisker(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """An interval: a thin line with short caps, horizontal or vertical."""
    across = y1 == y2
    dx, dy = (0.0, 3.5) if across else (3.5, 0.0)
    class_ = f"whisker v-{kind}"
    caps = [line(x - dx, y - dy, x + dx, y + dy, class_) for x, y in ((x1, y1), (x2, y2))]
    return group(line(x1, y1, x2, y2, class_), *caps)


def text_width(text: str, size: float) -> float:
    """Rough width in pixels: wide scripts are one em, others a bit more than half."""
    return sum(size * (1.0 if ord(letter) > 0x2E7F else 0.58) for letter in text)
