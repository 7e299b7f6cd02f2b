"""Tables made by hand or at random, for tests of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Metric, TableShelf
from expunge.scoring.tables import GENERATIONS, SCORES


def table_of(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table of these rows; columns that they leave out get a plain value."""
    plain: dict[str, Any] = {
        "task": "",
        "candidate": 0,
        "is_text": False,
        "truncated": 0,
        "answer_zlib": 20,
        "entity": [],
        "group": "",
    }
    plain |= {"prompt": "", "new_tokens": 1, "stopped": True}
    return pa.Table.from_pylist([{f: row.get(f, plain.get(f)) for f in schema.names} for row in rows], schema=schema)


def scores_table(*rows: tuple[str, list[float]], **columns: Sequence[Any]) -> pa.Table:
    """Rows as (hits of the answer such as "101", log-probs of the answer); a wrong, unlikely terminator follows.

    `columns` replace whole columns: entity=[[True, False], …], example_id=[…], candidate=[…].
    """
    made = []
    for i, (text, values) in enumerate(rows):
        hits, numbers = [*(c == "1" for c in text), False], [*values, -50.0]
        row: dict[str, Any] = {"example_id": f"e{i}", "answer_tokens": len(text), "token_ids": [1] * len(hits)}
        row |= {"hit": hits} | dict.fromkeys(("logprob", "entropy", "mean_logprob", "std_logprob"), numbers)
        made.append(row | {name: column[i] for name, column in columns.items()})
    return table_of(SCORES, made)


def generations_table(*pairs: tuple[str, str], **columns: Sequence[Any]) -> pa.Table:
    """Rows as (answer, generated); `columns` replace whole columns."""
    rows = [{"example_id": f"e{i}", "answer": answer, "generated": said} for i, (answer, said) in enumerate(pairs)]
    named = [row | {name: column[i] for name, column in columns.items()} for i, row in enumerate(rows)]
    return table_of(GENERATIONS, named)


def random_tables(seed: int = 0) -> dict[str, pa.Table]:
    """A table of each pass, with answers of no, one and many tokens and words."""
    generator = np.random.default_rng(seed)
    rows, entities = [], []
    for length in [0, 1, 1, 2, *generator.integers(0, 30, size=40)]:
        hits = "".join("01"[h] for h in generator.integers(0, 2, size=length))
        rows.append((hits, (-generator.exponential(3, size=length)).tolist()))
        named = generator.random(length + 1) < 0.4
        entities.append(named.tolist() if generator.random() < 0.7 else [])
    words = ["a", "the", "running", "houses", "東京", "", "x1", "élan"]
    texts = [(" ".join(generator.choice(words, size=n)), " ".join(generator.choice(words, size=5))) for n in range(12)]
    return {"scores": scores_table(*rows, entity=entities), "generations": generations_table(*texts)}


def shelf(variant: str = "v", split: str = "s", **tables: pa.Table) -> TableShelf:
    """A shelf with the tables of one variant and split; `generations__jailbreak` is a view's."""
    return TableShelf({(variant, split, name.replace("__", "/")): table for name, table in tables.items()})


def is_plain(entry: Metric) -> bool:
    """Whether a metric is a mean over the rows of one plain table."""
    return entry.per_example and entry.needs in (("scores",), ("generations",))
