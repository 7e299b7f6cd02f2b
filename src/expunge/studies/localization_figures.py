"""The curves of `localization`: pairs of seeds, forgetting against retain strength, relearning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from expunge.report.figure_data import AnyFigure, Curves, Forest, Line, LineRole, Stretch
from expunge.report.svg import domain
from expunge.report.text import human, plural
from expunge.studies.localization_claims import Claims, Measure, method_name, region_name
from expunge.studies.localization_record import ORACLE, RANDOM, Look, Run
from expunge.studies.localization_stats import envelope
from expunge.studies.zjuklab_claims import mean_of

#: Points of the axis of retain strength at which envelopes are drawn: more than 40, so that they carry no dots.
_POINTS = 81
_CONTROL, _ATTRIBUTED = "reference", "attributed"
#: Place on the horizontal axis → forgetting or strength, of one run.
Course = Mapping[float, float]
_ROLES: Mapping[str, LineRole] = {
    ORACLE: "result",
    RANDOM: "original",
    _ATTRIBUTED: "specialist",
    _CONTROL: "reference",
}


def forest(claims: Claims, measure: Measure) -> Forest | None:
    """Differences of the oracle from random, method by method and of all; None without any."""
    rows = []
    for method in (*claims.found.methods, None):
        found = claims.compared(measure, method)
        if found.mean is not None:
            state = claims.state(measure, method)
            rows.append(
                Stretch(
                    name="all methods" if method is None else method_name(method),
                    value=found.mean,
                    low=found.low,
                    high=found.high,
                    state="yes" if state == "better" else "no" if state == "worse" else "not shown",
                    hint=plural(found.n, "seed"),
                )
            )
    if not rows:
        return None
    words = f"{human(measure.label)}: {measure.difference(ORACLE)}"
    return Forest(
        title=words,
        x_name=f"{measure.difference(ORACLE)}; right of the line the true region does better",
        rows=rows,
        threshold=0.0,
        threshold_name="no difference",
        above=True,
    )


def pairs(claims: Claims, measure: Measure) -> list[AnyFigure]:
    """Per method a line from random to oracle for each seed, all on one scale."""
    values = {
        method: [claims.values(measure, method, region) for region in (RANDOM, ORACLE)]
        for method in claims.found.methods
    }
    both = {
        method: {seed: [one[seed], two[seed]] for seed in one if seed in two} for method, (one, two) in values.items()
    }
    every = [value for seeds in both.values() for pair in seeds.values() for value in pair]
    if not every:
        return []
    low, high = domain(every, 0.1)
    return [
        Curves(
            title=f"{method_name(method)}: {measure.label}, seed by seed",
            x_name="region",
            y_name=measure.label,
            x_scale="even",
            x_labels={"0": RANDOM, "1": ORACLE},
            y_range=(low, high),
            lines=[Line(name=f"seed {seed}", role="specialist", x=[0.0, 1.0], y=pair) for seed, pair in seeds.items()],
        )
        for method, seeds in both.items()
        if seeds
    ]


def fronts(claims: Claims) -> list[AnyFigure]:
    """Per method the envelopes of the regions, mean over seeds: the area below each is its AUES."""
    reached = [look.retain for run in claims.came for look in run.looks if math.isfinite(look.retain)]
    if not reached:
        return []
    low, high = math.floor(10 * min(reached)) / 10, math.ceil(10 * min(1.0, max(reached) + 0.01)) / 10
    taus = [low + (high - low) * index / (_POINTS - 1) for index in range(_POINTS)]

    def course(run: Run) -> Course:
        return dict(zip(taus, envelope(run.looks, taus), strict=False))  # no look, no curve

    figures: list[AnyFigure] = []
    for method in claims.found.methods:
        lines = _lines(claims, _courses(claims, method, course))
        if lines:
            figures.append(
                Curves(
                    title=f"{method_name(method)}: forgetting at retain strength",
                    x_name="retain strength kept, at least",
                    y_name="forgetting (1 − forget strength)",
                    lines=lines,
                    stepped=True,
                    words=["Left of the axis the curves go on level."] if low > 0 else [],
                )
            )
    return figures


def relearning(claims: Claims) -> list[AnyFigure]:
    """Per method the forget strength as all weights are trained on the forget rows, beside the reference's."""
    control = _course([_by_step(one.looks) for one in claims.found.controls if one.looks], _CONTROL, band=True)
    figures: list[AnyFigure] = []
    for method in claims.found.methods:
        lines = _lines(claims, _courses(claims, method, lambda run: _by_step(run.relearned)))
        if lines:
            figures.append(
                Curves(
                    title=f"{method_name(method)}: relearning",
                    x_name="steps on the forget rows",
                    y_name="forget strength",
                    lines=[*lines, *([control] if control else [])],
                )
            )
    return figures


def _by_step(looks: Sequence[Look]) -> Course:
    return {float(look.step): look.forget for look in looks}


def _courses(claims: Claims, method: str, course: Callable[[Run], Course]) -> dict[str, list[Course]]:
    """Region → the courses of its runs; empty ones are left out."""
    found: dict[str, list[Course]] = {}
    for run in claims.came:
        if run.method == method and (made := course(run)):
            found.setdefault(run.region, []).append(made)
    return found


def _lines(claims: Claims, courses: Mapping[str, Sequence[Course]]) -> list[Line]:
    """Oracle and random with their deviation over seeds, and the mean of the attributions with their range."""
    lines = []
    for region in (ORACLE, RANDOM):
        line = _course(courses.get(region, ()), region, band=True)
        lines += [line] if line else []
    means = {}
    for region in claims.attributions:
        line = _course(courses.get(region, ()), region, band=False)
        if line is not None:
            means[region] = dict(zip(line.x, line.y, strict=True))
    shared = sorted(set.intersection(*map(set, means.values()))) if means else []
    columns = [[value for values in means.values() if (value := values[x]) is not None] for x in shared]
    if columns:
        several = len(means) > 1
        name = f"{_ATTRIBUTED} ({len(means)})" if several else region_name(next(iter(means)))
        y: list[float | None] = [sum(column) / len(column) for column in columns]
        low: list[float | None] = [min(column) for column in columns] if several else []
        high: list[float | None] = [max(column) for column in columns] if several else []
        lines.append(Line(name=name, role=_ROLES[_ATTRIBUTED], x=shared, y=y, low=low, high=high))
    return lines


def _course(courses: Sequence[Course], region: str, band: bool) -> Line | None:
    """Mean over seeds at the places that all of them have, with a deviation to each side where there are several."""
    if not courses:
        return None
    shared = sorted(set.intersection(*(set(values) for values in courses)))
    spreads = [mean_of([values[x] for values in courses]) for x in shared]
    known = [(x, mean, deviation) for x, (mean, deviation) in zip(shared, spreads, strict=True) if not math.isnan(mean)]
    if not known:
        return None
    ends = {}
    if band and all(deviation is not None for *_, deviation in known):
        ends = {
            "low": [max(0.0, mean - (deviation or 0.0)) for _, mean, deviation in known],
            "high": [min(1.0, mean + (deviation or 0.0)) for _, mean, deviation in known],
        }
    role = _ROLES.get(region, _ROLES[_ATTRIBUTED])
    return Line(name=region, role=role, x=[x for x, *_ in known], y=[mean for _, mean, _ in known], **ends)
