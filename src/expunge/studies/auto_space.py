"""What `auto` is chosen from, and what it is compared with: entries of a recipe, as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expunge.pipeline.auto import NAME as AUTO

#: The rule's own choice; what else is tried differs from it in one thing each.
DEFAULT = "default"

_DEEP = {"ceiling": -4.0, "bottom": -30.0, "depth": 6.0}

#: Variation → what an entry says beside `method: auto`: floor, tokens, matrices, schedule, wrappers, objective. Rates
#: are those of a model of 135M parameters, and are scaled for others.
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "deep": {"parameters": _DEEP},
    "follow": {"parameters": {"bottom": -30.0}},
    "both-ways": {"parameters": {"ceiling": 20.0, "bottom": -30.0, "pull": 1.0}},
    "middle": {"parameters": {"ceiling": -5.0, "bottom": -5.0}},
    "free": {"null_space": None},
    "free-slow": {"null_space": None, "train": {"lr": 5e-5}},
    "free-slow-deep": {"null_space": None, "parameters": _DEEP, "train": {"lr": 5e-5}},
    "slow": {"train": {"lr": 5e-5}},
    "fast": {"train": {"lr": 4e-4}},
    "harder": {"null_space": 0.3},
    "softer": {"null_space": 30.0},
    "every-token": {"tokens": "all"},
    "no-strangers": {"neighbours": None},
    "down-proj": {"trainable": [r"\.mlp\.down_proj\."], "train": {"lr": 4e-4}},
    "half-length": {"train": {"max_steps": 36}},
    "twice-as-long": {"train": {"epochs": 40}},
    "constant": {"train": {"schedule": "constant"}},
    "strong-keep": {"retain": {"nll": 0.0, "kl": 8.0}},
    "sharpness-aware": {"sam": 0.02},
    "relearning-aware": {"relearning": {"steps": 2, "lr": 1e-4}},
    "projected": {"gradient_projection": True},
    "npo": {"method": "npo"},
    "wga": {"method": "wga"},
    "states": {"method": "adaptive_rmu", "tokens": "all"},
}

#: Variation → what each of its specialists says beside `method: auto`; they are merged by TIES.
MERGED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "merged": {
        "over": {"parameters": _DEEP, "null_space": None},
        "under": {"retain": {"nll": 0.0, "kl": 8.0}},
    }
}

#: The published merge of an over- and an under-forgetting specialist, as a rival.
ZJUKLAB = "zjuklab"
#: Published objectives beside which `auto` stands unless others are named.
RIVALS = ("npo", "grad_diff", "simnpo", "sugd", ZJUKLAB)


@dataclass(frozen=True)
class Entrant:
    """One way to unlearn: of `family`, one entry of a recipe, or specialists that say more and are merged."""

    name: str
    family: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    specialists: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_auto(self) -> bool:
        """Whether it is a variation of `auto`."""
        return self.family == AUTO
