"""Scores of models by the official convention, each a stage of the run directory; and what is left to do, in time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.report.text import duration
from expunge.studies.zjuklab_record import Answer, Scores

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground

NAME = "scores.json"
#: kinds of pieces that take about as long as another one, for as long as none of theirs was made
_LIKE = {"merge": "score", "look": "score"}


class Pace:
    """What is left of pieces of several kinds, by the mean time of those of each kind so far."""

    def __init__(self, planned: Mapping[str, int]) -> None:
        self.planned = dict(planned)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in planned}

    def done(self, kind: str, seconds: float) -> None:
        """A piece of a kind took so many seconds, whenever that was."""
        self.seconds.setdefault(kind, []).append(seconds)

    @property
    def left(self) -> float:
        """Seconds that are left; a kind of which nothing was done is as slow as its like, else as the slowest."""
        means = {kind: sum(found) / len(found) for kind, found in self.seconds.items() if found}
        slowest = max(means.values(), default=0.0)
        return sum(
            max(0, count - len(self.seconds[kind])) * means.get(kind, means.get(_LIKE.get(kind, kind), slowest))
            for kind, count in self.planned.items()
        )

    def words(self) -> str:
        """Where the study stands, for the line of a piece."""
        done, planned = sum(map(len, self.seconds.values())), sum(self.planned.values())
        left = self.left
        if done >= planned or not left:
            return f"   [{min(done, planned)}/{planned}]"
        return f"   [{done}/{planned}] about {duration(60 * max(1, round(left / 60)) if left > 90 else left)} left"


class Scorer:
    """Scores models on all rows, or on the part that the looks of a trajectory share."""

    def __init__(self, ground: Ground, options: Any, pace: Pace) -> None:
        self.ground, self.options, self.pace = ground, options, pace

    @cached_property
    def official(self) -> Any:
        """What scores specialists and merges."""
        return self._official(self.options.limit)

    @cached_property
    def glance(self) -> Any:
        """What scores a look: fewer rows are answered."""
        whole, part = self.options.limit, self.options.look_limit
        return self._official(part if whole is None else min(whole, part))

    @property
    def tasks(self) -> dict[str, str]:
        """task1, task2 and task3, as the rows themselves are called."""
        from expunge.data.benchmarks.semeval import official_task

        found = {}
        for row in self.ground.resolved.rows["forget"]:
            task = official_task(row.example)
            if task is not None:
                found[task.partition("-")[0].lower()] = row.example.task.partition("-")[0]
        return dict(sorted(found.items()))

    def score(self, name: str, model: Variant) -> Scores:
        """The scores of a model."""
        return self._scored(self.official, "score", f"scores/{name}", model)

    def look(self, name: str, step: int, model: Variant) -> Scores:
        """The scores of a specialist at a step, on the part of the rows that every look has."""
        return self._scored(self.glance, "look", f"looks/{name}/{step:06d}", model)

    def _official(self, limit: int | None) -> Any:
        from expunge.pipeline.semeval import Official

        seen, recipe = self.ground.resolved, self.ground.whole.recipe
        given = (seen.splits, seen.rows, seen.tokenizer, seen.template, recipe.evaluate)
        length = recipe.data.max_length
        return Official(*given, limit=limit, new_tokens=self.options.new_tokens, max_length=length)

    def _scored(self, official: Any, kind: str, place: str, model: Variant) -> Scores:
        def work(folder: Path) -> Mapping[str, Any]:
            with self.ground.stages.reporter.bar(place, 1) as tick:
                found = official.score(model.config)
                tick(1)
            (folder / "out").mkdir()
            write(folder / "out", Scores(dict(found.values), [Answer(*answer) for answer in found.answers]))
            return {}

        inputs = {"model": model.digest, "asked": official.digest}
        made = self.ground.directory.stage(place, place, inputs, work)
        found = read(made.path)
        self.pace.done(kind, made.seconds)
        if not made.skipped:
            self.ground.stages.reporter.line(f"    {said(found)}{self.pace.words()}")
        return found


def write(folder: Path, scores: Scores) -> None:
    """Keep scores with the answers behind them in a folder."""
    from dataclasses import asdict

    from expunge.runs.atomic import write_json

    write_json(folder / NAME, {"values": dict(scores.values), "answers": [asdict(answer) for answer in scores.answers]})


def read(folder: Path) -> Scores:
    """The scores that were kept in a folder."""
    kept = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return Scores(kept["values"], [Answer(**answer) for answer in kept["answers"]])


def said(scores: Scores) -> str:
    """The numbers that are told while a study runs."""
    names = {"final": "final", "task aggregate": "task_aggregate", "MIA AUC": "mia_auc", "forget ES": "forget_es"}
    names |= {"retain ES": "retain_es"}
    found = {label: scores.values.get(name) for label, name in names.items()}
    return " · ".join(f"{label} {value:.3f}" for label, value in found.items() if value is not None)
