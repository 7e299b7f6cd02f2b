"""One unlearning inside a region, looked at on the way and relearned at the end; no weight is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expunge.attacks.base import Lesson
from expunge.localize.masks import Mask
from expunge.localize.quality import energy_inside
from expunge.models.drift import Tensors, open_tensors
from expunge.models.forward import unwrap
from expunge.models.names import layer_of
from expunge.pipeline.attacked import lesson_job
from expunge.pipeline.looks import Looks
from expunge.pipeline.stages import job_inputs
from expunge.pipeline.trainer import DivergedError
from expunge.pipeline.training import Fitted, fit, fit_further
from expunge.studies.localization import look_steps, relearn_steps
from expunge.studies.localization_record import Look, Relearning, Run

if TYPE_CHECKING:
    from expunge.pipeline.job import Job
    from expunge.pipeline.stages import Variant
    from expunge.recipe import ModelConfig
    from expunge.studies.ground import Ground, Planned
    from expunge.studies.localization import Localization
    from expunge.studies.localizing.measure import Measure

LOOKS, RELEARNED = "looks", "relearned"


@dataclass(frozen=True)
class Start:
    """What the unlearnings of a seed begin with: the injected model, how it was measured, and where its rows are."""

    seed: int
    variant: Variant
    look: Look
    truth: Mask


class Trials:
    """Makes unlearnings and relearnings as stages of the run directory; what was made before is read."""

    def __init__(self, ground: Ground, options: Localization, measure: Measure, relearn_rate: float) -> None:
        self.ground, self.options, self.measure, self.relearn_rate = ground, options, measure, relearn_rate
        self.relearn_at = relearn_steps(options.relearn, options.relearn_looks)

    def unlearn(self, start: Start, trial: Planned, mask: Mask) -> Run:
        """Train a trial's entry inside the mask, look, relearn, look again."""
        job = replace(self.ground.job(trial, start.variant), mask=mask)
        at = look_steps(self.options.steps, self.options.looks)
        again = self._lesson(start.variant.config, start.seed)
        inputs = {
            "model": start.variant.digest,
            "truth": start.truth.digest,
            "looks": at,
            **job_inputs(job),
            **self._inputs(again),
        }

        def work(folder: Path) -> Mapping[str, Any]:
            with self.ground.stages.reporter.bar(trial.name, at[-1] + self.options.relearn) as tick:
                made = self._unlearned(start, job, again, at, folder, tick)
            return _published(folder, made)

        done = self.ground.directory.stage(f"trial/{trial.name}", f"trials/{trial.name}", inputs, work)
        said = done.outputs
        looks = [] if said.get("failed") else [start.look, *self._read(done.path / LOOKS, at)]
        relearned = self._read(done.path / RELEARNED, self.relearn_at) if looks else []
        about = trial.about
        return Run(
            start.seed,
            about["method"],
            about["region"],
            looks,
            [replace(looks[-1], step=0), *relearned] if relearned else [],
            _number(said.get("energy_inside")),
            _number(said.get("update_norm")),
            said["steps"],
            done.seconds,
            said.get("note", ""),
            said.get("failed", ""),
        )

    def control(self, seed: int, reference: Variant, look: Look) -> tuple[Relearning, float]:
        """The relearning of the reference, and the seconds that it took."""
        job = self._lesson(reference.config, seed)
        name = f"relearn-reference-seed{seed}"

        def work(folder: Path) -> Mapping[str, Any]:
            with self.ground.stages.reporter.bar(name, self.options.relearn) as tick:
                looks = self._looks(folder / RELEARNED, self.relearn_at)
                try:
                    with fit(job, folder, on_step=_moved(tick), callbacks=[looks]) as fitted:
                        made: dict[str, Any] = {"steps": fitted.steps}
                except DivergedError as error:
                    made = {"steps": 0, "failed": error.message}
            return _published(folder, made)

        inputs = {"model": reference.digest, **self._inputs(job)}
        done = self.ground.directory.stage(f"control/{name}", f"controls/{name}", inputs, work)
        return Relearning(
            seed, [replace(look, step=0), *self._read(done.path / RELEARNED, self.relearn_at)]
        ), done.seconds

    # ------------------------------------------------------------ pieces

    def _unlearned(
        self, start: Start, job: Job, again: Job, at: Sequence[int], folder: Path, tick: Callable[..., None]
    ) -> dict[str, Any]:
        assert job.mask is not None
        if (layer := _reads(job)) is not None and all((layer_of(name) or 0) > layer for name in job.mask.inside):
            return {"steps": 0, "failed": f"the method reads layer {layer}, and the whole region lies above it"}
        try:
            with fit(job, folder, on_step=_moved(tick), callbacks=[self._looks(folder / LOOKS, at)]) as fitted:
                energy, norm = landed(open_tensors(job.model), fitted.model, job.mask, start.truth)
                made: dict[str, Any] = {"steps": fitted.steps, "energy_inside": energy, "update_norm": norm}
                notes = [fitted.note, self._relearned(again, fitted, folder, tick)]
                return {**made, "note": "; ".join(note for note in notes if note)}
        except DivergedError as error:
            return {"steps": 0, "failed": error.message}

    def _relearned(self, job: Job, fitted: Fitted, folder: Path, tick: Callable[..., None]) -> str:
        """Relearn in memory; why it broke off, if it did."""
        if not self.relearn_at:
            return ""
        looks = self._looks(folder / RELEARNED, self.relearn_at)
        try:
            fit_further(job, fitted, folder / "again", on_step=_moved(tick), callbacks=[looks])
        except DivergedError as error:
            return f"relearning broke off: {error.message}"
        return ""

    def _looks(self, folder: Path, at: Sequence[int]) -> Looks:
        tokenizer = self.ground.resolved.tokenizer

        def look(step: int, model: Any) -> None:
            place = folder / f"{step:06d}"
            if not place.is_dir():  # a step that is made again after a kill is the same again
                self.measure.write(model, tokenizer, place)

        return Looks(at, look)

    def _read(self, folder: Path, at: Sequence[int]) -> list[Look]:
        places = {step: folder / f"{step:06d}" for step in at}
        return [self.measure.look(place, step) for step, place in places.items() if place.is_dir()]

    def _lesson(self, model: ModelConfig, seed: int) -> Job:
        """Relearning: plain fine-tuning of all weights on the forget rows."""
        lesson = Lesson(
            self.ground.resolved.rows["forget"], max(1, self.options.relearn), self.relearn_rate, self.options.batch
        )
        job = lesson_job(lesson, model, seed)
        shared = self.ground.whole.recipe.unlearn[0].train
        kept = {"precision": shared.precision, "gradient_checkpointing": shared.gradient_checkpointing}
        return replace(job, train=job.train.model_copy(update={**kept, "checkpoint_every": shared.checkpoint_every}))

    def _inputs(self, again: Job) -> dict[str, Any]:
        relearned = {"at": self.relearn_at, **job_inputs(again)} if self.relearn_at else None
        return {**self.measure.inputs, "relearned": relearned}


def _reads(job: Job) -> int | None:
    """The layer below which all of a training's gradient stays; None if its loss is about what the model says."""
    return None if job.objective is None or job.has_retain_term else job.objective.hidden_layer()


def landed(before: Tensors, model: Any, mask: Mask, truth: Mask) -> tuple[float | None, float | None]:
    """(Part of the update's energy that is inside the truth, ‖update‖ over ‖weights inside the mask‖); None: no update.

    Reads one parameter at a time; the others are what they were.
    """
    moved = size = 0.0

    def changes() -> Iterator[tuple[str, Tensor, Tensor]]:
        nonlocal moved, size
        for name, parameter in unwrap(model).named_parameters():
            if name in mask.inside:
                old, new = before.read(name).float(), parameter.detach().float().cpu()
                moved += float((new - old).square_().sum(dtype=old.double().dtype))
                size += float((old.square() * mask.inside[name].cpu()).sum(dtype=old.double().dtype))
                yield name, old, new

    inside = energy_inside(changes(), truth)
    return inside, (moved / size) ** 0.5 if size > 0 and moved > 0 else None


def _published(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Copy the looks into the product: whoever is killed here finds the work folder as it was."""
    (folder / "out").mkdir()
    for name in (LOOKS, RELEARNED):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, folder / "out" / name)
    return made


def _moved(tick: Callable[..., None]) -> Callable[[int, Mapping[str, float]], None]:
    last = 0

    def on_step(step: int, terms: Mapping[str, float]) -> None:
        nonlocal last
        tick(step - last, f"loss {terms['loss']:.3f}")
        last = step

    return on_step


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
