"""What an adapter does to one base parameter, as an exact difference, and which variants of LoRA have none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.errors import UserError

#: Reads a tensor of the adapter's file as float32, on the device that is worked on.
Read = Callable[[str], Tensor]

FOLD = "fold it with PEFT's merge_and_unload() and give the folded checkpoint"

# Entries of adapter_config.json that leave the difference as the classes below have it. Whatever else is set is
# refused: a variant that this list does not know would be merged silently wrong.
# fmt: off
_KNOWN = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "target_modules_to_tie", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
    )
)
# fmt: on
_REFUSED = {
    "target_parameters": "targets parameters instead of modules (target_parameters)",
    "layer_replication": "replicates layers (layer_replication)",
    "alora_invocation_tokens": "acts only behind its invocation tokens (aLoRA)",
}
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base as well


@dataclass(frozen=True, slots=True)
class Factors:
    """The low-rank change s·BA of a matrix; with a magnitude (DoRA) m·(W + s·BA)/‖W + s·BA‖ − W (arXiv:2402.09353)."""

    a: str
    b: str
    rank: int
    scaling: float
    transposed: bool  # the base stores the matrix as (in, out)
    magnitude: str | None = None

    def delta(self, read: Read, base: Tensor | None) -> Float[Tensor, "*shape"]:
        """In float32 and in the base's layout. With a magnitude, `base` is needed."""
        a, b = read(self.a), read(self.b)
        # the smaller factor carries the scaling, so that no third tensor of ΔW's size is made
        change = (a.T * self.scaling) @ b.T if self.transposed else (b * self.scaling) @ a
        if self.magnitude is None:
            return change
        if base is None:
            raise ValueError("the difference of a DoRA adapter depends on the base")
        norms = torch.linalg.vector_norm(change + base, dim=0 if self.transposed else 1, keepdim=True)
        turned = read(self.magnitude).view_as(norms) / norms
        # f·(W + ΔL) − W as f·ΔL + (f − 1)·W: what is left of W is small, and nothing is lost to its size
        return change.mul_(turned).addcmul_(base.to(torch.float32), turned - 1)


@dataclass(frozen=True, slots=True)
class Saved:
    """A parameter that the adapter holds whole (modules_to_save, trained biases)."""

    key: str

    def delta(self, read: Read, base: Tensor | None) -> Float[Tensor, "*shape"]:
        """In float32."""
        whole = read(self.key)
        return whole.clone() if base is None else whole - base


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding that the adapter holds (trainable_token_indices)."""

    key: str
    tokens: tuple[int, ...]

    def delta(self, read: Read, base: Tensor | None) -> Float[Tensor, "vocab dim"]:
        """In float32."""
        if base is None:
            raise ValueError("the difference of single rows depends on the base")
        change = torch.zeros(base.shape, device=base.device)
        rows = torch.tensor(self.tokens, device=base.device)
        change[rows] = read(self.key) - base[rows]
        return change


@dataclass(frozen=True, slots=True)
class Shift:
    """The trained bias of a B factor (lora_bias), which is scaled as the factor is."""

    key: str
    scaling: float

    def delta(self, read: Read, base: Tensor | None) -> Float[Tensor, " out"]:
        """In float32."""
        return read(self.key) * self.scaling


Change = Factors | Saved | Rows | Shift


def refuse_variants(config: Mapping[str, Any], label: str) -> None:
    """Raises UserError for a kind of adapter whose difference from the base can't be said exactly."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{label} is a {kind or 'nameless'} adapter; only LoRA can be merged", FOLD)
    for key, sentence in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{label} {sentence} and can't be merged exactly", FOLD)
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"{label} trains biases in an unknown way (bias={bias}) and can't be merged exactly", FOLD)
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise UserError(
            f"{label} was initialised by {init}, which also changes the base: its difference is unknown", FOLD
        )
    for key, value in config.items():
        if value and key not in _KNOWN:
            raise UserError(f"{label} sets {key}, which can't be merged exactly", FOLD)


def rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and s of a module by its name, as PEFT looks them up: α/r, or α/√r (rsLoRA, arXiv:2312.03732)."""
    rank = int(_by_pattern(config.get("rank_pattern"), module, config.get("r", 8)))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether modules_to_save names a module or one that it is part of, as PEFT matches the ends of names."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(name.endswith(str(wanted)) for wanted in config.get("modules_to_save") or () for name in names)


def tokens_of(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows that trainable_token_indices names for an embedding; none if it names none."""
    given = config.get("trainable_token_indices") or ()
    if isinstance(given, Mapping):
        given = next((rows for name, rows in given.items() if module.endswith(str(name))), ())
    return tuple(int(row) for row in given)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default
