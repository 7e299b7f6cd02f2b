"""Many runs as two tables in DuckDB: what each run is (`runs`), and everything that was measured (`metrics`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.runs import record
from expunge.runs.lock import is_running

if TYPE_CHECKING:
    import duckdb

_RUNS = {
    "path": "VARCHAR",
    "name": "VARCHAR",
    "status": "VARCHAR",
    "started": "TIMESTAMP",  # UTC
    "seconds": "DOUBLE",
    "model": "VARCHAR",
    "methods": "VARCHAR[]",
    "result": "VARCHAR",
    "seed": "BIGINT",
    "recipe_digest": "VARCHAR",
    "expunge": "VARCHAR",
}
_METRICS = {
    "path": "VARCHAR",
    "variant": "VARCHAR",
    "split": "VARCHAR",
    "metric": "VARCHAR",
    "value": "DOUBLE",
    "ci_low": "DOUBLE",
    "ci_high": "DOUBLE",
    "n": "BIGINT",
    "unscored": "BIGINT",
    "direction": "VARCHAR",
}

#: One metric of the target and of the result on two splits, side by side, newest run first.
_MAIN = """
SELECT r.*,
       max(m.value) FILTER (m.variant = 'target'   AND m.split = 'forget') AS forget_before,
       max(m.value) FILTER (m.variant = r.result   AND m.split = 'forget') AS forget_after,
       max(m.value) FILTER (m.variant = 'target'   AND m.split = 'retain') AS retain_before,
       max(m.value) FILTER (m.variant = r.result   AND m.split = 'retain') AS retain_after,
       max(m.value) FILTER (m.variant = 'reference' AND m.split = 'forget') AS forget_reference
FROM runs r LEFT JOIN metrics m ON m.path = r.path AND m.metric = ?
GROUP BY ALL ORDER BY r.started DESC NULLS LAST, r.path
"""


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Every run directory at or below `paths`, sorted. Raises UserError for a path that does not exist."""
    found: set[Path] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(
                f"no folder {path}", "give the folder that holds your runs, for instance: expunge runs runs"
            )
        found.update(_below(path))
    return sorted(found)


def catalogue(paths: Iterable[str | Path]) -> duckdb.DuckDBPyConnection:
    """A database in memory with the tables `runs` and `metrics` of every run at or below `paths`.

    `catalogue(["runs"]).sql("SELECT path, value FROM metrics WHERE …")` asks it anything.
    """
    import duckdb

    runs, metrics = [], []
    for folder in find_runs(paths):
        try:
            runs.append(_run_row(folder))
        except UserError:  # a run.json of something else: not ours to list
            continue
        metrics.extend(_metric_rows(folder))
    database = duckdb.connect(":memory:")
    for name, columns, rows in (("runs", _RUNS, runs), ("metrics", _METRICS, metrics)):
        _fill(database, name, columns, rows)
    return database


def main_numbers(paths: Iterable[str | Path], metric: str = "extraction_strength") -> list[dict[str, Any]]:
    """One row per run, newest first: what it is, and `metric` on forget and retain before and after."""
    result = catalogue(paths).execute(_MAIN, [metric])
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _below(folder: Path) -> Iterator[Path]:
    if (folder / record.NAME).is_file():
        yield folder
        return  # runs do not hold runs
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith(".") and not entry.is_symlink():
            yield from _below(entry)


def _run_row(folder: Path) -> dict[str, Any]:
    data = record.read_record(folder / record.NAME)
    row = {name: data.get(name) for name in _RUNS}
    if data.get("status") == "running" and not is_running(folder):
        row["status"] = "killed"
    return row | {"path": str(folder), "expunge": (data.get("environment") or {}).get("expunge")}


def _metric_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not evaluated yet
        return []
    if not isinstance(records, list):
        return []
    return [{name: entry.get(name) for name in _METRICS} | {"path": str(folder)} for entry in records]


def _fill(database: duckdb.DuckDBPyConnection, name: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """A table from rows; one JSON text and one query, since row-by-row inserts take a millisecond each."""
    typed = ", ".join(f"{column} {kind}" for column, kind in columns.items())
    shape = json.dumps([columns])
    database.execute(f"CREATE TABLE {name} ({typed})")
    if rows:
        unpacked = "SELECT unnest(from_json(?::JSON, ?), recursive := true)"
        database.execute(f"INSERT INTO {name} BY NAME {unpacked}", [json.dumps(rows), shape])
