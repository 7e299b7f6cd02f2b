"""The stages of a run: each reads the digests of its inputs and leaves a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge.data.encode import Encoded
from expunge.localize.masks import Mask, read_mask
from expunge.methods.step import ForgetView
from expunge.models.load import load_model, model_digest, resolve_folder
from expunge.models.save import save_model
from expunge.pipeline.beforehand import beforehand
from expunge.pipeline.entries import unlearn_job
from expunge.pipeline.evaluate import LazyModel, write_generations, write_scores
from expunge.pipeline.job import Job
from expunge.pipeline.processes import barrier, broadcast, process_count, process_rank
from expunge.pipeline.progress import Reporter
from expunge.pipeline.resolve import Resolved, rows_digest
from expunge.pipeline.snapshots import Recorder
from expunge.pipeline.training import train
from expunge.pipeline.updates import write_updates
from expunge.recipe import ModelConfig, TokenSelection, UnlearnConfig
from expunge.runs.store import RunDirectory, StageResult


@dataclass(frozen=True)
class Variant:
    """A way to obtain a model: how to load it, and the digest of what it is made of."""

    name: str
    config: ModelConfig
    digest: str
    seconds: float = 0.0  # that making it took, whenever that was
    skipped: bool = False  # it had been made before


class Stages:
    """Makes models and tables inside one run directory. On processes other than the first, `directory` is None."""

    def __init__(self, resolved: Resolved, directory: RunDirectory | None, root: Path, reporter: Reporter) -> None:
        self.resolved, self.directory, self.root, self.reporter = resolved, directory, root, reporter
        self._models: dict[str, LazyModel] = {}

    def given(self, name: str, config: ModelConfig) -> Variant:
        """A model that exists already."""
        place = resolve_folder(config.id, config.revision)
        digest = broadcast(model_digest(place) if process_rank() == 0 else "")
        return Variant(name, config, digest)

    def trained(
        self,
        name: str,
        target: str,
        job: Job,
        model: Variant,
        extra: Mapping[str, Any] | None = None,
        recorder: Recorder | None = None,
    ) -> Variant:
        """A model that a training run makes; `name` is the stage's, e.g. unlearn/over. `recorder` keeps more of it."""
        kept = {} if recorder is None else recorder.inputs()
        inputs = {**job_inputs(job), "model": model.digest, **kept, **(extra or {})}
        steps = training_steps(job)

        def work(folder: Path) -> Mapping[str, Any]:
            with self.reporter.bar(name, steps) as tick:
                done = 0

                def on_step(step: int, terms: Mapping[str, float]) -> None:
                    nonlocal done
                    tick(step - done, f"loss {terms['loss']:.3f}")
                    done = step
                    if self.directory is not None:
                        self.directory.events.write(
                            "train", stage=name, step=step, steps=steps, lr=job.train.lr, **terms
                        )
                    if recorder is not None:
                        recorder.write(folder, step, terms)

                def on_look(step: int, values: Mapping[str, float]) -> None:
                    if self.directory is not None:
                        self.directory.events.write("look", stage=name, step=step, **values)

                callbacks = () if recorder is None else recorder.callbacks(folder, job.model)
                made = train(job, folder, on_step=on_step, on_look=on_look, callbacks=callbacks)
                if recorder is not None:
                    recorder.finish(folder)
                return made

        result = self.stage(name, target, inputs, work)
        if "note" in result.outputs and self.directory is not None:
            self.directory.note(f"{name}: {result.outputs['note']}")
            self.reporter.line(f"  note: {name}: {result.outputs['note']}")
        return self._variant(target.rpartition("/")[2], result, model)

    def localized(self, model: Variant) -> Mask | None:
        """The part of a model that unlearning may change; None where the recipe does not say."""
        config = self.resolved.recipe.localize
        if config is None:
            return None
        from expunge.pipeline.localize import MASK, stage_inputs, write_stage

        inputs = {"model": model.digest, **stage_inputs(self.resolved, model.digest)}

        def work(folder: Path) -> Mapping[str, Any]:
            if process_rank() != 0:
                return {}
            return write_stage(self.resolved, model.config, model.digest, folder, self.reporter)

        made = self.stage("localize", "localize", inputs, work)
        if self.directory is not None:
            self.directory.note(f"localize: {made.outputs['answer']}")
            self.reporter.line(f"  localize: {made.outputs['answer']}")
        return self.resolved.mask or read_mask(made.path / MASK)

    def unlearned(
        self,
        entry: UnlearnConfig,
        target: str,
        model: Variant,
        lacking: Callable[[TokenSelection], Variant],
        mask: Mask | None = None,
    ) -> Variant:
        """The model of one unlearn entry; `lacking` and `mask` as in `job`."""
        return self.trained(f"unlearn/{entry.name}", target, self.job(entry, model, lacking, mask), model)

    def job(
        self,
        entry: UnlearnConfig,
        model: Variant,
        lacking: Callable[[TokenSelection], Variant],
        mask: Mask | None = None,
    ) -> Job:
        """The training run of one unlearn entry; `lacking` gives the model that lacks the knowledge, to choose tokens.

        Only what is inside `mask` is changed; everything that the entry trains where there is none.
        What models must say first (chosen tokens, sampled answers) becomes stages of its own.
        """
        return unlearn_job(self.resolved, entry, model.config, beforehand(self, entry, model, lacking), mask)

    def merged(self, variants: Sequence[Variant], base: Variant, reference: Variant | None = None) -> Variant:
        """The merge of the specialists, as a whole checkpoint in `model/`; searched if the recipe says so."""
        from expunge.merging.run import merge_models

        merge = self.resolved.recipe.merge
        assert merge is not None
        # a recipe that does not search has the inputs that it had before there was a search
        settings = merge.model_dump(mode="json", exclude=None if merge.search else {"search"})
        inputs = {"merge": settings, "models": [v.digest for v in variants], "base": base.digest}
        if merge.search is not None:
            inputs |= self._searched_on(reference)

        def work(folder: Path) -> Mapping[str, Any]:
            if process_rank() != 0:
                return {}
            if merge.search is not None:
                return self._searched(variants, base, reference, folder)
            with self.reporter.bar("merge", 1) as tick:
                made = merge_models(
                    [variant.config.id for variant in variants],
                    folder / "out",
                    base=str(resolve_folder(base.config.id)),
                    method=merge.method,
                    weights=merge.weights,
                    density=merge.density,
                    parameters=merge.parameters,
                )
                tick(1)
            return {"statistics": made.statistics}

        result = self.stage("merge", "model", inputs, work)
        if "answer" in result.outputs and self.directory is not None:
            self.directory.note(f"merge: {result.outputs['answer']}")
            self.reporter.line(f"  merge: {result.outputs['answer']}")
        return self._variant("merged", result, base)

    def _searched(
        self, variants: Sequence[Variant], base: Variant, reference: Variant | None, folder: Path
    ) -> Mapping[str, Any]:
        """The search of a merge; what was measured stays in the work folder, so that a killed one goes on."""
        from expunge.merging.inputs import open_inputs
        from expunge.pipeline.merge_search_run import FOLDER, choose, write_chosen
        from expunge.pipeline.merge_search_space import Space

        merge, rows = self.resolved.recipe.merge, self.resolved.search
        assert merge is not None
        assert rows is not None
        models, place = [variant.config.id for variant in variants], folder / FOLDER.removeprefix(".")
        target = str(resolve_folder(base.config.id))
        opened = open_inputs(models, target)
        try:
            beside = None if reference is None else reference.config
            names = [variant.name for variant in variants]
            found = choose(Space(merge, len(models)), opened, rows, base.config, beside, place, self.reporter, names)
        finally:
            opened.close()
        with self.reporter.bar("merge", 1) as tick:
            made = write_chosen(found, models, folder / "out", target, place, {})
            tick(1)
        return {"statistics": made.statistics, "answer": found.answer, "met": found.best.met}

    def _searched_on(self, reference: Variant | None) -> dict[str, Any]:
        """What a search depends on beside the models."""
        rows, exam = self.resolved.search, self.resolved.asked.exam
        assert rows is not None
        return {
            "rows": {name: rows_digest(some) for name, some in rows.rows.items()},
            "aims": [str(entry) for entry in (*rows.aims, *rows.keep)],
            "against": rows.against,
            "dtype": rows.evaluate.dtype,
            "convention": exam.convention.name,
            "reference": reference.digest if reference is not None and rows.needs_reference else None,
        }

    def folded(self, variant: Variant) -> Variant:
        """An adapter folded into its base, as a whole checkpoint in `model/`."""

        def work(folder: Path) -> None:
            if process_rank() == 0:
                loaded = load_model(variant.config)
                model: Any = loaded.model
                save_model(model.merge_and_unload(), loaded.tokenizer, folder / "out")

        return self._variant(variant.name, self.stage("fold", "model", {"adapter": variant.digest}, work), variant)

    def landed(self, variant: Variant, before: Variant, mask: Mask | None = None) -> StageResult:
        """Where an unlearned model differs from the one that it was made from, as `updates/NAME/updates.json`."""
        inputs = {"model": variant.digest, "before": before.digest, "dtype": before.config.dtype}
        inputs |= {"mask": mask.digest} if mask is not None else {}
        name = f"updates/{variant.name}"

        def work(folder: Path) -> None:
            if process_rank() == 0:
                with self.reporter.bar(name, 1) as tick:
                    write_updates(before.config, variant.config, mask, folder / "out")
                    tick(1)

        return self.stage(name, name, inputs, work)

    def scores(self, variant: Variant, rows: Mapping[str, Sequence[Encoded]], target: str = "") -> StageResult:
        """The scoring pass of a variant over splits."""
        config = self.resolved.asked.exam.config
        inputs = {"dtype": config.dtype, **self._evaluated(variant, rows)}
        return self._pass("scores", variant, rows, target, inputs, write_scores)

    def generations(self, variant: Variant, rows: Mapping[str, Sequence[Encoded]]) -> StageResult:
        """The generation pass of a variant over splits."""
        config = self.resolved.asked.exam.config
        assert config.generate is not None
        asked = {"max_new_tokens": config.generate.max_new_tokens, "samples": config.samples}
        inputs = {"dtype": config.dtype, **asked, **self._evaluated(variant, rows)}
        return self._pass("generations", variant, rows, "", inputs, write_generations)

    def release(self, variant: Variant) -> None:
        """Free the memory of an evaluated variant."""
        self._models.pop(variant.digest, None)

    def _pass(
        self,
        kind: str,
        variant: Variant,
        rows: Mapping[str, Sequence[Encoded]],
        target: str,
        inputs: Mapping[str, Any],
        write: Callable[..., Mapping[str, Any]],
    ) -> StageResult:
        config = self.resolved.asked.exam.config
        place = target or f"{kind}/{variant.name}"
        model = self._models.setdefault(variant.digest, LazyModel(variant.config, config.dtype))
        total = sum(map(len, rows.values()))

        def work(folder: Path) -> Mapping[str, Any]:
            with self.reporter.bar(place, total) as tick:
                return write(model, rows, config, folder / "out", tick)

        return self.stage(place, place, inputs, work)

    def _evaluated(self, variant: Variant, rows: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
        return {"model": variant.digest, "rows": {name: rows_digest(split) for name, split in rows.items()}}

    def stage(self, name: str, target: str, inputs: Mapping[str, Any], work: Callable[[Path], Any]) -> StageResult:
        """`RunDirectory.stage` by the first process; the others do the same work when, and only when, it is done."""
        if process_count() == 1:
            assert self.directory is not None
            return self.directory.stage(name, target, inputs, work)
        if self.directory is not None:

            def together(folder: Path) -> Any:
                broadcast(("work", folder))
                made = work(folder)
                barrier()
                return made

            result = self.directory.stage(name, target, inputs, together)
            broadcast(("done", result))
            return result
        message, content = broadcast(None)
        if message == "work":
            work(content)
            barrier()
            message, content = broadcast(None)
        done: StageResult = content
        return done

    def _variant(self, name: str, result: StageResult, parent: Variant) -> Variant:
        config = parent.config.model_copy(update={"id": str(result.path.resolve()), "revision": None})
        return Variant(name, config, result.digest, result.seconds, result.skipped)


def job_inputs(job: Job) -> dict[str, Any]:
    """What a training run depends on, its start model aside, as plain data for a digest."""
    return {
        "forget": rows_digest(job.forget),
        "retain": rows_digest(job.retain),
        "train": job.train.model_dump(mode="json", exclude=None if job.train.minutes else {"minutes"}),
        "seed": job.seed,
        "objective": repr(job.objective),
        "weights": dict(job.term_weights),
        "retain_batch": job.retain_batch,
        "selection": None if job.selection is None else [mask.tolist() for mask in job.selection],
        "lora": None if job.lora is None else job.lora.model_dump(mode="json"),
        "trainable": list(job.trainable) if job.trainable is not None else None,
        **_switches(job),
    }


def training_steps(job: Job) -> int:
    """Optimizer steps of a training run, over all trainings that its objective combines."""
    trainings = job.objective.variations(job.train) if job.objective is not None else [job.train]
    return sum(replace(job, train=train).plan().steps for train in trainings)


def _switches(job: Job) -> dict[str, Any]:
    """What further settings a training run depends on; those that stand at their defaults are left out."""
    others = [row for rows in (*job.forget_alternatives, *job.retain_alternatives) for row in rows]
    switches = {
        "view": None if job.view == ForgetView() else repr(job.view),
        "alternatives": rows_digest(others) if others else None,
        "anchors": rows_digest(job.anchors) if job.anchors else None,
        "sam": job.sam,
        "relearning": None if job.relearning is None else job.relearning.model_dump(mode="json"),
        "null_space": job.null_space,
        "gradient_projection": job.gradient_projection or None,
        "stop_when": [rule.model_dump(mode="json") for rule in job.stop_when] or None,
        "watched": {name: rows_digest(watched.rows) for name, watched in job.watched.items()} or None,
        "keep": None if job.keep is None else [job.keep.share, rows_digest(job.keep.rows)],
        "mask": None if job.mask is None else job.mask.digest,
        "lacking": None if job.lacking is None else [values.tolist() for values in job.lacking],
        "reset": None if job.reset is None else _digest_of(job.reset),
    }
    return {name: value for name, value in switches.items() if value is not None}


def _digest_of(config: ModelConfig) -> str:
    """Digest of a model that is given, made by the process that writes; the others have no use for it."""
    return model_digest(resolve_folder(config.id, config.revision)) if process_rank() == 0 else ""
