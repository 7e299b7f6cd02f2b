"""What can be seen wrong with a localization before a weight is read: attribution, unit, rows, region, mask files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from expunge.errors import UserError
from expunge.localize.base import Attribution, build_attribution
from expunge.localize.locate import check_fit
from expunge.localize.masks import Mask, read_mask
from expunge.localize.quality import check_region
from expunge.localize.units import units_of
from expunge.models.files import is_adapter
from expunge.models.load import model_digest, resolve_folder
from expunge.recipe import LocalizeConfig, ModelConfig, Recipe

_MAKE = "make a mask of this model: expunge localize; or take the region over: --by oracle --against THAT_MASK"


def open_attribution(config: LocalizeConfig) -> Attribution:
    """The attribution with its settings. Raises UserError for an unknown one, or a wrong setting."""
    return build_attribution(config.by, config.parameters)


def check_attribution(config: LocalizeConfig, splits: Collection[str]) -> None:
    """Raises UserError for an attribution that does not see such units, or whose rows or known region are not given."""
    given = [*splits, *(["region"] if config.against is not None else [])]
    check_fit(open_attribution(config).about, config.unit, given)


def check_architecture(config: LocalizeConfig, modules: Any) -> None:
    """Raises UserError for units that a model lacks, and for a region that is none of it; None: nothing to see yet."""
    region = None if config.against is None else read_mask(config.against)
    if modules is None:
        return
    families = units_of(modules, config.unit)
    if region is not None:
        region.bound(modules)
        check_region(region, families, config.unit)


def check_whole(config: ModelConfig) -> None:
    """Raises UserError for an adapter, whose base has the weights."""
    folder = resolve_folder(config.id, config.revision)
    if folder.is_dir() and is_adapter(folder):
        raise UserError(
            f"{config.id} is an adapter; a mask is made for a whole model",
            f"merge it first: expunge merge {config.id} --method linear -o FOLDER",
        )


def check_mask_of(mask: Mask, digest: str, label: str) -> None:
    """Raises UserError if the mask was made for a model of another digest; `label` is the mask's file."""
    made_for = mask.about.get("model")
    if made_for is not None and made_for != digest:
        name = mask.about.get("model_id")
        whose = f"another model ({name}, or other weights of that name)" if name else "another model"
        raise UserError(f"the mask {label} was made for {whose}: its digest differs", _MAKE)


def check_recipe(recipe: Recipe, splits: Collection[str], modules: Any) -> Mask | None:
    """The mask that a recipe gives, if it gives one. Raises UserError for what is wrong with its `localize`."""
    config = recipe.localize
    if config is None:
        return None
    if config.mask is None:
        check_attribution(config, splits)
        check_architecture(config, modules)
        return None
    mask = read_mask(config.mask)
    if recipe.prepare is None:  # otherwise the target is still to be trained
        check_mask_of(mask, digest_of(recipe.model), config.mask)
    if modules is not None:
        mask.bound(modules)
    return mask


def digest_of(config: ModelConfig) -> str:
    """Digest of the files of a model."""
    return model_digest(resolve_folder(config.id, config.revision))
