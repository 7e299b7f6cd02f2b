"""One pass over several processes: rows are dealt out, and the table is put together again in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from expunge.data.encode import Encoded


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(rows: Sequence[Encoded], rank: int, world: int) -> list[Encoded]:
    """The rows of one rank: dealt out by length, so that all ranks have as much to do. No row is repeated."""
    return [rows[i] for i in _deal(rows, rank, world)]


def gather(part: pa.Table, rows: Sequence[Encoded]) -> pa.Table:
    """On every rank the whole table in the order of `rows`, from each rank's table of its `shard`."""
    _, size = world()
    if size == 1:
        return part
    parts: list[pa.Table | None] = [None] * size
    dist.all_gather_object(parts, part)
    return assemble([table for table in parts if table is not None], rows)


def assemble(parts: Sequence[pa.Table], rows: Sequence[Encoded]) -> pa.Table:
    """The tables of all ranks, in rank order, as one table in the order of `rows`."""
    dealt = [i for rank in range(len(parts)) for i in _deal(rows, rank, len(parts))]
    return pa.concat_tables(parts).take(pa.array(np.argsort(dealt), pa.int64()))


def over_ranks(rows: Sequence[Encoded], work: Callable[[Sequence[Encoded]], pa.Table]) -> pa.Table:
    """`work(rows)` shared by all ranks: each works on its shard, each gets the whole table.

    `work` must return one table row per given row, in their order, as `score` and `generate` do.
    """
    rank, size = world()
    return gather(work(shard(rows, rank, size)), rows) if size > 1 else work(rows)


def _deal(rows: Sequence[Encoded], rank: int, world: int) -> list[int]:
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    return order[rank::world]
