"""The passes of a calibration: strength per example, by α and kind of rows; none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from expunge.data.encode import Encoded
from expunge.metrics.base import METRICS, Statistic, Values
from expunge.models.mixture import Mixed
from expunge.pipeline.asked import AT
from expunge.recipe.conventions import EXPUNGE, Convention
from expunge.report.calibration_record import PassCount
from expunge.scoring.scores import score

RETAIN, FORGET = "retain", "forget"
PARAPHRASE = f"{FORGET}{AT}paraphrase"

#: Strength per example of the rows of one kind, at one α.
Known = Mapping[tuple[float, str], Values]


@dataclass(frozen=True)
class CalibrationRows:
    """Rows in the models' tokens. `retain` should be rows that unlearning never saw."""

    retain: Sequence[Encoded]
    forget: Sequence[Encoded]
    paraphrase: Sequence[Encoded] = ()  # the forget rows asked in other words, under the same ids
    splits: Mapping[str, str] = field(default_factory=dict)  # retain, forget → split that they come from

    def of(self, kind: str) -> dict[str, Sequence[Encoded]]:
        """The rows of a pass by name: the forget pass has its paraphrases in it."""
        if kind == RETAIN:
            return {RETAIN: self.retain}
        return {FORGET: self.forget, **({PARAPHRASE: self.paraphrase} if self.paraphrase else {})}


class Passes:
    """Strengths by α and kind of rows. What is known already is not passed again."""

    def __init__(
        self,
        mixture: Callable[[], Mixed],
        rows: CalibrationRows,
        *,
        batch_size: int = 16,
        convention: Convention = EXPUNGE,
        known: Known | None = None,
        on_pass: Callable[[Passes], None] = lambda passes: None,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.mixture, self.rows, self.batch_size, self.convention = mixture, rows, batch_size, convention
        self.known: dict[tuple[float, str], Values] = dict(known or {})
        self.given = frozenset(self.known)
        self.used: set[tuple[float, str]] = set()
        self.on_pass, self.tick = on_pass, tick

    def values(self, alpha: float, kind: str) -> Values:
        """Strength of θ(α) per example, NaN where it can't be scored."""
        needed = self.rows.of(kind)
        if any((alpha, name) not in self.known for name in needed):
            mixture = self.mixture()
            mixture.set(alpha)
            together = [row for rows in needed.values() for row in rows]
            table = score(mixture.model, together, batch_size=self.batch_size, progress=self.tick)
            start = 0
            for name, rows in needed.items():
                part = table.slice(start, len(rows))
                self.known[alpha, name] = strengths(part, self.convention, broken=0.0 if name == RETAIN else np.nan)
                start += len(rows)
            self.on_pass(self)
        self.used.add((alpha, RETAIN if kind == RETAIN else FORGET))
        return self.known[alpha, kind]

    def mean(self, alpha: float, kind: str) -> float | None:
        """Mean strength of θ(α); None where no row can be scored."""
        found = self.values(alpha, kind)
        return None if np.isnan(found).all() else float(np.nanmean(found))

    def retain(self, alpha: float) -> float:
        """Mean retain strength of θ(α)."""
        return self.mean(alpha, RETAIN) or 0.0

    def visited(self, kind: str = RETAIN) -> list[float]:
        """Every α of which this kind was asked for, ascending."""
        return sorted(alpha for alpha, name in self.used if name == kind)

    def count(self, search: int) -> PassCount:
        """What was passed; `search` retain passes of mixed models until α* was found."""
        mixed = {kind: sum(alpha > 0 for alpha in self.visited(kind)) for kind in (RETAIN, FORGET)}
        target = sum(alpha == 0 for alpha, _ in self.used)
        reused = len(self.used & self.given)
        return PassCount(search=search, retain=mixed[RETAIN], forget=mixed[FORGET], target=target, reused=reused)


def strengths(table: pa.Table, convention: Convention = EXPUNGE, broken: float = np.nan) -> Values:
    """Extraction strength per example of a SCORES table, mean over its candidates; NaN where there is no answer.

    `broken` stands for a row with an answer of which the model computes NaN: it has not kept it (0), and nobody knows
    whether it forgot it (NaN).
    """
    ids = table.column("example_id").to_pylist()
    numbers = pa.array([str(number) for number in range(len(ids))])
    alone = table.set_column(table.schema.get_field_index("example_id"), table.schema.field("example_id"), numbers)
    found = METRICS.get("extraction_strength").compute([alone], convention)
    assert not isinstance(found, Statistic)
    answered = np.asarray(table.column("answer_tokens")) > 0
    each = np.where(np.isnan(found) & answered, broken, found)
    place = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    row = np.array([place[name] for name in ids], dtype=np.int64)
    scored = ~np.isnan(each)
    total = np.bincount(row[scored], weights=each[scored], minlength=len(place))
    count = np.bincount(row[scored], minlength=len(place))
    return np.divide(total, count, out=np.full(len(place), np.nan), where=count > 0)
