"""Rows that are put aside: kept away from a training, to judge it by."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.data.encode import Encoded


def put_aside(rows: Sequence[Encoded], part: float) -> tuple[list[Encoded], list[Encoded]]:
    """(The rows that stay, those put aside): the last `part` of each task, at least one row of the whole stays.

    Files hold what belongs together side by side, so that a cut at the end divides one document of a task at most.
    """
    tasks: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        tasks.setdefault(row.example.task, []).append(place)
    aside = {place for places in tasks.values() for place in places[len(places) - int(len(places) * part) :]}
    if not aside and len(rows) > 1:
        aside = {len(rows) - 1}
    return [row for i, row in enumerate(rows) if i not in aside], [rows[i] for i in sorted(aside)]
