"""The recipe: the only configuration. One frozen model, YAML in, every problem listed at once."""

from expunge.recipe.load import digest, dump_yaml, load_recipe, parse_overrides, preset_names
from expunge.recipe.localize import LocalizeConfig, Strata, Unit
from expunge.recipe.model import (
    STRANGERS,
    AlternativesConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    PrepareConfig,
    Recipe,
    RetainTerms,
    SourceConfig,
    StopRule,
    TokenSelection,
    TrainConfig,
    UnlearnConfig,
)
from expunge.recipe.search import Aim, Keep, SearchConfig

__all__ = [
    "STRANGERS",
    "Aim",
    "AlternativesConfig",
    "DataConfig",
    "EvaluateConfig",
    "Keep",
    "LocalizeConfig",
    "LoraConfig",
    "MergeConfig",
    "ModelConfig",
    "PrepareConfig",
    "Recipe",
    "RetainTerms",
    "SearchConfig",
    "SourceConfig",
    "StopRule",
    "Strata",
    "TokenSelection",
    "TrainConfig",
    "Unit",
    "UnlearnConfig",
    "digest",
    "dump_yaml",
    "load_recipe",
    "parse_overrides",
    "preset_names",
]
