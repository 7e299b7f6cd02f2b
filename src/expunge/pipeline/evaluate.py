"""Each variant passes each split once for scores and once for generation; metrics are computed from the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from expunge.data.encode import Encoded
from expunge.data.example import Splits
from expunge.metrics.base import evaluate_metrics
from expunge.models.load import Loaded, load_model
from expunge.pipeline.processes import process_rank
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.scoring.distributed import over_ranks
from expunge.scoring.generate import generate
from expunge.scoring.scores import score
from expunge.scoring.tables import VALUES

Rows = Mapping[str, Sequence[Encoded]]
Progress = Callable[[int], None]


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


def write_scores(model: LazyModel, rows: Rows, config: EvaluateConfig, out: Path, progress: Progress) -> dict[str, Any]:
    """The scoring pass: one parquet file per split."""

    def one_pass(chosen: Sequence[Encoded]) -> pa.Table:
        return score(model.loaded.model, chosen, batch_size=config.batch_size, progress=progress)

    return _write_tables(rows, out, one_pass, {"dtype": config.dtype})


def write_generations(
    model: LazyModel, rows: Rows, config: EvaluateConfig, out: Path, progress: Progress
) -> dict[str, Any]:
    """The generation pass: one parquet file per split, at most `limit` rows each."""
    settings = config.generate
    assert settings is not None

    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}

    def one_pass(chosen: Sequence[Encoded]) -> pa.Table:
        return model.generate(chosen, progress=progress, **limits)

    limited = {name: split[: settings.limit] for name, split in rows.items()}
    return _write_tables(
        limited, out, one_pass, {"dtype": config.dtype, "max_new_tokens": str(settings.max_new_tokens)}
    )


def _write_tables(
    rows: Rows, out: Path, make: Callable[[Sequence[Encoded]], pa.Table], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """One pass over the rows of all splits together, so that batches are full; then a file per split."""
    out.mkdir(parents=True, exist_ok=True)
    whole = over_ranks([row for split in rows.values() for row in split], make)
    start = 0
    for name, split in rows.items():
        table = whole.slice(start, len(split)).replace_schema_metadata(dict(metadata))
        start += len(split)
        if process_rank() == 0:
            pq.write_table(table, out / f"{name}.parquet")
    return {"rows": {name: len(split) for name, split in rows.items()}}


def measure(
    variants: Iterable[str],
    splits: Splits,
    tables: Callable[[str, str], Mapping[str, pa.Table]],
    config: EvaluateConfig,
    seed: int,
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Records and per-example values of every variant × split × metric; `tables(variant, split)` gives the tables."""
    records: list[dict[str, Any]] = []
    values: list[pa.Table] = []
    for variant in variants:
        for split in splits:
            found = tables(variant, split.name)
            new_records, new_values = evaluate_metrics(
                found, split.role, config.metrics, config.bootstrap, seed, variant, split.name
            )
            records += new_records
            values.append(new_values)
    return records, pa.concat_tables(values) if values else VALUES.empty_table()


def read_tables(folders: Mapping[str, Path], split: str) -> dict[str, pa.Table]:
    """The tables of one split that are on disk, by name of table."""
    files = {name: folder / f"{split}.parquet" for name, folder in folders.items()}
    return {name: pq.read_table(file) for name, file in files.items() if file.is_file()}
