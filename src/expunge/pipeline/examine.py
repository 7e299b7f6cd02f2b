"""Evaluation of models that exist already: the same passes and metrics as in a run, without a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import expunge
from expunge.data.encode import encode, truncation_note
from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.metrics.base import METRICS
from expunge.pipeline.evaluate import LazyModel, measure, read_tables, write_generations, write_scores
from expunge.pipeline.preflight import Candidate, check_context, open_candidate, other_token
from expunge.pipeline.processes import process_rank
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig
from expunge.runs.atomic import disk_errors, write_json
from expunge.runs.output import check_output, whole_folder

RECORD = "evaluation.json"


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
    if output is not None:
        check_output(output, RECORD)
    for name in config.metrics or []:
        METRICS.get(name)
    splits = load_splits(data, seed)
    candidates = {name: open_candidate(given) for name, given in models.items()}
    _note_other_tokenizers(candidates, reporter)
    with ExitStack() as stack:
        if output is not None and process_rank() == 0:
            about = {"schema": "expunge.eval/1", "expunge": expunge.__version__, "models": models, "data": data}
            folder = stack.enter_context(whole_folder(output, RECORD, {**about, "evaluate": config, "seed": seed}))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expunge-")))
        stack.enter_context(disk_errors(folder))
        for name, candidate in candidates.items():
            _write_passes(name, candidate, splits, data, config, folder, reporter)

        def tables(variant: str, split: str) -> Mapping[str, Any]:
            return read_tables({kind: folder / kind / variant for kind in ("scores", "generations")}, split)

        records, _ = measure(models, splits, tables, config, seed)
        write_json(folder / "metrics.json", records)
    return records


def _write_passes(
    name: str,
    candidate: Candidate,
    splits: Splits,
    data: DataConfig,
    config: EvaluateConfig,
    folder: Path,
    reporter: Reporter,
) -> None:
    """Both passes of one model, over rows in its own tokens."""
    template = resolve_template(data.template, candidate.tokenizer)
    rows = {split.name: encode(split.examples, candidate.tokenizer, template, data.max_length) for split in splits}
    check_context(candidate, rows)
    for split, encoded in rows.items():
        note = truncation_note(encoded)
        if note:
            reporter.line(f"  note: {split}: {note}")
    model = LazyModel(candidate.config, config.dtype)
    total = sum(map(len, rows.values()))
    with reporter.bar(f"scores/{name}", total) as tick:
        write_scores(model, rows, config, folder / "scores" / name, tick)
    if config.generate is not None:
        with reporter.bar(f"generations/{name}", total) as tick:
            write_generations(model, rows, config, folder / "generations" / name, tick)


def _note_other_tokenizers(candidates: Mapping[str, Candidate], reporter: Reporter) -> None:
    """Each model reads the rows in its own tokens, which a reader of the numbers must know."""
    (first, one), *others = candidates.items()
    for name, two in others:
        token = other_token(one.tokenizer, two.tokenizer)
        if token is not None:
            reporter.line(
                f"  note: {first} and {name} have different tokenizers ({token}): numbers per token differ in unit"
            )
