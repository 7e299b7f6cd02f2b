"""How long `localization` takes: said before the first piece, from the speed at which the reference was taught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from expunge.report.text import duration

if TYPE_CHECKING:
    from expunge.pipeline.progress import Reporter
    from expunge.studies.ground import Ground
    from expunge.studies.localization import Localization

#: Time of a row that is only scored, over that of one that is trained on.
SCORED = 0.5


class Clock:
    """Counts the pieces of each kind, and says what is left by their mean times and, before those, by guesses."""

    def __init__(self, planned: Mapping[str, int], reporter: Reporter) -> None:
        self.planned = {kind: count for kind, count in planned.items() if count}
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.planned}
        self.guesses: dict[str, float] = {}
        self.reporter = reporter

    def begin(self, guesses: Mapping[str, float]) -> None:
        """Say the estimate; none without a guess."""
        self.guesses = dict(guesses)
        pieces = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in self.planned.items())
        about = f": about {duration(_whole_minutes(self.left))}" if self.left else ""
        self.reporter.line(f"  {pieces}{about}")

    def done(self, kind: str, seconds: float, words: str = "") -> None:
        """A piece took so many seconds, whenever that was."""
        self.seconds.setdefault(kind, []).append(seconds)
        done, planned = sum(map(len, self.seconds.values())), sum(self.planned.values())
        left = self.left
        rest = f" about {duration(_whole_minutes(left))} left" if left and done < planned else ""
        self.reporter.line(f"    {words}   [{done}/{planned}]{rest}")

    @property
    def left(self) -> float:
        """Seconds that are left, as far as they can be told."""
        # where guesses were off for what was done, they are for the rest
        known = [(kind, found) for kind, found in self.seconds.items() if found and self.guesses.get(kind)]
        guessed = sum(self.guesses[kind] * len(found) for kind, found in known)
        factor = sum(sum(found) for _, found in known) / guessed if guessed else 1.0
        total = 0.0
        for kind, count in self.planned.items():
            found = self.seconds[kind]
            mean = sum(found) / len(found) if found else factor * self.guesses.get(kind, 0.0)
            total += max(0, count - len(found)) * mean
        return total

    @property
    def progress(self) -> dict[str, tuple[int, int]]:
        """Per kind, how many pieces were planned, and how many are done."""
        return {kind: (count, len(self.seconds[kind])) for kind, count in self.planned.items()}


def guesses(ground: Ground, options: Localization, measured: int) -> dict[str, float]:
    """Seconds of a piece of each kind, by rows; empty if no model was taught here. `measured`: rows of a look."""
    from expunge.pipeline.entries import prepare_jobs
    from expunge.studies.localization import injection, look_steps, relearn_steps

    prepared = prepare_jobs(ground.whole).get("reference")
    if prepared is None:
        return {}
    job = prepared[1]
    trained = job.plan().steps * min(job.train.batch_size, len(job.retain))
    each = ground.variants["reference"].seconds / max(trained, 1)
    look = SCORED * measured
    forget, both = (
        sum(len(ground.resolved.rows[split]) for split in splits) for splits in (("forget",), ("forget", "retain"))
    )
    again = options.relearn * options.batch + look * len(relearn_steps(options.relearn, options.relearn_looks))
    rows = {
        "injection": injection(options, ground.parameters)["epochs"] * forget * (1 + options.kept_rows) + look,
        "matching": 2 * SCORED * both + 2 * look,
        "attribution": both,
        "control": again,
        "training": 2 * options.steps * options.batch + look * len(look_steps(options.steps, options.looks)) + again,
    }
    return {kind: each * count for kind, count in rows.items()}


def _whole_minutes(seconds: float) -> float:
    return 60 * max(1, round(seconds / 60)) if seconds > 90 else seconds
