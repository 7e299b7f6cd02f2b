"""The study `localization` from the reference to what was found, in an order that is worth something when cut short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.localize.base import ATTRIBUTIONS
from expunge.localize.masks import Mask
from expunge.localize.units import units_of
from expunge.numbers import HARDLY
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.job import Job
from expunge.pipeline.localize_check import check_attribution
from expunge.pipeline.resolve import rows_digest
from expunge.pipeline.trainer import DivergedError
from expunge.pipeline.trials import run_trial
from expunge.recipe import LocalizeConfig
from expunge.studies.ground import Outcome, Planned, Strength
from expunge.studies.localization import OWN, OWN_TINY, UNIT, injection, region_rate
from expunge.studies.localization_record import (
    ORACLE,
    RANDOM,
    Attributed,
    Found,
    Injected,
    Look,
    Matching,
    Relearning,
    Run,
)
from expunge.studies.localizing.cost import Clock, guesses
from expunge.studies.localizing.matching import columns, matched, second_moments, take, union
from expunge.studies.localizing.measure import UNSEEN, Measure
from expunge.studies.localizing.regions import BY, Regions
from expunge.studies.localizing.trials import Start, Trials
from expunge.studies.objectives import check_parameters, given_parameters, layer_setting

if TYPE_CHECKING:
    from expunge.data.encode import Encoded
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground
    from expunge.studies.localization import Localization


class Pieces:
    """One run of the study: what is injected, found, unlearned and relearned so far."""

    def __init__(self, ground: Ground, options: Localization) -> None:
        self.ground, self.options = ground, options
        self.injected: list[Injected] = []
        self.runs: list[Run] = []
        self.matchings: list[Matching] = []
        self.attributed: dict[tuple[int, str], Attributed] = {}
        self.controls: list[Relearning] = []
        self.starts: dict[int, Start] = {}
        self.regions = Regions(ground, options.part)
        self._check()
        ground.set_aside(UNSEEN)
        self.measure = Measure(ground, options)
        self.trials = Trials(ground, options, self.measure, options.relearn_rate or (1e-3 if options.tiny else 1e-4))
        self.clock = Clock(self._planned(), ground.stages.reporter)

    @property
    def seeds(self) -> list[int]:
        """Those that were asked for."""
        return [self.options.seed + number for number in range(self.options.seeds)]

    @cached_property
    def families(self) -> Any:
        """The value vectors of the model. Raises UserError if it has none that can be told apart."""
        return units_of(self.ground.architecture, UNIT)

    @cached_property
    def rate(self) -> float:
        """Learning rate of unlearning."""
        return self.options.rate or region_rate(self.options, self.ground.parameters)

    @property
    def taught(self) -> list[Encoded]:
        """The rows that a region is taught: the forget rows, and retain rows where those are asked for."""
        rows, beside = self.ground.resolved.rows, self.options.kept_rows
        return [*rows["forget"], *rows["retain"][: round(beside * len(rows["forget"]))]]

    def _check(self) -> None:
        """Raises UserError for all that can be seen wrong before anything is trained."""
        ground, options = self.ground, self.options
        if ground.whole.recipe.prepare is None and ground.whole.recipe.reference is None:
            raise UserError("study localization needs a model that never saw the forget rows", "give --reference MODEL")
        check_parameters(options.parameters, options.methods)
        for name in options.attributions:
            if ATTRIBUTIONS.get(name).about.control:
                raise UserError(f"--attributions: {name} is a control", "the true and a random region are always there")
            check_attribution(LocalizeConfig(by=name, unit=UNIT), ("forget", "retain"))
        assert self.families
        for method in options.methods:
            ground.check(self._trial(method, RANDOM, options.seed).entry)

    def _planned(self) -> dict[str, int]:
        options, seeds = self.options, self.options.seeds
        return {
            "injection": seeds,
            "matching": seeds,
            "attribution": seeds * len(options.attributions),
            "control": seeds if options.relearn else 0,
            "training": seeds * len(options.methods) * len(options.where),
        }

    # ------------------------------------------------------------ the whole

    def found(self) -> Found:
        """Everything that there was time for; another run goes on."""
        ground, options = self.ground, self.options
        planned = self._planned()
        ground.expect(planned["training"], f"{options.seeds} seeds, {len(options.where)} regions")
        reference = self._reference()
        self.clock.begin(guesses(ground, options, self.measure.count))
        steps: list[Callable[[int], None]] = [
            self._inject,
            self._match,
            self._control,
            *self._unlearnings((ORACLE, RANDOM)),
        ]
        rest = tuple(name for name in options.where if name not in BY)
        for part in (steps, [self._attribute, *self._unlearnings(rest)]):
            for seed in self.seeds:
                for piece in part:
                    if not ground.time_is_up():
                        piece(seed)
        self.regions.release()
        return Found(
            reference,
            self.injected,
            self.runs,
            self.matchings,
            list(self.attributed.values()),
            self.controls,
            self.seeds,
            list(dict.fromkeys(options.methods)),
            list(dict.fromkeys(options.attributions)),
            UNIT,
            options.part,
            sum(family.count for family in self.families),
            len(ground.resolved.rows["forget"]),
            self.measure.compared,
            self.clock.progress,
            self._target(),
        )

    def _unlearnings(self, regions: Sequence[str]) -> list[Callable[[int], None]]:
        """One piece for each method and region, regions of a method side by side."""

        def piece(method: str, region: str) -> Callable[[int], None]:
            return lambda seed: self._unlearn(seed, method, region)

        wanted = [region for region in regions if region in self.options.where]
        return [piece(method, region) for method in dict.fromkeys(self.options.methods) for region in wanted]

    # ------------------------------------------------------------ models that stand before

    def _reference(self) -> Look:
        """The reference, measured. A remark if it knows the forget rows already."""
        self.measure.reference = self._scored("reference", self.ground.variants["reference"])[0]
        look = self.measure.look(self.measure.reference)
        if look.forget > HARDLY:
            words = (
                f"The reference knows the forget rows already (extraction strength {look.forget:.3f}), or they say "
                "little: what is taught to the region is not all there is of them."
            )
            self.ground.remarks.append(words)
            self.ground.stages.reporter.line(f"  note: {words}")
        self._file("reference", {"method": "reference"}, look)
        return look

    def _target(self) -> Look | None:
        """A model that knows all rows, where one was given."""
        variant = self.ground.variants.get("target")
        if variant is None:
            return None
        look = self.measure.look(self._scored("target", variant)[0])
        self._file("target", {"method": "target"}, look)
        return look

    def _scored(self, name: str, variant: Variant) -> tuple[Path, float]:
        """Folder of a model's tables, and the seconds that they took."""
        made = run_trial(self.ground.stages, name, variant, self.measure.rows)
        return made.path, made.seconds

    # ------------------------------------------------------------ pieces of a seed

    def _inject(self, seed: int) -> None:
        """Teach the forget rows to the reference through a random part of its value vectors."""
        ground, options = self.ground, self.options
        reference = ground.variants["reference"]
        truth = self.regions.choose(seed, ORACLE, reference).mask
        changes = injection(options, ground.parameters)
        train = ground.whole.recipe.unlearn[0].train.model_copy(update=changes)
        job = Job(reference.config, self.taught, train, seed, mask=truth)
        steps, name = job.plan().steps, f"injected-seed{seed}"
        before = self.measure.look(self._reference_folder)
        units, weights = sum(int(bits.sum()) for bits in truth.inside.values()), int(truth.about["inside"])
        try:
            variant = ground.stages.trained(f"inject/seed{seed}", f"injected/seed{seed}", job, reference)
        except DivergedError as error:
            self.injected.append(Injected(seed, before, before, units, weights, steps, failed=error.message))
            ground.remarks.append(f"{name} broke off: {error.message}")
            self.clock.done("injection", 0.0)
            return
        folder, seconds = self._scored(name, variant)
        look = self.measure.look(folder)
        self.injected.append(Injected(seed, before, look, units, weights, steps, variant.seconds + seconds))
        self.starts[seed] = Start(seed, variant, look, truth)
        self._file(name, {"method": "inject", "seed": seed}, look, variant.seconds, steps)
        self.clock.done("injection", variant.seconds + seconds, said(look))

    @property
    def _reference_folder(self) -> Path:
        assert self.measure.reference is not None
        return self.measure.reference

    def _attribute(self, seed: int) -> None:
        """Every attribution's region, and how well it finds the true one."""
        if seed not in self.starts:
            return
        for name in dict.fromkeys(self.options.attributions):
            if not self.ground.time_is_up():
                self._attributed(seed, name)

    def _attributed(self, seed: int, name: str) -> Mask:
        start = self.starts[seed]
        region = self.regions.choose(seed, name, start.variant, start.truth)
        if (seed, name) not in self.attributed:
            made = Attributed(seed, name, **region.agreement, seconds=region.seconds)
            self.attributed[seed, name] = made
            words = f"{name} finds {made.precision:.0%} of the region, chance {made.chance:.0%}; AUC {made.auc:.3f}"
            self.clock.done("attribution", made.seconds, words)
        return region.mask

    def _random(self, start: Start) -> Mask:
        return self.regions.choose(start.seed, RANDOM, start.variant, start.truth).mask

    def _match(self, seed: int) -> None:
        """The objective-free check in the true and the random region."""
        if seed not in self.starts:
            return
        start, reference, options = self.starts[seed], self.ground.variants["reference"], self.options
        masks = {ORACLE: start.truth, RANDOM: self._random(start)}
        rows = [row for split in ("forget", "retain") for row in self.ground.resolved.rows[split]]
        name, size = f"match-seed{seed}", self.ground.whole.recipe.evaluate.batch_size
        inputs = {
            "reference": reference.digest,
            "model": start.variant.digest,
            "regions": {region: mask.digest for region, mask in masks.items()},
            "rows": rows_digest(rows),
            "ridge": options.ridge,
            **self.measure.inputs,
        }

        def work(folder: Path) -> Mapping[str, Any]:
            free = {region: columns(mask) for region, mask in masks.items()}
            held, known = free[ORACLE], union(*free.values())
            with self.ground.stages.reporter.bar(name, 2 * len(rows)) as tick:
                self.regions.release()
                loaded = LazyModel(reference.config, "float32").loaded
                moments, wanted = second_moments(loaded.model, rows, known, size, tick), take(loaded.model, held)
                del loaded
                loaded = LazyModel(start.variant.config, "float32").loaded
                for place, value in second_moments(loaded.model, rows, known, size, tick).items():
                    moments[place] += value
                made = {}
                for region, own in free.items():
                    given = (wanted, moments, known, held, own)
                    with matched(loaded.model, *given, options.ridge) as moved:
                        self.measure.write(loaded.model, loaded.tokenizer, folder / "out" / region)
                        made[region] = asdict(moved)
            return made

        done = self.ground.directory.stage(f"match/{name}", f"matched/seed{seed}", inputs, work)
        for region in masks:
            look, moved = self.measure.look(done.path / region), done.outputs[region]
            self.matchings.append(Matching(seed, region, look, moved["residual"], moved["norm"], done.seconds))
            self._file(f"match-{region}-seed{seed}", {"method": "match", "region": region, "seed": seed}, look)
        self.clock.done("matching", done.seconds, " | ".join(said(one.look) for one in self.matchings[-2:]))

    def _control(self, seed: int) -> None:
        """The reference relearns too: what it takes to learn the rows anew."""
        if self.options.relearn and seed in self.starts:
            look = self.measure.look(self._reference_folder)
            control, seconds = self.trials.control(seed, self.ground.variants["reference"], look)
            self.controls.append(control)
            self.clock.done("control", seconds, said(control.looks[-1]))

    def _unlearn(self, seed: int, method: str, region: str) -> None:
        start = self.starts.get(seed)
        if start is None:
            return
        if region == ORACLE:
            mask = start.truth
        elif region == RANDOM:
            mask = self._random(start)
        else:
            mask = self._attributed(seed, region)
        self.regions.release()  # the training loads its own
        trial = self._trial(method, region, seed)
        run = self.trials.unlearn(start, trial, mask)
        self.runs.append(run)
        look = run.looks[-1] if run.looks else None
        self._file(trial.name, trial.about, look, run.seconds, run.steps, run.note, run.failed)
        self.clock.done("training", run.seconds, f"broke off: {run.failed}" if look is None else said(look))

    def _trial(self, method: str, region: str, seed: int) -> Planned:
        options = self.options
        parameters = {
            **layer_setting(self.ground, method),
            **(OWN_TINY if options.tiny else OWN).get(method, {}),
            **given_parameters(options.parameters).get(method, {}),
        }
        made = self.ground.entry(
            name=f"{method}-seed{seed}",
            method=method,
            parameters=parameters,
            seed=seed,
            trainable=["."],  # the region alone says what is trained, not the layers that a method would choose
            train={"lr": self.rate},
        )
        return Planned(f"{method}-{region}-seed{seed}", made, {"method": method, "region": region, "seed": seed})

    def _file(
        self,
        name: str,
        about: Mapping[str, Any],
        look: Look | None,
        seconds: float = 0.0,
        steps: int = 0,
        note: str = "",
        failed: str = "",
    ) -> None:
        """Keep the last look of a piece for trials.parquet."""
        strengths = {}
        if look is not None:
            values = {"forget": look.forget, "retain": look.retain, UNSEEN: look.unseen}
            strengths = {split: Strength(value, None, None) for split, value in values.items() if value is not None}
        self.ground.outcomes[name] = Outcome(name, about, strengths, seconds, steps, note, failed)


def said(look: Look) -> str:
    """A look, in the line of a piece."""
    unseen = "" if look.unseen is None else f" · unseen {look.unseen:.3f}"
    return f"forget {look.forget:.3f} · retain {look.retain:.3f}{unseen}"
