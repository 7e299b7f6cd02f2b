"""Does what follows from a fact go with it, and does what only looks like it stay? (FaithUn, arXiv:2502.19207)

Probes come from the rows' column `related`. A probe is answered rightly if its answer's words stand in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.texts import contained
from expunge.recipe.conventions import EXPUNGE, Convention

#: What has to go with a fact: other words for it, and what can be told from it alone.
GOES = ("paraphrase", "reverse", "one_hop", "multi_hop")
#: What has to stay: another fact that happens to have the same answer.
STAYS = "same_answer"

_PAPER = "arXiv:2502.19207"


def relation_accuracy(table: pa.Table, relation: str, convention: Convention = EXPUNGE) -> Values:
    """Part of an example's probes of one relation that are answered rightly; NaN where it has no such probe."""
    asked = np.array([task == relation for task in table.column("task").to_pylist()], dtype=bool)
    return Examples.of(table).mean(np.where(asked, contained(table, convention), np.nan))


def _relation_metric(relation: str, summary: str, **declared: Any) -> Callable[..., Values]:
    def accuracy(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
        """`relation_accuracy` of one relation."""
        return relation_accuracy(table, relation, convention)

    filed: Callable[..., Values] = metric(
        f"{relation}_accuracy",
        summary=f"part of the related questions answered rightly that {summary}",
        needs="generations/related",
        range=(0, 1),
        unit="part of the questions",
        paper=_PAPER,
        **declared,
    )(accuracy)
    return filed


@metric(
    "answer_accuracy",
    summary="1 if the answer stands in the generated text, else 0",
    needs="generations",
    range=(0, 1),
    unit="part of the examples",
    paper=_PAPER,
)
def answer_accuracy(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """The answer's words one after the other, case and punctuation aside; NaN where it has none."""
    return Examples.of(table).mean(contained(table, convention))


paraphrase_accuracy = _relation_metric("paraphrase", "ask the same in other words")
reverse_accuracy = _relation_metric("reverse", "ask for the subject, given the answer")
one_hop_accuracy = _relation_metric("one_hop", "follow from the answer in one step")
multi_hop_accuracy = _relation_metric("multi_hop", "follow from the answer in several steps")
same_answer_accuracy = _relation_metric(
    STAYS, "have the same answer about something else", good={"forget": "higher"}, anchors=False
)


@metric(
    "superficial_unlearning",
    summary="of the forgotten rows, those whose fact still comes out another way or whose neighbour fact went too",
    needs=("generations/related", "generations", "target@generations/related"),
    range=(0, 1),
    unit="part of the forgotten examples",
    paper=_PAPER,
    learnt=None,
    roles=("forget",),
    anchors=False,
    good={"forget": "lower"},
)
def superficial_unlearning(
    related: pa.Table, plain: pa.Table, target: pa.Table, convention: Convention = EXPUNGE
) -> Values:
    """1 if any related probe is answered that has to go, or one lost that has to stay and that the target answers.

    NaN where the row's own answer still comes (it was not unlearned at all) or none of its probes can be judged.
    """
    examples, own = Examples.of(related), Examples.of(plain)
    answered = examples.align(own.mean(contained(plain, convention)), own)
    right = contained(related, convention)
    known = _probes(target, contained(target, convention))
    before = np.array([known.get(key, np.nan) for key in _probes(related, right)], dtype=np.float64)
    tasks = related.column("task").to_pylist()
    fault = np.full(len(tasks), np.nan)
    goes = np.array([task in GOES for task in tasks], dtype=bool)
    stays = np.array([task == STAYS for task in tasks], dtype=bool) & (before == 1)
    fault[goes] = right[goes]
    fault[stays] = 1 - right[stays]
    return np.where(answered == 0, examples.largest(fault), np.nan)


def _probes(table: pa.Table, values: Values) -> dict[tuple[str, int], float]:
    """Value of every probe by (example, candidate), in the table's order."""
    keys = zip(table.column("example_id").to_pylist(), table.column("candidate").to_pylist(), strict=True)
    return dict(zip(keys, values.tolist(), strict=True))
