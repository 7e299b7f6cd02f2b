"""One pass over several processes: rows are dealt out, and the table is put together again in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from expunge.data.encode import Encoded
from expunge.scoring.shared_prompts import prompt_groups


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(rows: Sequence[Encoded], rank: int, world: int) -> list[Encoded]:
    """The rows of one rank: dealt out by length, so that all ranks have as much to do. No row is repeated."""
    return [rows[i] for i in _deal(rows, rank, world)]


def assemble(parts: Sequence[pa.Table], rows: Sequence[Encoded]) -> pa.Table:
    """The tables of all ranks, in rank order, as one table in the order of `rows`."""
    dealt = [i for rank in range(len(parts)) for i in _deal(rows, rank, len(parts))]
    return pa.concat_tables(parts).take(pa.array(np.argsort(dealt), pa.int64()))


def over_ranks(rows: Sequence[Encoded], work: Callable[[Sequence[Encoded]], pa.Table]) -> pa.Table:
    """`work(rows)` shared by all ranks: each works on its shard, each gets the whole table.

    `work` must return one table row per given row, in their order, as `score` and `generate` do.
    """
    return tables_over_ranks(rows, lambda part: {"table": work(part)})["table"]


def tables_over_ranks(
    rows: Sequence[Encoded], work: Callable[[Sequence[Encoded]], Mapping[str, pa.Table]]
) -> dict[str, pa.Table]:
    """The same for work that gives several tables at once; one that a rank could not make is left out."""
    rank, size = world()
    if size == 1:
        return dict(work(rows))
    parts: list[Mapping[str, pa.Table]] = [{}] * size
    dist.all_gather_object(parts, dict(work(shard(rows, rank, size))))
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: assemble([part[name] for part in parts], rows) for name in names}


def _deal(rows: Sequence[Encoded], rank: int, world: int) -> list[int]:
    """Longest first; rows that share a prompt stay together, because it is computed once."""
    shared = prompt_groups(rows)
    alone = set(range(len(rows))).difference(*shared)
    units = [*shared, *([i] for i in alone)]
    units.sort(key=lambda unit: (-sum(len(rows[i].input_ids) for i in unit), unit[0]))
    return [i for unit in units[rank::world] for i in unit]
