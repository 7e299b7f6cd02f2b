"""What a metric declares, which tables it is given, and how its values become a record with a confidence interval."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.recipe.conventions import EXPUNGE, Convention
from expunge.registry import Registry
from expunge.scoring.tables import RECORD_KEYS, SUITES, TABLES, VALUES, Suite

#: One float64 per example, in the table's order; NaN where the metric has nothing to say about the example.
Values = NDArray[np.float64]
Direction = Literal["lower", "higher", "none"]
Average = Literal["arithmetic", "geometric"]

METRICS: Registry[Metric] = Registry("metric", "expunge.metrics")

#: Why a metric has nothing to say: it would compare answers to prompts with plain texts.
OTHER_KIND = "rows of one kind"

#: Resampled examples held at once: 2M int32 indices and their float64 values, 24 MB.
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Need:
    """A table by address: `[variant@][split:]kind[/view]`; what is left out is the variant and split in question.

    `target` and `reference` are the only variants that a metric may name, and a split is named as in data.
    """

    table: str
    variant: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, address: str) -> Need:
        """`reference@holdout:scores/paraphrase` in its parts. Raises ValueError for a table that nothing makes."""
        variant, at, rest = address.rpartition("@")
        split, colon, table = rest.rpartition(":")
        if table not in TABLES:
            raise ValueError(f"no table '{table}'; there are: {', '.join(TABLES)}")
        return cls(table, variant if at else None, split if colon else None)


class Shelf(Protocol):
    """Where the tables of an evaluation stand."""

    def find(self, variant: str, split: str, table: str) -> pa.Table | None:
        """The table, or None where it was not made. Tables of whole models (weights) stand under the split "model"."""
        ...


@dataclass(frozen=True)
class TableShelf:
    """A shelf of tables in memory, by (variant, split, table)."""

    tables: Mapping[tuple[str, str, str], pa.Table]

    def find(self, variant: str, split: str, table: str) -> pa.Table | None:
        """The table, or None."""
        return self.tables.get((variant, split, table))


@dataclass(frozen=True)
class Resampling:
    """How often rows are drawn anew for an interval, and from which seed."""

    count: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Statistic:
    """A number about a split as a whole (an AUC, a test): no mean over examples."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unscored: int = 0
    note: str = ""
    #: what it was computed from, one per example of the first table, where that is of use by itself
    values: Values | None = None


@dataclass(frozen=True)
class Metric:
    """A pure function of tables, and all that help, report and card say about it."""

    name: str
    summary: str
    function: Callable[..., Values | Statistic]
    needs: tuple[str, ...]
    range: tuple[float, float]
    unit: str
    paper: str
    #: the end of the range at which a model stands that has learnt the answer by heart; None: neither is good
    learnt: Literal["high", "low"] | None
    average: Average
    #: roles of the splits that it is about
    roles: tuple[str, ...]
    #: whether (value − reference) / (target − reference) makes sense
    anchors: bool = True
    #: whether it is a mean over examples; else a Statistic of the whole split
    per_example: bool = True
    #: whether rows of the splits that it compares must be of one kind: answers to prompts, or plain texts
    one_kind: bool = False
    #: keywords of `function` beside the tables: convention, resampling
    wants: frozenset[str] = field(default=frozenset(), repr=False)
    #: directions by role that do not follow from `learnt`: text stays fluent, neighbours stay known
    good: Mapping[str, Direction] = field(default_factory=dict, hash=False)

    @property
    def addresses(self) -> tuple[Need, ...]:
        """The tables that it is given, in order."""
        return tuple(map(Need.parse, self.needs))

    @property
    def suite(self) -> Suite:
        """The smallest suite that has every table that it needs."""
        return max((TABLES[need.table] for need in self.addresses), key=SUITES.index)

    @property
    def cheap(self) -> bool:
        """Whether it is a mean over what one scoring pass of one split gives: fit for a look during training."""
        return self.needs == ("scores",) and self.per_example

    def direction(self, role: str) -> Direction:
        """Which values are good on a split of this role; a holdout is looked at, but has no good end."""
        if role in self.good:
            return self.good[role]
        if role == "holdout" or self.learnt is None:
            return "none"
        wants_learnt = role != "forget"
        return "higher" if wants_learnt == (self.learnt == "high") else "lower"

    def describe(self) -> dict[str, str]:
        """Label → text, for `expunge list metrics` and the generated tables."""
        low, high = (f"{end:g}" for end in self.range)
        return {
            "summary": self.summary,
            "range": f"{low} to {high}",
            "unit": self.unit,
            "needs": ", ".join(self.needs),
            "suite": self.suite,
            "average": f"{self.average} mean over examples" if self.per_example else "one number per split",
            "direction": ", ".join(f"{role}: {self.direction(role)}" for role in self.roles if role != "utility")
            or "none",
            "paper": self.paper,
        }

    def compute(
        self, tables: Sequence[pa.Table], convention: Convention = EXPUNGE, resampling: Resampling = Resampling()
    ) -> Values | Statistic:
        """The function over its tables, with the settings that it asks for."""
        settings = {"convention": convention, "resampling": resampling}
        return self.function(*tables, **{name: settings[name] for name in self.wants})


def metric(
    name: str,
    *,
    summary: str,
    needs: str | tuple[str, ...],
    range: tuple[float, float],
    unit: str,
    paper: str,
    learnt: Literal["high", "low"] | None = "high",
    average: Average = "arithmetic",
    roles: tuple[str, ...] = ("forget", "retain", "holdout", "utility"),
    anchors: bool = True,
    per_example: bool = True,
    one_kind: bool = False,
    good: Mapping[str, Direction] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that files a function of tables as the metric `name`.

    It is given the tables of `needs` in order, and `convention` and `resampling` if it has parameters of those names.
    It returns one value per example (distinct example_id) of the first table, in order, or (per_example=False) a
    Statistic.
    """

    def file(function: Callable[..., Any]) -> Callable[..., Any]:
        wants = frozenset({"convention", "resampling"} & set(inspect.signature(function).parameters))
        addresses = (needs,) if isinstance(needs, str) else needs
        made = Metric(
            name, summary, function, addresses, range, unit, paper, learnt, average, roles, anchors, per_example
        )
        made = replace(made, wants=wants, good=good or {}, one_kind=one_kind)
        assert made.addresses  # a misspelt table shows at import
        METRICS.register(name)(made)
        return function

    return file


def chosen_metrics(names: Sequence[str] | None, suite: Suite = "full") -> list[str]:
    """The named metrics, or those of a suite (a larger suite contains the smaller). Raises UserError on a name."""
    if names is None:
        return [name for name, entry in METRICS.items() if SUITES.index(entry.suite) <= SUITES.index(suite)]
    for name in names:
        METRICS.get(name)
    return list(dict.fromkeys(names))


def needed_tables(names: Sequence[str]) -> set[str]:
    """The tables, of any variant and split, that these metrics are made from. Raises UserError on an unknown name."""
    return {need.table for name in names for need in METRICS.get(name).addresses}


def left_out(shelf: Shelf, names: Sequence[str], variant: str, split: str, role: str) -> dict[str, str]:
    """Metric → the missing address, or OTHER_KIND, of metrics on this role that `evaluate_metrics` leaves out."""
    missing = {}
    for name in names:
        entry = METRICS.get(name)
        found = tables_of(shelf, entry, variant, split)
        if role in entry.roles and isinstance(found, str):
            missing[name] = found
    return missing


def tables_of(shelf: Shelf, entry: Metric, variant: str, split: str) -> list[pa.Table] | str:
    """The tables of a metric, or the first address that is missing, or OTHER_KIND where they can't be compared."""
    found: list[pa.Table] = []
    for address, need in zip(entry.needs, entry.addresses, strict=True):
        table = shelf.find(need.variant or variant, need.split or split, need.table)
        if table is None:
            return address
        found.append(table)
    kinds = {frozenset(table.column("is_text").to_pylist()) for table in found if len(table)} if entry.one_kind else ()
    return OTHER_KIND if len(kinds) > 1 else found


def evaluate_metrics(
    shelf: Shelf,
    role: str,
    names: Sequence[str],
    resampling: Resampling,
    variant: str,
    split: str,
    convention: Convention = EXPUNGE,
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Records (RECORD_KEYS) and per-example values (VALUES) of the metrics whose tables are there (see `left_out`).

    `n` counts the examples behind `value`, `unscored` those for which the metric is undefined. Value and interval are
    None where nothing is scored; the interval also with a single example. Raises UserError on an unknown name.
    """
    records: list[dict[str, Any]] = []
    parts: list[pa.Table] = []
    for name in names:
        entry = METRICS.get(name)
        tables = tables_of(shelf, entry, variant, split)
        if role not in entry.roles or isinstance(tables, str):
            continue
        result = entry.compute(tables, convention, resampling)
        values = result.values if isinstance(result, Statistic) else result
        found = result if isinstance(result, Statistic) else averaged(result, entry.average, resampling)
        records.append(_record(variant, split, entry, found, role))
        if values is not None:
            parts.append(_value_rows(tables[0], values, variant, split, name))
    return records, pa.concat_tables(parts) if parts else VALUES.empty_table()


def averaged(values: Values, average: Average, resampling: Resampling) -> Statistic:
    """Mean over the scored examples, with its bootstrap interval."""
    scored = values[~np.isnan(values)]
    value, low, high = summarise(scored, average, resampling.count, resampling.seed)
    return Statistic(value, low, high, len(scored), len(values) - len(scored))


def summarise(
    scored: Values, average: Average, bootstrap: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Mean of scored values and the ends of its bootstrap 95% percentile interval (on the log scale if geometric)."""
    if not len(scored):
        return None, None, None
    if average == "geometric":
        value, low, high = (
            None if end is None else math.exp(end) for end in summarise(np.log(scored), "arithmetic", bootstrap, seed)
        )
        return value, low, high
    mean = float(scored.mean())
    return (mean, *bootstrap_interval(scored, bootstrap, seed)) if len(scored) > 1 else (mean, None, None)


def mean(scored: Values, average: Average) -> float | None:
    """Mean of scored values; None without any."""
    if not len(scored):
        return None
    return math.exp(float(np.log(scored).mean())) if average == "geometric" else float(scored.mean())


def bootstrap_interval(values: Values, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over examples drawn with replacement (Efron 1979)."""
    low, high = np.quantile(bootstrap_means(values, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values: Values, resamples: int, seed: int) -> Values:
    """Means [resamples] over examples drawn with replacement.

    Draws depend on `seed` and the number of values alone, so two variants of one split are resampled alike.
    """
    means = np.empty(resamples)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = generator.integers(0, len(values), size=(count, len(values)), dtype=np.int32)
        means[start : start + count] = values[draws].mean(axis=1)
    return means


def example_ids(table: pa.Table) -> list[str]:
    """The examples of a table, once each, in the order in which they first stand there.

    Rows under the id "" speak of the split as a whole (see LAYERS) and are no example.
    """
    return [name for name in dict.fromkeys(table.column("example_id").to_pylist()) if name]


def _record(variant: str, split: str, entry: Metric, found: Statistic, role: str) -> dict[str, Any]:
    cells = {
        "variant": variant,
        "split": split,
        "metric": entry.name,
        "value": found.value,
        "ci_low": found.low,
        "ci_high": found.high,
        "n": found.n,
        "unscored": found.unscored,
        "direction": entry.direction(role),
        "note": found.note,
    }
    return {key: cells.get(key) for key in RECORD_KEYS}  # what is anchored is added when every variant was measured


def _value_rows(table: pa.Table, values: Values, variant: str, split: str, name: str) -> pa.Table:
    ids = example_ids(table)
    if len(ids) != len(values):
        raise ValueError(f"metric {name} gave {len(values)} values for {len(ids)} examples")
    constants = [pa.repeat(pa.scalar(text), len(ids)) for text in (variant, split, name)]
    columns = [*constants, pa.array(ids, pa.string()), pa.array(values, mask=np.isnan(values))]
    return pa.Table.from_arrays(columns, schema=VALUES)
