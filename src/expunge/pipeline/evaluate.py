"""Each variant passes each split once for scores and once for generation; metrics are computed from the tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from expunge.data.encode import Encoded
from expunge.data.example import Splits
from expunge.metrics.anchoring import with_anchors
from expunge.metrics.base import METRICS, OTHER_KIND, Resampling, Shelf, evaluate_metrics, left_out
from expunge.models.load import Loaded, load_model
from expunge.pipeline.asked import AT, SAMPLED, Exam, Rows
from expunge.pipeline.processes import process_count, process_rank
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.scoring.distributed import over_ranks, tables_over_ranks
from expunge.scoring.divergence import TargetStates
from expunge.scoring.generate import Sampling, generate
from expunge.scoring.scores import score_tables
from expunge.scoring.tables import VALUES

Progress = Callable[[int], None]

#: The metric that verdicts rest on, and that every sound model has.
MAIN = "extraction_strength"


class LazyModel:
    """A model for evaluation, in memory already or loaded when the first pass needs it; adapters are folded."""

    def __init__(self, config: ModelConfig, dtype: str, given: Loaded | None = None) -> None:
        self.config = config.model_copy(update={"dtype": dtype})
        self._given = given
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        """The model on its device."""
        if self._loaded is None:
            loaded = self._given or load_model(self.config)
            model: Any = loaded.model
            if hasattr(model, "merge_and_unload"):
                model = model.merge_and_unload()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            for parameter in model.parameters():  # buffers (rotations) keep their precision, as when it is loaded
                parameter.data = parameter.data.to(getattr(torch, self.config.dtype))
            self._loaded = Loaded(model.to(device).eval(), loaded.tokenizer, loaded.folder, loaded.source)
        return self._loaded

    def generate(self, rows: Sequence[Encoded], **settings: Any) -> pa.Table:
        """The GENERATIONS table of rows; `settings` are those of `scoring.generate.generate`."""
        return generate(self.loaded.model, self.loaded.tokenizer, rows, **settings)


#: Folder of the target's states beside its score tables, one for each process.
STATES = "states"


def write_scores(
    model: LazyModel,
    rows: Rows,
    config: EvaluateConfig,
    out: Path,
    progress: Progress,
    keep: bool = False,
    against: Path | None = None,
) -> dict[str, Any]:
    """The scoring pass: one parquet file per split and view.

    `keep` leaves what the target says of the plain rows in `out/states`, a folder that later passes are given as
    `against`: they then also write `out/divergence/<split>.parquet`.
    """
    states = TargetStates(out / "kept", wanted=_is_plain(rows)) if keep else None
    target = TargetStates.load(against / f"{process_rank()}") if against is not None else None

    def one_pass(chosen: Sequence[Encoded]) -> dict[str, pa.Table]:
        loaded = model.loaded
        settings: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
        made = score_tables(loaded.model, chosen, tokenizer=loaded.tokenizer, keep=states, against=target, **settings)
        return {"" if name == "scores" else name: table for name, table in made.items()}

    done = _write_tables(rows, out, one_pass, {"dtype": config.dtype})
    if states is not None and states.problem is None:
        states.save(out / STATES / f"{process_rank()}")
        shutil.rmtree(out / "kept", ignore_errors=True)
    return done


def _is_plain(rows: Rows) -> Callable[[Encoded], bool]:
    """Whether a row belongs to a split itself, not to one of its views."""
    plain = {id(row) for name, split in rows.items() if AT not in name for row in split}
    return lambda row: id(row) in plain


def write_generations(
    model: LazyModel, rows: Rows, config: EvaluateConfig, out: Path, progress: Progress
) -> dict[str, Any]:
    """The generation pass: one parquet file per split and view; greedy, and `config.samples` draws for `@sampled`."""
    settings = config.generate
    assert settings is not None
    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    metadata = {"dtype": config.dtype, "max_new_tokens": str(limits["max_new_tokens"])}

    def greedy(chosen: Sequence[Encoded]) -> dict[str, pa.Table]:
        return {"": model.generate(chosen, progress=progress, **limits)}

    drawn = {name: split for name, split in rows.items() if name.endswith(AT + SAMPLED)}
    done = _write_tables({name: split for name, split in rows.items() if name not in drawn}, out, greedy, metadata)
    for name, split in drawn.items():
        table = _drawn(model, split, config.samples, progress, limits)
        if process_rank() == 0:
            pq.write_table(table.replace_schema_metadata(metadata), out / f"{name}.parquet")
        done["rows"][name] = len(split)
    return done


def _drawn(
    model: LazyModel, rows: Sequence[Encoded], count: int, progress: Progress, limits: Mapping[str, Any]
) -> pa.Table:
    """`count` samples of every row: drawn together in one process, one by one where several share the work."""
    if process_count() == 1:
        return model.generate(rows, progress=progress, sampling=Sampling(count=count), **limits)
    each = [replace(row, example=replace(row.example, candidate=number)) for row in rows for number in range(count)]
    return over_ranks(each, lambda part: model.generate(part, progress=progress, sampling=Sampling(), **limits))


def _write_tables(
    rows: Rows, out: Path, make: Callable[[Sequence[Encoded]], Mapping[str, pa.Table]], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """One pass over the rows of all splits together, so that batches are full; then a file per split.

    The table called "" lies in `out`, another one in the folder of its name there.
    """
    made = tables_over_ranks([row for split in rows.values() for row in split], make)
    for table_name, whole in made.items() if process_rank() == 0 else ():
        folder, start = out / table_name, 0
        folder.mkdir(parents=True, exist_ok=True)
        for name, split in rows.items():
            if table_name == "" or AT not in name:
                table = whole.slice(start, len(split)).replace_schema_metadata(dict(metadata))
                pq.write_table(table, folder / f"{name}.parquet")
            start += len(split)
    return {"rows": {name: len(split) for name, split in rows.items()}}


@dataclass(frozen=True)
class FolderShelf:
    """The tables of an evaluation on disk: `<kind>/<variant>/<split>[@view].parquet` under one folder."""

    root: Path

    def find(self, variant: str, split: str, table: str) -> pa.Table | None:
        """The table, or None where its file is not there."""
        kind, _, view = table.partition("/")
        folder = self.root / kind / variant
        if kind == "divergence":  # the scoring pass makes it on the way
            folder = self.root / "scores" / variant / kind
        path = folder / f"{split}{AT + view if view else ''}.parquet"
        return _read(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> pa.Table:
    return pq.read_table(path)


def measure(
    variants: Iterable[str], splits: Splits, shelf: Shelf, exam: Exam, resampling: Resampling
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Records and per-example values of every variant × split × metric, anchored where target and reference are."""
    records: list[dict[str, Any]] = []
    values: list[pa.Table] = []
    for variant in variants:
        for split, role in _measured(splits):
            found, each = evaluate_metrics(shelf, role, exam.metrics, resampling, variant, split, exam.convention)
            records += found
            values.append(each)
    table = pa.concat_tables(values) if values else VALUES.empty_table()
    return with_anchors(_said(records), table, resampling), table


def _said(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without metrics that have nothing to say of a split, whichever the model (no row names entities, …).

    Where the main metric has nothing to say either, models are broken, and that must show.
    """
    scored = {(record["split"], record["metric"]) for record in records if record["n"]}
    sound = {split for split, metric in scored if metric == MAIN}
    return [r for r in records if (r["split"], r["metric"]) in scored or r["split"] not in {*sound, "model"}]


def not_measured(
    variants: Iterable[str], splits: Splits, shelf: Shelf, exam: Exam, records: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Metric → what is missing, for the metrics that nothing could be said of."""
    made = {record["metric"] for record in records}
    missing: dict[str, str] = {}
    whole: set[str] = set()  # had all that they need, and yet no row could be scored
    for variant in variants:
        for split, role in _measured(splits):
            found = left_out(shelf, exam.metrics, variant, split, role)
            missing |= {name: _reason(address) for name, address in found.items() if name not in missing}
            whole |= {name for name in exam.metrics if name not in found and role in METRICS.get(name).roles}
    said = dict.fromkeys(whole, "no row could be scored")
    return {name: {**missing, **said}.get(name) or _of_roles(name) for name in exam.metrics if name not in made}


def _of_roles(name: str) -> str:
    """What is wanted where no split has a role that the metric is about."""
    return f"needs {' or '.join(METRICS.get(name).roles)} rows"


def _measured(splits: Splits) -> list[tuple[str, str]]:
    """(name, role) of the splits that are measured, and of the model as a whole."""
    return [*((split.name, split.role) for split in splits if split.evaluated), ("model", "utility")]


def _reason(address: str) -> str:
    """What a user would have to give for a table to be there."""
    if address == OTHER_KIND:
        return "needs forget and holdout rows of one kind, answers or plain texts"
    variant, _, rest = address.rpartition("@")
    split, _, table = rest.rpartition(":")
    kind, _, view = table.partition("/")
    if variant:
        return f"needs a {variant} model"
    if split and split != "model":
        return f"needs {split} rows"
    if view in ("paraphrase", "paraphrased_answer", "perturbed_answer", "related"):
        # wrong answers and the right one in their form go together
        wrong = "perturbed_answer, or paraphrased_answer"
        column = {"paraphrase": "paraphrased_question", "related": "related"}.get(view, wrong)
        return f"needs rows with the column {column}"
    beside = {"divergence": "needs a target model", "weights": "needs a target model"}
    return {**beside, "layers": "needs a target and a reference model"}.get(
        kind, f"needs {kind} ({view})" if view else f"needs {kind}"
    )
