"""The study `zjuklab` from the first training to what was found, in an order that is worth something when cut short."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.numbers import HARDLY
from expunge.studies.ground import Outcome, Strength
from expunge.studies.zjuklab_record import OVER, UNDER, Dynamics, Found, Group, Look, Merged, Scores, Specialist, Turn
from expunge.studies.zjuklab_scores import Pace, Scorer
from expunge.studies.zjuklab_training import (
    ALONE,
    ASCENT,
    Trained,
    dynamics,
    inflection,
    look_steps,
    snapshots,
    train,
    training,
)

if TYPE_CHECKING:
    from expunge.studies.ground import Ground
    from expunge.studies.zjuklab import Zjuklab

UNSEEN = "retain_unseen"
#: An over-forgetter that has more than this part of the target's forget strength did not forget.
UNCHANGED = 0.8
PAIR = (OVER, UNDER)


class Run:
    """One run of the study: what is trained, looked at, scored and merged so far."""

    def __init__(self, ground: Ground, options: Zjuklab) -> None:
        from expunge.studies.zjuklab_merges import planned

        self.ground, self.options = ground, options
        self.specialists: list[Specialist] = []
        self.dynamics: list[Dynamics] = []
        self.turns: list[Turn] = []
        self.groups: list[Group] = []
        self.merges: list[Merged] = []
        self.factor_cosine = float("nan")
        self.collapsed: Scores | None = None
        ground.set_aside(UNSEEN)
        entries = {name: training(ground, name, options.seed).entry for name in (*PAIR, ALONE, ASCENT)}
        for entry in entries.values():
            ground.check(entry)
        self.pace = Pace(
            {
                "training": 2 * options.seeds + 2,
                "score": 2 * options.seeds + 2,
                "look": sum(len(look_steps(ground.steps(entries[name]), options.looks)) for name in PAIR),
                "merge": options.seeds * planned(options),
            }
        )
        self.scorer = Scorer(ground, options, self.pace)
        ground.remarks.extend(self.scorer.official.notes)  # rows that can't be scored so are refused here

    def found(self) -> Found:
        """Everything that there was time for; another run goes on."""
        ground, options = self.ground, self.options
        planned = self.pace.planned
        words = f"{planned['training']} trainings, {planned['merge']} merges; beside them {planned['look']} looks"
        ground.expect(planned["training"] + planned["merge"], words)
        target = self._target()
        for number in range(options.seeds):
            trained = self._pair(options.seed + number, looks=options.looks if number == 0 else 0)
            if number == 0:
                self._look_closer(trained)
            if len(trained) == len(PAIR):
                self._merge(options.seed + number)
        self._remark_nothing_forgotten(target)
        return Found(
            target,
            self.specialists,
            self.dynamics,
            self.turns,
            self.groups,
            self.merges,
            self.collapsed,
            self.scorer.tasks,
            options.seeds,
            self.factor_cosine,
        )

    # ------------------------------------------------------------ pieces

    def _target(self) -> Scores:
        ground = self.ground
        scores = self.scorer.score("target", ground.variants["target"])
        self._keep("target", {"method": "target"}, scores)
        if scores["forget_es"] < HARDLY:
            words = f"The target hardly knew the forget rows (extraction strength {scores['forget_es']:.3f}): little "
            ground.remarks.append(words + "can be forgotten.")
            ground.stages.reporter.line(f"  note: {words}can be forgotten.")
        return scores

    def _pair(self, seed: int, looks: int) -> dict[str, Trained]:
        """Train and score the specialists of a seed."""
        made = {}
        for name in PAIR:
            trained = self._train(name, seed, looks)
            if trained is None:
                continue
            scores = self.scorer.score(trained.trial, trained.variant)
            self._keep(trained.trial, {"method": name, "seed": seed}, scores, trained)
            self.specialists.append(Specialist(name, seed, str(trained.path), trained.steps, scores))
            made[name] = trained
        return made

    def _remark_nothing_forgotten(self, target: Scores) -> None:
        """A remark where no over-forgetter forgot: then no merge can say anything."""
        left = [found.scores["forget_es"] for found in self.specialists if found.name == OVER]
        if left and min(left) > UNCHANGED * target["forget_es"]:
            self.ground.remarks.append(
                f"The over-forgetting specialist did not forget: its forget strength is {min(left):.3f}, the target's "
                f"{target['forget_es']:.3f}. What follows compares models that are nearly the target; raise --rate."
            )

    def _train(self, name: str, seed: int, looks: int = 0) -> Trained | None:
        """A training; None if its time is up or it broke off, which `ground.remarks` says."""
        if self.ground.time_is_up():
            return None
        made = train(self.ground, name, seed, looks)
        self.pace.done("training", made.variant.seconds if made is not None else 0.0)
        return made

    def _look_closer(self, pair: Mapping[str, Trained]) -> None:
        """The analyses of the first seed."""
        self.dynamics += [dynamics(trained) for trained in pair.values()]
        kept = {name: snapshots(trained) for name, trained in pair.items()}
        for name, trained in pair.items():
            self._watch(name, trained, kept[name])
        alone = self._train(ALONE, self.options.seed)
        if alone is not None:
            self.dynamics.append(dynamics(alone))
            self._keep(alone.trial, {"method": ALONE, "seed": alone.seed}, None, alone)
        broken = self._train(ASCENT, self.options.seed)
        if broken is not None:
            self.collapsed = self.scorer.score(broken.trial, broken.variant)
            self._keep(broken.trial, {"method": "grad_ascent", "seed": broken.seed}, self.collapsed, broken)
        if not self.ground.time_is_up():
            self._geometry(pair, kept)

    def _watch(self, name: str, trained: Trained, kept: Mapping[int, Path]) -> None:
        """The trajectory of a specialist; step 0 is the target."""
        from expunge.recipe import ModelConfig

        looks = []
        for step, folder in kept.items():
            if self.ground.time_is_up():
                break
            digest = f"{trained.variant.digest}/{step}"
            config = trained.variant.config.model_copy(update={"id": str(folder)})
            assert isinstance(config, ModelConfig)
            start = self.ground.variants["target"]
            model = replace(trained.variant, config=config, digest=digest) if step else start
            looks.append(Look(step, self.scorer.look("target" if step == 0 else trained.trial, step, model)))
        place = next(i for i, found in enumerate(self.specialists) if found.name == name)
        self.specialists[place] = replace(self.specialists[place], looks=looks)

    def _geometry(self, pair: Mapping[str, Trained], kept: Mapping[str, Mapping[int, Path]]) -> None:
        """Angles of the phases, the two task vectors side by side, and what merging factors makes of them."""
        from expunge.models.load import resolve_folder
        from expunge.studies import zjuklab_geometry as geometry

        ground, options = self.ground, self.options
        ends = {found.name: inflection(found.looks) for found in self.specialists}
        inflections = {name: step for name, step in ends.items() if step is not None}
        models = {"models": {name: trained.variant.digest for name, trained in pair.items()}}
        if inflections:
            lines = self._measured(
                "turns",
                {**models, "inflections": inflections},
                lambda: [asdict(turn) for turn in geometry.turns(ground, options, kept, inflections)],
            )
            self.turns = [Turn(**line) for line in lines]
        if len(pair) == len(PAIR):
            over, under = (pair[name].path for name in PAIR)
            target = ground.variants["target"].config
            base = resolve_folder(target.id, target.revision)
            lines = self._measured(
                "groups", models, lambda: [asdict(group) for group in geometry.groups(ground, over, under, base)]
            )
            self.groups = [Group(**line) for line in lines]
            self.factor_cosine = self._measured("factors", models, lambda: geometry.factor_cosine(over, under, base))

    def _measured(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, as plain data that a stage of the run directory keeps."""
        from expunge.runs.atomic import write_json

        def work(folder: Path) -> None:
            (folder / "out").mkdir()
            write_json(folder / "out" / f"{name}.json", make())

        made = self.ground.directory.stage(f"geometry/{name}", f"geometry/{name}", inputs, work)
        return _plain(json.loads((made.path / f"{name}.json").read_text(encoding="utf-8")))

    def _merge(self, seed: int) -> None:
        """The merges of a seed's specialists."""
        from expunge.studies.zjuklab_merges import merge_table

        if self.ground.time_is_up():
            return
        pair = [found for found in self.specialists if found.seed == seed]
        target = self.ground.variants["target"]
        for merged in merge_table(self.ground, self.options, self.scorer.official, pair, target, pace=self.pace):
            self.merges.append(merged)
            about = {
                "method": merged.method,
                "seed": seed,
                "density": merged.density,
                "scope": merged.scope,
                "scale_match": merged.scale_match,
                "searched": merged.searched,
            }
            name = "searched" if merged.searched else f"{merged.method}-{merged.density:g}"
            self._keep(f"{name}-{merged.scope}-{merged.scale_match}-seed{seed}", about, merged.scores)

    def _keep(self, name: str, about: Mapping[str, Any], scores: Scores | None, made: Trained | None = None) -> None:
        """File a piece for trials.parquet, and count it."""
        names = {"forget": "forget_es", "retain": "retain_es", UNSEEN: "unseen_es"}
        strengths = {
            split: Strength(value, None, None)
            for split, name_of in names.items()
            if scores is not None and (value := scores.values.get(name_of)) is not None
        }
        seconds, steps = (made.variant.seconds, made.steps) if made is not None else (0.0, 0)
        self.ground.outcomes[name] = Outcome(name, about, strengths, seconds, steps, "", "")


def _plain(value: Any) -> Any:
    """What was read of JSON, with NaN for null and tuples for the numbers that stand together."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return float("nan") if value is None else value
