"""One trial of a study: train, score the model in memory, keep the score tables alone; no weights are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.load import Loaded
from expunge.pipeline.evaluate import LazyModel, write_scores
from expunge.pipeline.job import Job
from expunge.pipeline.processes import process_count
from expunge.pipeline.resolve import rows_digest
from expunge.pipeline.stages import Stages, Variant, job_inputs, training_steps
from expunge.pipeline.trainer import DivergedError
from expunge.pipeline.training import fit
from expunge.runs.atomic import write_json

#: Folder of the trials inside a run directory.
TRIALS = "trials"
INFO = "info.json"

#: Called with a number of units (optimizer steps, scored rows) just finished, and a short note.
Tick = Callable[..., None]


@dataclass(frozen=True)
class TrialResult:
    """What a trial left: score tables per split in `path`, none of them if its training broke off."""

    name: str
    path: Path
    steps: int
    seconds: float  # of training and scoring together
    note: str  # on stop rules
    failed: str  # why the training broke off; "" if it did not
    skipped: bool  # it had been done before

    def table(self, split: str) -> pa.Table:
        """The SCORES table of a split."""
        return pq.read_table(self.path / f"{split}.parquet")


def run_trial(
    stages: Stages, name: str, start: Variant, rows: Mapping[str, Sequence[Encoded]], job: Job | None = None
) -> TrialResult:
    """Train `job` from `start` (None: leave the model as it is) and score it on every split of `rows`.

    A trial of equal inputs is not done again. A training whose loss becomes infinite is a result too, not an error.
    Raises UserError as training does otherwise, and under a launcher of several processes.
    """
    if process_count() > 1:
        raise UserError("studies run in one process", "start it without accelerate launch or torchrun")
    directory, evaluate, reporter = stages.directory, stages.resolved.recipe.evaluate, stages.reporter
    assert directory is not None
    inputs = {
        "model": start.digest,
        "dtype": evaluate.dtype,
        "rows": {split: rows_digest(chosen) for split, chosen in rows.items()},
        "job": None if job is None else job_inputs(job),
    }
    units = sum(map(len, rows.values())) + (0 if job is None else training_steps(job))

    def work(folder: Path) -> Mapping[str, Any]:
        with reporter.bar(name, units) as tick:

            def scored(trained: Loaded | None) -> None:
                model = LazyModel(start.config, evaluate.dtype, trained)
                write_scores(model, rows, evaluate, folder / "out", tick)

            if job is None:
                scored(None)
                info: dict[str, Any] = {"steps": 0}
            else:
                info = _train(job, folder, scored, tick)
        write_json(folder / "out" / INFO, {"trial": name, **info})
        return info

    done = directory.stage(f"{'scores' if job is None else 'trial'}/{name}", f"{TRIALS}/{name}", inputs, work)
    said = done.outputs
    return TrialResult(
        name, done.path, said["steps"], done.seconds, said.get("note", ""), said.get("failed", ""), done.skipped
    )


def _train(job: Job, folder: Path, scored: Callable[[Loaded], None], tick: Tick) -> dict[str, Any]:
    last = 0

    def on_step(step: int, terms: Mapping[str, float]) -> None:
        nonlocal last
        tick(step - last, f"loss {terms['loss']:.3f}")
        last = step

    try:
        with fit(job, folder, on_step=on_step) as fitted:
            scored(Loaded(fitted.model, fitted.tokenizer, fitted.folder, job.model.id))
            return {"steps": fitted.steps, **({"note": fitted.note} if fitted.note else {})}
    except DivergedError as error:  # anything else is the user's to mend
        (folder / "out").mkdir(exist_ok=True)
        return {"steps": last, "failed": error.message}
