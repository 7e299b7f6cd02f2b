"""The merges of the study `zjuklab`: one table of methods, densities and scales, every one scored in memory.

In the published comparison the methods differ in the norm of the result as well, and what is merged are the factors of
the adapters. Here each method stands beside itself at the norm of the specialists (`scale_match`), and the merge of
the factors, in PEFT's own convention, beside that of the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.studies import zjuklab_scores as kept
from expunge.studies.zjuklab_record import OVER, UNDER, Answer, Merged, Scores, Specialist

if TYPE_CHECKING:
    from expunge.pipeline.semeval import Official
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground
    from expunge.studies.zjuklab import Zjuklab

_COUNT: Mapping[str, Any] = {"votes": "equal", "normalize": "count"}
_SUM: Mapping[str, Any] = {"normalize": False}
#: methods that PEFT has for factors → the settings that make ours its own
PEFT = {"linear": _SUM, "ties": _COUNT, "dare_linear": _SUM, "dare_ties": _COUNT, "magnitude_prune": _SUM}
MATCHES = ("none", "tensor")
#: Where a search is kept; what it aims at besides the membership test, and of what it keeps `options.keep`.
SEARCH, FORGOTTEN, KEPT = "search", "forget:extraction_strength<=0.05", "retain:extraction_strength"


@dataclass(frozen=True)
class Setting:
    """A merge before it is made; both weights are 1, as published."""

    method: str
    density: float
    scope: str
    scale_match: str
    own: Mapping[str, Any] = field(default_factory=dict)  # further parameters of the method

    @property
    def name(self) -> str:
        """For instance ties-0.8-factor-none."""
        return f"{self.method}-{self.density:g}-{self.scope}-{self.scale_match}"

    @property
    def parameters(self) -> dict[str, Any]:
        """All that the method is told."""
        return {"scope": self.scope, "scale_match": self.scale_match, **self.own}

    def plan(self) -> Any:
        """The checked plan of two models. Raises UserError."""
        from expunge.merging.plan import plan_merge

        return plan_merge(self.method, 2, [1.0, 1.0], self.density, self.parameters)


#: What ZJUKLAB submitted: PEFT's TIES on the factors.
PUBLISHED = Setting("ties", 0.8, "factor", "none", _COUNT)


def settings(options: Zjuklab) -> list[Setting]:
    """The published merge, then the merges of the weights, then those of the factors; the fair ones come first.

    Raises UserError for a method that is not there or does not merge two models.
    """
    from expunge.merging.registry import MERGES

    found = {PUBLISHED.name: PUBLISHED}
    for scope in ("tensor", "factor"):
        for match in reversed(MATCHES):
            for method in dict.fromkeys(options.methods):
                trims = MERGES.get(method).trims
                if scope == "factor" and method not in PEFT:
                    continue
                for density in dict.fromkeys(options.densities) if trims else (1.0,):
                    own = PEFT[method] if scope == "factor" else {}
                    made = Setting(method, density, scope, match, own)
                    found.setdefault(made.name, made)
    for made in found.values():
        made.plan()
    return list(found.values())


def planned(options: Zjuklab) -> int:
    """How many merges a seed has. Raises UserError as `settings`."""
    return len(settings(options)) + (options.trials > 0)


def merge_table(
    ground: Ground,
    options: Zjuklab,
    official: Official,
    specialists: Sequence[Specialist],
    target: Variant,
    *,
    pace: kept.Pace | None = None,
) -> list[Merged]:
    """Every merge of the specialists of each seed, those that were scored before from the run directory.

    Stops where the time is up. A merge that can't be made is left out, which `ground.remarks` says.
    """
    found = []
    for seed in dict.fromkeys(specialist.seed for specialist in specialists):
        pair = {specialist.name: specialist for specialist in specialists if specialist.seed == seed}
        if OVER in pair and UNDER in pair:
            table = _Table(ground, options, official, (pair[OVER], pair[UNDER]), target, pace)
            try:
                found += table.made()
            finally:
                table.close()
    return found


class _Table:
    """The merges of one pair; the model that they are set into is loaded when the first one is to be scored."""

    def __init__(
        self,
        ground: Ground,
        options: Zjuklab,
        official: Official,
        pair: tuple[Specialist, Specialist],
        target: Variant,
        pace: kept.Pace | None,
    ) -> None:
        self.ground, self.options, self.official, self.pair, self.target = ground, options, official, pair, target
        self.pace, self.seed = pace, pair[0].seed
        self.inputs = {
            "target": target.digest,
            "specialists": [_adapter_digests(specialist) for specialist in pair],
            "asked": official.digest,
        }
        self._opened: Any = None
        self._merge: Any = None

    def made(self) -> list[Merged]:
        """All of them, the searched one last, as far as there is time."""
        works: list[Callable[[], Merged]] = [partial(self._scored, setting) for setting in settings(self.options)]
        works += [self._searched] if self.options.trials > 0 else []
        found = []
        for work in works:
            if self.ground.time_is_up():
                break
            try:
                found.append(work())
            except UserError as error:
                self.ground.remarks.append(f"A merge of seed {self.seed} was left out: {error.message}.")
        return found

    def close(self) -> None:
        """Let go of the files and the model."""
        if self._opened is not None:
            self._opened.close()
        self._opened = self._merge = None

    # ------------------------------------------------------------ one merge

    def _scored(self, setting: Setting) -> Merged:
        """A merge of the table."""
        about = {"method": setting.method, "density": setting.density, "parameters": setting.parameters}
        plan = setting.plan()
        scores, said = self._stage(setting.name, about, lambda _: (plan, {}))
        return Merged(
            self.seed,
            setting.method,
            setting.density,
            setting.scope,
            setting.scale_match,
            said["norm"],
            said["mean_norm"],
            scores,
            settings={**setting.own, **({"published": True} if setting == PUBLISHED else {})},
        )

    def _stage(
        self, name: str, about: Mapping[str, Any], plan_of: Callable[[Path], tuple[Any, Mapping[str, Any]]]
    ) -> tuple[Scores, Mapping[str, Any]]:
        """The scores of the merge that `plan_of` gives, and what the stage says of it beside."""
        place = f"merges/seed{self.seed}/{name}"
        reporter = self.ground.stages.reporter

        def work(folder: Path) -> Mapping[str, Any]:
            plan, beside = plan_of(folder)
            with reporter.bar(place, 1) as tick:
                norms = self._set(plan)
                found = self.official.score(self._merge.model)
                tick(1)
            (folder / "out").mkdir()
            if (folder / SEARCH).is_dir():
                shutil.copytree(folder / SEARCH, folder / "out" / SEARCH)
            kept.write(folder / "out", Scores(found.values, [Answer(*answer) for answer in found.answers]))
            return {**beside, **norms}

        done = self.ground.directory.stage(place, place, {**self.inputs, **about}, work)
        scores = kept.read(done.path)
        if self.pace is not None:
            self.pace.done("merge", done.seconds)
        if not done.skipped:
            reporter.line(f"    {kept.said(scores)}{self.pace.words() if self.pace is not None else ''}")
        return scores, done.outputs

    def _set(self, plan: Any) -> dict[str, float]:
        """Make the model that merge: the norm of its difference from the target, and the mean of the specialists'."""
        from expunge.merging.statistics import Statistics

        self._open()
        statistics = Statistics(len(self.pair))
        self._merge.set(plan, statistics)
        summary = statistics.summary()
        norms = summary["delta_norms"]
        return {"norm": summary["merged_norm"], "mean_norm": sum(norms) / len(norms)}

    def _open(self) -> None:
        from expunge.merging.in_memory import InMemory
        from expunge.pipeline.evaluate import LazyModel

        if self._merge is None:
            self._opened = self._inputs()
            model = LazyModel(self.target.config, self.official.evaluate.dtype).loaded.model
            self._merge = InMemory(model, self._opened)

    def _inputs(self) -> Any:
        from expunge.merging.inputs import open_inputs
        from expunge.models.load import resolve_folder

        config = self.target.config
        return open_inputs(
            [specialist.path for specialist in self.pair], str(resolve_folder(config.id, config.revision))
        )

    # ------------------------------------------------------------ the searched merge

    def _searched(self) -> Merged:
        """The merge whose weights, density and scale were chosen on rows that the membership score does not use."""
        from expunge.data.benchmarks.semeval import NONMEMBERS
        from expunge.recipe import MergeConfig, SearchConfig

        members, others = self._compared()
        config = SearchConfig(
            trials=self.options.trials,
            aims=[f"{members}:mia_loss=0.5", FORGOTTEN],
            keep=[f"{KEPT}={self.options.keep:g}"],
            methods=list(dict.fromkeys(["linear", *self.options.methods])),
            holdout=others,
            seed=self.seed,
        )
        merge = MergeConfig(method="linear", search=config)
        scores, said = self._stage(
            "searched", {"search": config.model_dump(mode="json")}, lambda folder: self._search(merge, folder)
        )
        notes = list(said["notes"])
        if others == NONMEMBERS:
            notes.append("it looked at the rows of the membership score, for there are no others that nobody learnt")
        self.ground.remarks.extend(f"Search of seed {self.seed}: {note}" for note in notes)
        chosen, parameters = said["chosen"], said["chosen"]["parameters"]
        return Merged(
            self.seed,
            chosen["method"],
            1.0 if chosen["density"] is None else chosen["density"],
            "tensor",
            "none",
            said["norm"],
            said["mean_norm"],
            scores,
            searched=True,
            settings={"weights": chosen["weights"], **parameters, "tried": said["tried"]},
        )

    def _compared(self) -> tuple[str, str]:
        """The splits that a search tells apart: members, and rows that nobody learnt, other ones than are scored."""
        from expunge.data.benchmarks.semeval import MEMBERS, NONMEMBERS, OUTSIDE

        splits = self.ground.resolved.splits
        if MEMBERS in splits and OUTSIDE in splits:
            return MEMBERS, OUTSIDE
        if NONMEMBERS not in splits:
            raise UserError("a search needs rows that nobody learnt", "give a benchmark that has them, or --trials 0")
        return (MEMBERS if MEMBERS in splits else "forget"), NONMEMBERS

    def _search(self, merge: Any, folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """Search in the stage's folder: what a killed process measured is not measured again."""
        from expunge.merging.plan import plan_merge
        from expunge.pipeline.merge_search_rows import search_rows
        from expunge.pipeline.merge_search_run import choose
        from expunge.pipeline.merge_search_space import Space

        self.close()  # one model in memory at a time
        recipe, resolved = self.ground.whole.recipe, self.ground.resolved
        rows = search_rows(
            merge.search, self._rows(resolved.splits), resolved.tokenizer, recipe.data, recipe.evaluate, False
        )
        opened = self._inputs()
        place = folder / SEARCH
        place.mkdir(exist_ok=True)
        try:
            reporter, names = self.ground.stages.reporter, [specialist.name for specialist in self.pair]
            space = Space(merge, len(self.pair))
            found = choose(space, opened, rows, self.target.config, None, place, reporter, names)
        finally:
            opened.close()
        chosen = {name: getattr(found.best, name) for name in ("method", "weights", "density", "parameters")}
        beside = {"chosen": chosen, "tried": len(found.tried), "notes": found.notes}
        return plan_merge(models=len(self.pair), **chosen), beside

    def _rows(self, splits: Any) -> Any:
        """The splits, of forget and retain the rows that are scored: a part of each task where there is a limit."""
        from expunge.data.example import Splits

        part = {
            name: replace(splits[name], examples=tuple(row.example for row in self.official.rows[name]))
            for name in ("forget", "retain")
        }
        return Splits({split.name: part.get(split.name, split) for split in splits})


def _adapter_digests(specialist: Specialist) -> list[str]:
    """Of the adapter itself, and not of what its training left beside it."""
    from expunge.runs.provenance import file_digest

    return [file_digest(file) for file in sorted(Path(specialist.path).glob("adapter_*"))]
