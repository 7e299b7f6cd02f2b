"""Rows dealt to ranks and put together again: simulated, and with two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from expunge.models.tiny import build_tiny
from expunge.scoring.distributed import assemble, over_ranks, shard, world
from expunge.scoring.scores import score
from scoring_rows import random_rows

RANK_1 = "import sys, test_scoring_distributed as test; test.score_as_rank(1, sys.argv[1])"


def score_as_rank(rank: int, folder: str) -> pa.Table:
    """One of two processes that score together; it writes what it got."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        table = over_ranks(random_rows(7), partial(score, build_tiny()[0], batch_size=2))
        pq.write_table(table, f"{folder}/{rank}.parquet")
    finally:
        dist.destroy_process_group()
    return table


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shards_cover_every_row_once_and_assemble_in_order(ranks):
    rows = random_rows(7)
    model = build_tiny()[0]
    parts = [shard(rows, rank, ranks) for rank in range(ranks)]
    assert sorted(r.example.id for part in parts for r in part) == sorted(r.example.id for r in rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    whole = assemble([score(model, part, batch_size=2) for part in parts], rows)
    expected = score(model, rows, batch_size=2)
    assert whole.drop_columns(["logprob", "entropy", "mean_logprob", "std_logprob"]).equals(
        expected.drop_columns(["logprob", "entropy", "mean_logprob", "std_logprob"])
    )


def test_shards_have_like_loads():
    rows = random_rows(200, seed=1)
    loads = [sum(len(r.input_ids) for r in shard(rows, rank, 4)) for rank in range(4)]
    assert max(loads) < 1.05 * min(loads)


def test_one_process_works_on_everything():
    rows = random_rows(3)
    model = build_tiny()[0]
    assert world() == (0, 1)
    assert over_ranks(rows, partial(score, model, batch_size=2)).equals(score(model, rows, batch_size=2))


def test_two_processes_give_the_table_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, "-c", RANK_1, str(tmp_path)], env=environment)
    try:
        first = score_as_rank(0, str(tmp_path))
        assert other.wait(timeout=120) == 0
    finally:
        other.kill()
    alone = score(build_tiny()[0], random_rows(7), batch_size=2)
    for table in (first, pq.read_table(tmp_path / "1.parquet")):
        assert table.column("example_id").equals(alone.column("example_id"))
        for name in ("logprob", "entropy", "std_logprob"):
            ours, theirs = (t.column(name).combine_chunks().flatten() for t in (table, alone))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
