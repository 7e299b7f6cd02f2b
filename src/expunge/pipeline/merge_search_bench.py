"""Where a search measures: one model in memory, one scoring pass per merge, and a journal of what was measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.merging.in_memory import InMemory
from expunge.merging.inputs import Inputs
from expunge.metrics.base import METRICS, Resampling, TableShelf, evaluate_metrics
from expunge.models.load import load_model, resolve_folder
from expunge.pipeline.asked import AT
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.merge_search import Measured
from expunge.pipeline.merge_search_rows import HOLDOUT, SearchRows
from expunge.pipeline.merge_search_space import Setting
from expunge.pipeline.resolve import rows_digest
from expunge.recipe import ModelConfig
from expunge.report.search_record import Estimate
from expunge.runs.atomic import disk_errors
from expunge.runs.provenance import file_digest
from expunge.scoring.scores import score

#: Variants whose tables a metric may ask for beside those of the merge itself.
TARGET, REFERENCE, MERGED = "target", "reference", "merged"
_GB = 10**9

Tables = Mapping[str, pa.Table]  # by `split` or `split@view`
Tick = Callable[..., None]


class Journal:
    """What was measured, a line per model, appended as it comes; a line that a kill cut off does not count."""

    def __init__(self, path: Path, inputs: str) -> None:
        """Take up what stands there for the same `inputs`; what was measured on others is removed."""
        self.path = path
        self._known: dict[str, Measured] = {}
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _lines(path)
            if lines and lines[0].get("made_by") == "expunge merge --search" and lines[0].get("inputs") == inputs:
                self._known = {line["key"]: _measured(line) for line in lines[1:]}
            else:
                path.unlink(missing_ok=True)
                self._append({"made_by": "expunge merge --search", "inputs": inputs})

    def get(self, key: str, names: Sequence[str]) -> Measured | None:
        """What was measured of a model, if it has all of these numbers."""
        found = self._known.get(key)
        if found is None or (not found.failed and any(name not in found.values for name in names)):
            return None
        return found

    def add(self, key: str, measured: Measured) -> None:
        """Keep what was measured."""
        before = self._known.get(key)
        if before is not None:  # for other aims: both are known now, and both took their time
            values = {**before.values, **measured.values}
            measured = Measured(values, before.seconds + measured.seconds, measured.failed)
        self._known[key] = measured
        plain = {name: estimate.model_dump() for name, estimate in measured.values.items()}
        self._append({"key": key, "seconds": measured.seconds, "failed": measured.failed, "values": plain})

    def _append(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, ensure_ascii=False) + "\n"
        with disk_errors(self.path.parent), self.path.open("ab") as file:
            if file.tell() and not _ends_whole(self.path):
                file.write(b"\n")
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


class Bench:
    """Measures merges of opened inputs. The model is loaded when the first one is not in the journal."""

    def __init__(
        self, opened: Inputs, rows: SearchRows, base: ModelConfig, reference: ModelConfig | None, journal: Journal,
        tick: Tick, memory: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        assert opened.base is not None
        self.opened, self.rows, self.journal, self.tick = opened, rows, journal, tick
        self._config = base.model_copy(
            update={"id": str(opened.base.folder), "revision": None, "dtype": rows.evaluate.dtype}
        )
        self._reference = reference
        self._budget = int(memory * _GB)
        self._resampling = Resampling(rows.evaluate.bootstrap, seed)
        self._memory: InMemory | None = None
        self._tokenizer: Any = None
        self._beside: dict[str, Tables] = {}  # tables of target and reference, where a metric asks for them
        self._names = [f"{split}:{metric}" for split, metric in rows.measures]

    def measure(self, setting: Setting | None) -> Measured:
        """The metrics of a merge (None: the base itself). What can't be merged has no values, and a reason."""
        key = TARGET if setting is None else setting.key
        known = self.journal.get(key, self._names)
        if known is not None:
            self.tick(self._count)
            return known
        began, failed, values = time.monotonic(), "", {}
        try:
            self._set(setting)
        except UserError as error:
            failed = error.message
            self.tick(self._count)
        if not failed:
            values = self._values(self._pass(self._in_memory.model, self._tokenizer))
        found = Measured(values, time.monotonic() - began, failed)
        self.journal.add(key, found)
        return found

    def reference(self) -> Measured:
        """The metrics of the reference model, which is in memory for that long only."""
        known = self.journal.get(REFERENCE, self._names)
        if known is not None:
            return known
        began = time.monotonic()
        values = self._values(self._tables_of(REFERENCE))
        found = Measured(values, time.monotonic() - began)
        self.journal.add(REFERENCE, found)
        return found

    def close(self) -> None:
        """Let go of the model."""
        self._memory = None
        self._beside.clear()

    @property
    def _count(self) -> int:
        return sum(map(len, self.rows.rows.values()))

    @property
    def _in_memory(self) -> InMemory:
        if self._memory is None:
            loaded = load_model(self._config)
            self._tokenizer = loaded.tokenizer
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._memory = InMemory(loaded.model.to(device).eval(), self.opened, self._budget)
        return self._memory

    def _set(self, setting: Setting | None) -> None:
        if setting is None:
            self._in_memory.reset()
        else:
            self._in_memory.set(setting.plan())

    def _pass(self, model: torch.nn.Module, tokenizer: Any) -> Tables:
        """One scoring pass over the rows of all splits together."""
        together: list[Encoded] = [row for rows in self.rows.rows.values() for row in rows]
        size = self.rows.evaluate.batch_size
        whole = score(model, together, batch_size=size, tokenizer=tokenizer, progress=self.tick)
        tables, start = {}, 0
        for name, rows in self.rows.rows.items():
            tables[name] = whole.slice(start, len(rows))
            start += len(rows)
        return tables

    def _values(self, tables: Tables) -> dict[str, Estimate]:
        values: dict[str, Estimate] = {}
        for split, metric in self.rows.measures:
            shelf = TableShelf(self._shelf(split, metric, tables))
            role = self.rows.roles[split]
            records, _ = evaluate_metrics(shelf, role, [metric], self._resampling, MERGED, split, self.rows.convention)
            found = records[0] if records else {}
            values[f"{split}:{metric}"] = Estimate(
                value=found.get("value"), low=found.get("ci_low"), high=found.get("ci_high"),
                n=found.get("n") or 0, unscored=found.get("unscored") or 0,
            )  # fmt: skip
        return values

    def _shelf(self, split: str, metric: str, tables: Tables) -> dict[tuple[str, str, str], pa.Table]:
        """The tables that a metric finds, under the names by which it asks for them."""
        found = {}
        for need in METRICS.get(metric).addresses:
            asked = need.split or split
            place = self.rows.against or HOLDOUT if need.split == HOLDOUT else asked
            view = need.table.partition("/")[2]
            source = tables if need.variant is None else self._tables_of(need.variant)
            found[need.variant or MERGED, asked, need.table] = source[f"{place}{AT}{view}" if view else place]
        return found

    def _tables_of(self, variant: str) -> Tables:
        """The tables of target or reference."""
        if variant not in self._beside:
            if variant == TARGET:
                self._set(None)
                self._beside[variant] = self._pass(self._in_memory.model, self._tokenizer)
            else:
                assert self._reference is not None
                lazy = LazyModel(self._reference, self.rows.evaluate.dtype)
                self._beside[variant] = self._pass(lazy.loaded.model, lazy.loaded.tokenizer)
        return self._beside[variant]


def inputs_digest(opened: Inputs, rows: SearchRows, reference: ModelConfig | None) -> str:
    """sha256 of all that measured numbers depend on: weights, rows, dtype, convention."""
    beside = None
    if reference is not None and rows.needs_reference:
        place = resolve_folder(reference.id, reference.revision)
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        beside = [file_digest(file) for file in files]
    about = {
        "models": [[file_digest(file) for file in source.files] for source in opened.sources],
        "configs": [_configs(source.folder) for source in opened.sources],
        "reference": beside,
        "rows": {name: rows_digest(some) for name, some in rows.rows.items()},
        "ids": [row.example.id for some in rows.rows.values() for row in some],
        "against": rows.against,
        "dtype": rows.evaluate.dtype,
        "convention": repr(rows.convention),
        "bootstrap": rows.evaluate.bootstrap,
    }
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _configs(folder: Path) -> list[str]:
    return [file_digest(folder / name) for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]


def _measured(line: Mapping[str, Any]) -> Measured:
    values = {name: Estimate.model_validate(estimate) for name, estimate in line["values"].items()}
    return Measured(values, float(line["seconds"]), str(line["failed"]))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; empty where there is none of ours."""
    found: list[dict[str, Any]] = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off by a kill
            if isinstance(line, dict) and (not found or "key" in line):
                found.append(line)
    except (OSError, ValueError):
        return []
    return found


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
