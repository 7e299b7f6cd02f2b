"""Few-shot prompting: questions and answers of other rows stand before the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from expunge.attacks.base import Point, PromptAttack, World, attack, setting
from expunge.attacks.prompts import drawing, gives_away, normalised, secrets
from expunge.data.example import Example

Count = Annotated[int, Field(gt=0)]


@attack(
    name="few_shot",
    idea="other rows' questions and answers as shots before the question",
    paper="2411.12103",
    kind="behaviour",
    budget="shots",
    needs=("retain",),
)
class FewShot(PromptAttack):
    """Shots are retain rows: of the row's own task (related), or of any (unrelated); never with the row's answer."""

    shots: tuple[Count, ...] = setting((1, 3, 5), description="numbers of shots", published="5")
    unrelated: bool = setting(True, description="try shots of other tasks too, where there are any")
    longest: int = setting(600, description="characters of a shot, where shorter ones can be had", gt=0)

    def points(self) -> list[Point]:
        """Related and unrelated shots of each number."""
        kinds = ("unrelated", "related") if self.unrelated else ("related",)
        return [
            Point(f"{kind}-{count}", count, {"shots": count, "kind": kind})
            for count in sorted(set(self.shots))
            for kind in kinds
        ]

    def rewrite(self, example: Example, point: Point, world: World) -> list[Example]:
        """The row after its shots; empty where too few rows fit."""
        if example.is_text:
            return []
        chosen = self._choose(example, point, world)
        if len(chosen) < point.settings["shots"]:
            return []
        turns = [turn for shot in chosen for turn in (("user", shot.prompt), ("assistant", shot.answer))]
        lead = [turn for turn in example.turns if turn[0] == "system"]  # it stays in front
        rest = [turn for turn in example.turns if turn[0] != "system"]
        return [replace(example, turns=(*lead, *turns, *rest), candidate=0)]

    def _choose(self, example: Example, point: Point, world: World) -> list[Example]:
        related = point.settings["kind"] == "related"
        pool = _pool(world.examples.get("retain", ()))
        fitting = [shot for shot in pool if (shot.task == example.task) == related and shot.id != example.id]
        generator = drawing(world.seed, example.id, point.settings["kind"])
        generator.shuffle(fitting)
        fitting.sort(key=lambda shot: max(0, len(shot.prompt) + len(shot.answer) - self.longest))
        hidden, answer = secrets(example), normalised(example.answer)
        chosen: list[Example] = []
        for shot in fitting:
            if len(chosen) == point.settings["shots"]:
                break
            if normalised(shot.answer) != answer and not gives_away(f"{shot.prompt}\n{shot.answer}", hidden):
                chosen.append(shot)
        return chosen


def _pool(rows: Sequence[Example]) -> list[Example]:
    return [row for row in rows if row.prompt.strip() and not row.is_text and not row.turns]
