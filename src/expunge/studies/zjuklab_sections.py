"""The course of the trainings of `zjuklab` as sections: trajectory and loss dynamics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from expunge.report.document import Section
from expunge.report.figure_data import AnyFigure, Curves, Line, LineRole
from expunge.report.text import human, number
from expunge.studies.zjuklab_claims import mean_of
from expunge.studies.zjuklab_record import OVER, UNDER, Dynamics, Found, Look, Specialist

NAMES = {OVER: "over-forgetter", UNDER: "under-forgetter", "npo": "NPO alone"}
_MEASURES = ("regurgitation", "knowledge")
_SIDES: dict[tuple[str, str], LineRole] = {
    ("forget", "regurgitation"): "forget",
    ("forget", "knowledge"): "paraphrase",
    ("retain", "regurgitation"): "retain",
    ("retain", "knowledge"): "retain_paraphrase",
}
#: Points of one curve that are kept; longer trainings are averaged in as many bins.
_POINTS = 200
#: Part of a training that a smoothed loss is averaged over.
_WINDOW = 0.05


def shown(look: Look, side: str, task: str, measure: str) -> float:
    """What a model gives back: officially forget values are 1 − mean, here they are turned round again."""
    value = look.scores[f"{side}_{task}_{measure}"]
    return 1 - value if side == "forget" else value


# ------------------------------------------------------------ trajectory


def trajectory(found: Found) -> Section:
    """Regurgitation and knowledge of both sides against steps, task by task, for both specialists."""
    title = "Trajectory"
    looked = [one for one in found.specialists if len(one.looks) > 1]
    if not looked:
        return Section(title=title, words=["No specialist was looked at while it was trained."])
    figures: list[AnyFigure] = []
    for task, called in found.tasks.items():
        for name in dict.fromkeys(one.name for one in looked):
            lines = [
                line
                for side, measure in _SIDES
                if (line := _course([one for one in looked if one.name == name], side, task, measure)) is not None
            ]
            if lines:
                who = NAMES.get(name, human(name))
                figures.append(Curves(title=f"{called}: {who}", x_name="step", y_name="score", lines=lines))
    if not figures:
        return Section(title=title, words=["The looks at the specialists gave no scores by task."])
    lead = (
        "What each specialist still says as its training goes on: regurgitation is ROUGE-L recall of continued texts, "
        "knowledge the share of questions answered exactly. Forget curves should fall, retain curves should stay."
    )
    return Section(
        title=title, lead=lead, figures=figures, words=[words for one in looked if (words := told(one, found))]
    )


def _course(specialists: Sequence[Specialist], side: str, task: str, measure: str) -> Line | None:
    """A curve over the steps that all seeds share, with a standard deviation to each side where there are several."""
    per_seed = [{look.step: shown(look, side, task, measure) for look in one.looks} for one in specialists]
    steps = [step for step in sorted(per_seed[0]) if all(step in values for values in per_seed)]
    spreads = [mean_of([values[step] for values in per_seed]) for step in steps]
    means = [None if math.isnan(mean) else mean for mean, _ in spreads]
    if all(mean is None for mean in means):
        return None
    ends: dict[str, list[float | None]] = {"low": [], "high": []}
    if any(deviation is not None for _, deviation in spreads):
        for mean, deviation in spreads:
            ends["low"].append(None if deviation is None else max(0.0, mean - deviation))
            ends["high"].append(None if deviation is None else min(1.0, mean + deviation))
    return Line(name=f"{side}, {measure}", role=_SIDES[side, measure], x=[float(s) for s in steps], y=means, **ends)


def told(one: Specialist, found: Found) -> str:
    """The course of a specialist in a sentence: what fell, and what came back."""
    courses = {key: _mean_course(one, found, *key) for key in _SIDES}
    said = []
    for (side, measure), course in courses.items():
        if len(course) > 1:
            (first, start), (last, end) = course[0], course[-1]
            step, lowest = min(course, key=lambda point: point[1])
            words = f"{side} {measure} goes from {number(start)} to {number(end)}"
            if first < step < last and end - lowest > 0.05:
                words += f" (lowest, {number(lowest)}, at step {step})"
            said.append(words)
    if not said:
        return ""
    return f"{human(NAMES.get(one.name, one.name))}, seed {one.seed}, mean over tasks: {'; '.join(said)}."


def _mean_course(one: Specialist, found: Found, side: str, measure: str) -> list[tuple[int, float]]:
    points = []
    for look in sorted(one.looks, key=lambda look: look.step):
        mean, _ = mean_of([shown(look, side, task, measure) for task in found.tasks])
        if not math.isnan(mean):
            points.append((look.step, mean))
    return points


# ------------------------------------------------------------ loss dynamics

_TERMS = {
    "loss": "Whole loss",
    "forget": "NPO term",
    "retain_nll": "Cross-entropy on retain rows",
    "retain_kl": "KL to the target on retain rows",
}
_BOTH = ("loss", "forget")  # shown raw as well


def dynamics(found: Found) -> Section:
    """The terms of the loss of both specialists and of NPO alone, smoothed and raw."""
    title = "Loss dynamics"
    if not any(run.steps for run in found.dynamics):
        return Section(title=title, words=["No loss was recorded."])
    figures: list[AnyFigure] = []
    for term, called in _TERMS.items():
        runs = [run for run in found.dynamics if run.steps and any(map(math.isfinite, run.terms.get(term, ())))]
        if runs:
            figures.append(_losses(f"{called}, smoothed", runs, term, _smoothed))
            if term in _BOTH:
                figures.append(_losses(f"{called}, raw", runs, term, list))
    lead = (
        "NPO alone against NPO with the retain terms, step by step, each term with its weight. Smoothed: mean over "
        f"{_WINDOW:.0%} of the steps around each."
    )
    return Section(title=title, lead=lead, figures=figures, words=_steadiness(found))


def _losses(title: str, runs: Sequence[Dynamics], term: str, how: Callable[[Sequence[float]], list[float]]) -> Curves:
    lines = []
    for run in sorted(runs, key=lambda run: list(NAMES).index(run.name) if run.name in NAMES else 9):
        x, y = _binned(run.steps, how([float(value) for value in run.terms[term]]))
        role: LineRole = "original" if run.name == "npo" else "specialist"
        lines.append(Line(name=NAMES.get(run.name, run.name), role=role, x=x, y=y))
    return Curves(title=title, x_name="step", y_name="loss", y_range=None, lines=lines)


def _smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving mean; narrower at the ends."""
    half = max(1, round(_WINDOW * len(values) / 2))
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float | None]]:
    """At most `_POINTS` points: means over equal bins; what is not finite is left out."""
    size = max(1, -(-len(values) // _POINTS))
    x, y = [], []
    for start in range(0, len(values), size):
        known = [value for value in values[start : start + size] if math.isfinite(value)]
        x.append(float(steps[min(start + size // 2, len(steps) - 1)]))
        y.append(sum(known) / len(known) if known else None)
    return x, y


def _steadiness(found: Found) -> list[str]:
    """How far the NPO term jumps from step to step, with and without retain terms."""
    jumps = {}
    for run in found.dynamics:
        values = [value for value in run.terms.get("forget", ()) if math.isfinite(value)]
        if len(values) > 2:
            # of a value that jumps by s around its course, differences of neighbours have a deviation of s√2
            steps = [after - before for before, after in itertools.pairwise(values)]
            jumps[run.name] = math.sqrt(sum(step * step for step in steps) / len(steps) / 2)
    if "npo" not in jumps or len(jumps) < 2:
        return []
    others = ", ".join(f"{number(value)} in the {NAMES[name]}" for name, value in jumps.items() if name != "npo")
    return [
        f"From step to step the NPO term jumps by {number(jumps['npo'])} when NPO is alone, and by {others} (root mean "
        "square of the differences of neighbours, over √2). The terms are weighted, and the rows of a step differ in "
        "number between the trainings, so that this compares courses, not methods."
    ]
