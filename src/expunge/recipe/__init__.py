"""The recipe: the only configuration. One frozen model, YAML in, every problem listed at once."""

from expunge.recipe.load import digest, dump_yaml, load_recipe, parse_overrides, preset_names
from expunge.recipe.localize import LocalizeConfig, Strata, Unit
from expunge.recipe.model import EvaluateConfig, MergeConfig, PrepareConfig, Recipe
from expunge.recipe.parts import DataConfig, LoraConfig, ModelConfig, SourceConfig, TrainConfig
from expunge.recipe.search import Aim, Keep, SearchConfig
from expunge.recipe.unlearn import (
    STRANGERS,
    AlternativesConfig,
    RelearningConfig,
    RetainTerms,
    StopRule,
    TokenSelection,
    UnlearnConfig,
)

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
    "RelearningConfig",
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
