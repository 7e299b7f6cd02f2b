"""Answers that the start model itself gives to the forget prompts when it is sampled: alternatives for altpo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.data.alternatives import with_answers
from expunge.data.encode import Encoded, encode
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.processes import process_rank
from expunge.recipe import AlternativesConfig
from expunge.scoring.distributed import over_ranks
from expunge.scoring.generate import Sampling

if TYPE_CHECKING:
    from expunge.pipeline.resolve import Resolved

_FILE = "samples.parquet"


def write_samples(
    model: LazyModel,
    rows: Sequence[Encoded],
    settings: AlternativesConfig,
    seed: int,
    out: Path,
    progress: Callable[[int], None],
) -> None:
    """`count` samples per row, those of a row one after another."""
    out.mkdir(parents=True, exist_ok=True)

    sampling = Sampling(settings.temperature, seed)

    def one_pass(chosen: Sequence[Encoded]) -> pa.Table:
        limits = {"max_new_tokens": settings.max_new_tokens, "batch_size": 32}
        return model.generate(chosen, progress=progress, sampling=sampling, **limits)

    drawn = [
        replace(row, example=replace(row.example, candidate=number)) for row in rows for number in range(settings.count)
    ]
    table = over_ranks(drawn, one_pass)
    if process_rank() == 0:
        pq.write_table(table, out / _FILE)


def read_samples(folder: Path, resolved: Resolved) -> list[list[Encoded]]:
    """The samples of each forget row, in tokens."""
    said: list[str] = pq.read_table(folder / _FILE, columns=["generated"])["generated"].to_pylist()
    rows = resolved.rows["forget"]
    count = len(said) // len(rows)
    made: list[list[Encoded]] = []
    for number, row in enumerate(rows):
        examples: list[Any] = with_answers(row.example, said[number * count : (number + 1) * count])
        made.append(encode(examples, resolved.tokenizer, resolved.template, resolved.recipe.data.max_length))
    return made
