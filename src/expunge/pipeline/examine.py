"""Evaluation of models that exist already: the same passes and metrics as in a run, without a recipe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from expunge.data.encode import encode, truncation_note
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.metrics.base import METRICS
from expunge.models.load import load_tokenizer
from expunge.pipeline.evaluate import LazyModel, measure, read_tables, write_generations, write_scores
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig


def examine(
    models: Mapping[str, ModelConfig],
    data: DataConfig,
    config: EvaluateConfig,
    seed: int,
    output: Path | None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Records of every model × split × metric; `output` keeps the tables and metrics.json. Raises UserError."""
    quiet_libraries()
    for name in config.metrics or []:
        METRICS.get(name)
    splits = load_splits(data, seed)
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expunge-")))
        for name, model_config in models.items():
            tokenizer = load_tokenizer(model_config)
            template = resolve_template(data.template, tokenizer)
            rows = {split.name: encode(split.examples, tokenizer, template, data.max_length) for split in splits}
            for split, encoded in rows.items():
                note = truncation_note(encoded)
                if note:
                    reporter.line(f"  note: {split}: {note}")
            model = LazyModel(model_config, config.dtype)
            total = sum(map(len, rows.values()))
            with reporter.bar(f"scores/{name}", total) as tick:
                write_scores(model, rows, config, folder / "scores" / name, tick)
            if config.generate is not None:
                with reporter.bar(f"generations/{name}", total) as tick:
                    write_generations(model, rows, config, folder / "generations" / name, tick)

        def tables(variant: str, split: str) -> Mapping[str, Any]:
            return read_tables({kind: folder / kind / variant for kind in ("scores", "generations")}, split)

        records, _ = measure(models, splits, tables, config, seed)
        if output is not None:
            (output / "metrics.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return records
