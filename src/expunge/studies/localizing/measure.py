"""How the models of `localization` are measured: the same rows at every look, as tables on disk and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expunge.data.encode import Encoded
from expunge.metrics.base import METRICS, Statistic, mean
from expunge.metrics.forget_quality import Comparison, compared
from expunge.metrics.truth_ratio import NEEDS
from expunge.pipeline.asked import AT
from expunge.pipeline.attacked import write_tables
from expunge.pipeline.looks import score_rows
from expunge.pipeline.resolve import rows_digest
from expunge.studies.ground import METRIC
from expunge.studies.localization_record import Look

if TYPE_CHECKING:
    from expunge.studies.ground import Ground
    from expunge.studies.localization import Localization

UNSEEN = "retain_unseen"
SPLITS = ("forget", "retain", UNSEEN)
#: The tables of the forget rows that truth ratios are made of.
VIEWS = tuple(f"forget{AT}{view}" if view else "forget" for view in (need.partition("/")[2] for need in NEEDS))


class Measure:
    """Measures models in memory, and reads what was measured. `reference` is the folder of the reference's tables."""

    def __init__(self, ground: Ground, options: Localization) -> None:
        self.evaluate = ground.whole.recipe.evaluate
        given, asked = ground.resolved.rows, ground.resolved.asked.scores
        self.rows: dict[str, Sequence[Encoded]] = {
            name: given[name][: options.limit] for name in SPLITS if name in given
        }
        shown = {row.example.id for row in self.rows["forget"]}
        views = {name: [row for row in asked.get(name, ()) if row.example.id in shown] for name in VIEWS[1:]}
        if any(views[name] for name in views):
            self.rows |= views
        self.reference: Path | None = None

    @property
    def compared(self) -> str:
        """What forget quality compares."""
        return "truth ratio" if VIEWS[-1] in self.rows else "probability"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What a look depends on beside the model."""
        return {
            "dtype": self.evaluate.dtype,
            "measured": {name: rows_digest(some) for name, some in self.rows.items()},
        }

    @property
    def count(self) -> int:
        """Rows of a look, views included."""
        return sum(map(len, self.rows.values()))

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """The tables of a model in memory, which stays as it was; the folder appears whole."""
        write_tables(score_rows(model, tokenizer, self.rows, self.evaluate), folder)

    def look(self, folder: Path, step: int = 0) -> Look:
        """The numbers behind tables."""
        tables = {name: pq.read_table(folder / f"{name}.parquet") for name in self.rows}
        found = {name: _strength(tables[name]) for name in SPLITS if name in tables}
        return Look(step, found["forget"], found["retain"], found.get(UNSEEN), self._quality(tables))

    def _quality(self, tables: dict[str, pa.Table]) -> float:
        """log10 p of the test between these forget rows' values and the reference's."""
        assert self.reference is not None
        names = VIEWS if self.compared == "truth ratio" else VIEWS[:1]
        theirs = [pq.read_table(self.reference / f"{name}.parquet") for name in names]
        own = [tables[name] for name in names]
        return (compared if len(names) > 1 else _by_probability)(*own, *theirs).log10_p


def _by_probability(own: pa.Table, theirs: pa.Table) -> Comparison:
    """The test between answers' probabilities per token, where rows have no wrong answers to compare with."""
    from scipy.stats import ks_2samp

    values, reference = (METRICS.get("probability").compute([table]) for table in (own, theirs))
    assert not isinstance(values, Statistic)
    assert not isinstance(reference, Statistic)
    both = ~np.isnan(values) & ~np.isnan(reference)
    test = ks_2samp(values[both], reference[both]) if both.any() else None
    distance, p = (math.nan, math.nan) if test is None else (float(test.statistic), float(test.pvalue))
    return Comparison(values[both], reference[both], int((~both).sum()), distance, p)


def _strength(table: pa.Table) -> float:
    """Mean extraction strength of the rows that have one; NaN without any."""
    entry = METRICS.get(METRIC)
    values = entry.compute([table])
    assert not isinstance(values, Statistic)
    found = mean(values[~np.isnan(values)], entry.average)
    return math.nan if found is None else found
