"""What models are asked: the metrics that are wanted, the tables that those need, and the rows behind each table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.data.encode import Encoded, encode, truncation_note
from expunge.data.example import Example, Split, Splits
from expunge.data.load import benchmark_of
from expunge.data.registry import Benchmark
from expunge.data.template import resolve_template
from expunge.data.views import viewed
from expunge.metrics.base import METRICS, chosen_metrics, needed_tables
from expunge.recipe import DataConfig, EvaluateConfig
from expunge.recipe.conventions import Convention, convention_of

Rows = Mapping[str, Sequence[Encoded]]

#: Between a split and a view in the name of a table's file: no split has it in its name.
AT = "@"
SAMPLED = "sampled"
#: A metric that divides by one of these reads the other too: a row may lack the one and bring the other.
_TOGETHER = ("paraphrased_answer", "perturbed_answer")


@dataclass(frozen=True)
class Exam:
    """The metrics of an evaluation, the tables that they need, and how public scorers would count."""

    config: EvaluateConfig  # with the lengths that the convention wants
    metrics: tuple[str, ...]
    tables: frozenset[str]
    convention: Convention
    benchmark: Benchmark | None = None

    def views(self, kind: str) -> list[str]:
        """Views of which tables of a kind are needed; "" for the plain rows."""
        found = {table.partition("/") for table in self.tables}
        return sorted(view for name, _, view in found if name == kind)


@dataclass(frozen=True)
class Asked:
    """Rows in one model's tokens, by `split` or `split@view`, for the scoring and the generation pass."""

    exam: Exam
    scores: Rows
    generations: Rows

    def notes(self) -> list[str]:
        """Sentences on rows that were cut."""
        noted = ((name, truncation_note(rows)) for name, rows in self.scores.items())
        return [f"{name}: {note}" for name, note in noted if note]


def exam_of(config: EvaluateConfig, benchmark_name: str | None = None) -> Exam:
    """Metrics and tables of a config. Raises UserError for an unknown metric, convention or benchmark."""
    benchmark = None if benchmark_name is None else benchmark_of(benchmark_name)[0]
    name = config.convention
    if name == "auto":
        name = "expunge" if benchmark is None else benchmark.convention
    names = chosen_metrics(config.metrics, config.suite)
    if config.metrics is None and benchmark is not None and benchmark.metrics is not None:
        names = list(dict.fromkeys([*names, *(name for name in benchmark.metrics if name in METRICS)]))
    convention = convention_of(name)
    if convention.max_new_tokens is not None and config.generate is not None:
        generate = config.generate.model_copy(update={"max_new_tokens": convention.max_new_tokens})
        config = config.model_copy(update={"generate": generate})
    # the verdicts rest on plain scores, whatever else is wanted
    return Exam(config, tuple(names), frozenset({*needed_tables(names), "scores"}), convention, benchmark)


def ask(exam: Exam, splits: Splits, tokenizer: Any, data: DataConfig) -> Asked:
    """The rows of every pass, in the tokens of one model. Raises UserError where a row does not fit the template."""
    config = exam.config
    template = resolve_template(exam.convention.template or data.template, tokenizer)

    def encoded(examples: Sequence[Example]) -> list[Encoded]:
        return encode(examples, tokenizer, template, data.max_length, exam.convention)

    plain = {split.name: encoded(split.examples) for split in splits if split.evaluated}
    scores: dict[str, list[Encoded]] = dict(plain)
    generations: dict[str, list[Encoded]] = {}
    for split in splits:
        if not split.evaluated:
            continue
        scores |= scored_views(exam, split.name, split.examples, encoded)
        if config.generate is not None:
            generations |= _generated(exam, split, plain[split.name], encoded, config.generate.limit)
    return Asked(exam, scores, generations)


def scored_views(
    exam: Exam, split: str, examples: Sequence[Example], encoded: Callable[[Sequence[Example]], list[Encoded]]
) -> dict[str, list[Encoded]]:
    """The rows of the scored views of a split, by `split@view`, without views that no row has."""
    found = {view: viewed(examples, view) for view in exam.views("scores") if view}
    whole = any(found.get(view) for view in _TOGETHER)
    return {
        f"{split}{AT}{view}": encoded(candidates)
        for view, candidates in found.items()
        if candidates or (whole and view in _TOGETHER)
    }


def _generated(exam: Exam, split: Split, plain: list[Encoded], encoded: Any, limit: int | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for view in exam.views("generations"):
        if view == "":
            rows[split.name] = plain[:limit]
        elif view == SAMPLED:
            if split.role == "forget":  # what leaks is asked of what was to go
                rows[_key(split, view)] = plain[:limit]
        elif examples := viewed(split.examples[:limit], view):
            rows[_key(split, view)] = encoded(examples)
    return rows


def _key(split: Split, view: str) -> str:
    return f"{split.name}{AT}{view}"
