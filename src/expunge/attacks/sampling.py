"""Sampling: several drawn answers instead of the likeliest one; the one that says most counts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from expunge.attacks.base import Point, SamplingAttack, attack, setting

Temperature = Annotated[float, Field(gt=0)]


@attack(
    name="sampling",
    idea="several answers drawn at a temperature, the worst counts",
    paper="2511.04934, 2410.03523",
    kind="behaviour",
    budget="temperature",
    outputs=("generations",),
    suite="full",
)
class TemperatureSampling(SamplingAttack):
    """Greedy decoding shows one answer of many; what a model says now and then has not gone."""

    temperatures: tuple[Temperature, ...] = setting((0.7, 1.0, 1.3), description="temperatures", published="1.0")
    count: int = setting(8, description="answers drawn per row", published="128 (2410.03523), 200 (2511.04934)", gt=0)

    def points(self) -> list[Point]:
        """One per temperature."""
        return [Point(f"t{value:g}", value, {"temperature": value}) for value in sorted(set(self.temperatures))]

    def sampling(self, point: Point) -> dict[str, Any]:
        """temperature and count."""
        return {"temperature": point.settings["temperature"], "count": self.count}
