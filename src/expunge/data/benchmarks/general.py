"""General knowledge that every small language model has: sentences to be continued, each with three wrong ends.

It is for a look at what a training broke beside its subject, in seconds and without a download; it is no measure of
ability, for which there is MMLU. A row is answered rightly if the right end is likelier than every wrong one, so chance
is 1/4. Within a task every end is right in one row and wrong in three: neither its length nor how common it is tells.

    "The capital city of Japan is" → "Tokyo", not "Rome", "Berlin", "Madrid"
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from expunge.data.benchmarks.combine import plain
from expunge.data.example import Example, Split, Splits
from expunge.data.load import load_examples
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Measured, Request
from expunge.recipe import SourceConfig

NAME = "general"
#: of the likelihood of the ends, and under which convention they are asked
METRIC, CONVENTION = "choice_accuracy", "running-text"
CHANCE = 0.25


def general_knowledge() -> list[Example]:
    """The rows, with their wrong ends as `perturbed_answer`."""
    return load_examples(SourceConfig(path=str(Path(__file__).with_name("general.jsonl"))), NAME)


def _load(request: Request) -> Splits:
    return Splits({NAME: Split(NAME, "utility", tuple(general_knowledge()))})


def accuracy(measured: Measured) -> Aggregate:
    """Part of the rows that are answered rightly."""
    value = measured.mean(NAME, METRIC)
    rows = len(measured.values(NAME, METRIC))
    note = (
        f"{rows} rows: standard error {math.sqrt(value * (1 - value) / rows):.3f}" if value is not None and rows else ""
    )
    summary = f"accuracy on general knowledge; chance is {CHANCE}"
    return replace(plain(NAME, summary, value, f"{METRIC} on {NAME}", note=note), official=False)


def aggregates(measured: Measured) -> list[Aggregate]:
    """The accuracy, as a whole and by task."""
    by_task = [
        plain(f"{NAME}_{task}", f"accuracy on {task}", measured.mean(NAME, METRIC, task), f"{METRIC} on {task}")
        for task in measured.tasks(NAME)
    ]
    return [accuracy(measured), *(replace(number, official=False) for number in by_task)]


BENCHMARKS.register(NAME)(
    Benchmark(
        name=NAME,
        description="generic facts that small models know (capitals, opposites, tools, …), to see what else broke",
        load=_load,
        metrics=(METRIC, "choice_accuracy_normalised"),
        convention=CONVENTION,
        aggregate=aggregates,
    )
)
