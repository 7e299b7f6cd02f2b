"""The regions of a seed: the true one, a random one disjoint from it, and those that attributions point at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.localize.locate import Located
from expunge.localize.masks import Mask, read_mask
from expunge.localize.quality import agreement, auc
from expunge.models.forward import unwrap
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.localize import MASK, localize
from expunge.pipeline.localize_check import open_attribution
from expunge.pipeline.resolve import rows_digest
from expunge.recipe import LocalizeConfig
from expunge.studies.localization import UNIT
from expunge.studies.localization_record import ORACLE, RANDOM

if TYPE_CHECKING:
    from expunge.pipeline.stages import Variant
    from expunge.studies.ground import Ground

#: The attributions that draw the regions which are known.
BY = {ORACLE: "random", RANDOM: "complement"}


@dataclass(frozen=True)
class Region:
    """A region, and how well it agrees with the true one: precision, overlap, auc, chance; {} for the true one."""

    mask: Mask
    agreement: Mapping[str, float]
    seconds: float


class Regions:
    """Chooses regions, each a stage of the run directory."""

    def __init__(self, ground: Ground, density: float) -> None:
        self.ground, self.density = ground, density
        self._loaded: tuple[str, LazyModel] | None = None

    def choose(self, seed: int, name: str, model: Variant, truth: Mask | None = None) -> Region:
        """A region of a model; `truth` is there for all but the true one."""
        rows = self.ground.resolved.rows
        config = LocalizeConfig(by=BY.get(name, name), unit=UNIT, density=self.density)
        read = {split: rows[split] for split in open_attribution(config).about.needs if split in rows}
        place = f"masks/seed{seed}/{name}"
        inputs = {
            "model": model.digest,
            "config": config.model_dump(mode="json"),
            "seed": seed,
            "truth": None if truth is None else truth.digest,
            "rows": {split: rows_digest(some) for split, some in read.items()},
        }

        def work(folder: Path) -> Mapping[str, Any]:
            with self.ground.stages.reporter.bar(place, sum(map(len, read.values()))) as tick:
                module = self._module(model)
                located = localize(module, read, config, seed, region=truth, tick=tick, folder=folder)
                (folder / "out").mkdir()
                located.mask.write(folder / "out" / MASK)
                return {} if truth is None else _agreement(located, module, truth)

        done = self.ground.directory.stage(place, place, inputs, work)
        found = {name: float("nan") if value is None else value for name, value in done.outputs.items()}
        return Region(read_mask(done.path / MASK), found, done.seconds)

    def release(self) -> None:
        """Free the memory of the model that was looked at last."""
        self._loaded = None

    def _module(self, model: Variant) -> Any:
        """A model in memory, kept for the regions that come next."""
        if self._loaded is None or self._loaded[0] != model.digest:
            self._loaded = None
            self._loaded = (model.digest, LazyModel(model.config, "float32"))
        return self._loaded[1].loaded.model


def _agreement(located: Located, model: Any, truth: Mask) -> dict[str, Any]:
    shapes = {name: tuple(parameter.shape) for name, parameter in unwrap(model).named_parameters()}
    found = agreement(located.mask, truth, shapes)
    true = sum(int(bits.sum()) for bits in truth.inside.values())
    return {
        "precision": found.precision,
        "overlap": found.overlap,
        "auc": auc(located.scores, truth, located.families),
        "chance": true / sum(family.count for family in located.families),
    }
