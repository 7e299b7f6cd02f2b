"""Models, rows and masks for the tests of known regions and of attributions by activations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from expunge.localize.base import build_attribution
from expunge.localize.evidence import Evidence
from expunge.localize.locate import locate
from expunge.localize.masks import Mask
from expunge.localize.units import units_of
from merging_models import gpt2, llama
from scoring_rows import lively
from training_rows import rows

ROWS = {"forget": rows(5, 1, vocabulary=60), "retain": rows(6, 2, vocabulary=60)}
MODELS = {"llama": lambda: llama(1, attention_bias=True, mlp_bias=True), "gpt2": lambda: gpt2(1)}
UNITS = ["weight", "value_vector", "neuron", "head", "module", "layer"]


@cache
def model(name: str) -> Any:
    return lively(MODELS[name]())


def evidence(network: Any, unit: str, given: Any = ROWS, **changes: Any) -> Evidence:
    return Evidence(network, given, units_of(network, unit), unit=unit, **{"batch_size": 3, **changes})


def scores(by: str, given: Evidence, **settings: Any) -> list[Tensor]:
    return list(locate(build_attribution(by, settings), given, 0.1, "model").scores)


def shapes(network: Any) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def dense(mask: Mask, network: Any) -> Tensor:
    """The mask as one long vector of booleans, a weight each."""
    parts = [
        mask.inside.get(name, torch.tensor(False)).expand(shape).reshape(-1) for name, shape in shapes(network).items()
    ]
    return torch.cat(parts)


def region_of(network: Any, unit: str, density: float = 0.3, seed: int = 3) -> Mask:
    """Units by lot."""
    return locate(build_attribution("random", {}), evidence(network, unit, seed=seed), density, "model").mask
