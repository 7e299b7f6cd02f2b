"""Where an adapter keeps the changes of a model: low-rank factors on matrices, whole modules for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from expunge.errors import UserError
from expunge.merging.checkpoint import Checkpoint, TensorInfo, is_embedding

_FULL = "leave out the rank: the result is then a full checkpoint"


@dataclass(frozen=True, slots=True)
class Place:
    """A stored parameter as a part of a module."""

    module: str
    leaf: str
    kind: str  # linear, conv1d (a linear map stored transposed), embedding, other


@dataclass
class Layout:
    """What an adapter of `rank` holds: which parameter goes under which keys of its file."""

    rank: int
    low: dict[str, Place] = field(default_factory=dict)  # parameter → the module whose factors hold its change
    whole: dict[str, list[str]] = field(default_factory=dict)  # parameter → keys under which it is stored as it is
    saved: list[str] = field(default_factory=list)  # modules_to_save
    biases: bool = False
    ties: bool = False
    ranks: dict[str, int] = field(default_factory=dict)  # module → rank, where its matrix allows less

    def keys(self, name: str) -> tuple[str, str]:
        """The keys of the A and the B that hold a parameter's change."""
        place = self.low[name]
        stem = f"base_model.model.{place.module}.lora_"
        return (
            (f"{stem}embedding_A", f"{stem}embedding_B")
            if place.kind == "embedding"
            else (f"{stem}A.weight", f"{stem}B.weight")
        )

    def transposes(self, name: str) -> bool:
        """Whether B·A is the transpose of the stored matrix."""
        return self.low[name].kind != "linear"

    def tensors(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Key → shape and dtype of everything in the adapter's file; factors are float32, the two of a pair adjoin."""
        found = {}
        for name, place in self.low.items():
            rows, columns = infos[name].shape[::-1] if self.transposes(name) else infos[name].shape
            rank = self.ranks.get(place.module, self.rank)
            for key, shape in zip(self.keys(name), ((rank, columns), (rows, rank)), strict=True):
                found[key] = TensorInfo(torch.float32, shape, infos[name].file)
        for name, keys in self.whole.items():
            found.update(dict.fromkeys(keys, infos[name]))
        return found

    def config(self, targets: list[str], base: str, revision: str | None) -> dict[str, Any]:
        """adapter_config.json, whose s = α/r is 1 everywhere."""
        patterns = {module.replace(".", r"\."): rank for module, rank in self.ranks.items()}
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": targets,
            "modules_to_save": self.saved or None,
            "bias": "lora_only" if self.biases else "none",
            "fan_in_fan_out": any(place.kind == "conv1d" for place in self.low.values()),
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }
        if self.ties:  # older versions of PEFT do not know it and do without
            config["ensure_weight_tying"] = True
        return config


@dataclass(frozen=True, slots=True)
class Places:
    """Stored parameter → its place in the model that is loaded; and the module of the output embedding."""

    of: dict[str, Place]
    head: str | None


def find_places(base: Checkpoint) -> Places:
    """The places of a checkpoint's parameters, from the model without weights. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, ImportError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the modules of {base.label} are unknown: {why}", _FULL) from None
    kinds = ((Conv1D, "conv1d"), (nn.Linear, "linear"), (nn.Embedding, "embedding"))
    places: dict[str, Place] = {}
    for module, part in model.named_modules():
        kind = next((word for known, word in kinds if isinstance(part, known)), "other")
        if kind == "other" and any(part.children()):
            kind = "parent"
        for leaf, _ in part.named_parameters(recurse=False):
            name = f"{module}.{leaf}" if module else leaf
            for stored in (name, name.removeprefix(f"{model.base_model_prefix}.")):
                if stored in base.tensors:
                    places.setdefault(stored, Place(module, leaf, kind))
    output = model.get_output_embeddings()
    return Places(places, next((name for name, part in model.named_modules() if part is output), None))


def plan_layout(changed: Iterable[str], places: Places, base: Checkpoint, rank: int) -> Layout:
    """Where each changed parameter goes. Raises UserError for changes that no adapter holds."""
    layout, modules = Layout(rank), set()
    changed = list(changed)
    for name in changed:
        place = places.of.get(name)
        if place is None:
            raise UserError(f"{name} changes, and in the model that is loaded there is no such parameter", _FULL)
        matrix = place.leaf == "weight" and place.kind in ("linear", "conv1d", "embedding")
        if matrix and not (base.ties_embeddings and is_embedding(name)):
            layout.low[name] = place
            if min(base.tensors[name].shape) < rank:
                layout.ranks[place.module] = min(base.tensors[name].shape)
        elif place.kind == "parent" or (place.kind == "other" and len(base.tensors[name].shape) > 1):
            raise UserError(f"{name} changes, which is no weight of a linear map, so no LoRA adapter holds it", _FULL)
    targets = {place.module for place in layout.low.values()}
    for name in changed:
        place = places.of[name]
        if name in layout.low:
            continue
        if place.module in targets:
            layout.biases = True  # a targeted module's bias
            layout.whole[name] = [f"base_model.model.{place.module}.base_layer.{place.leaf}"]
        else:
            modules.add(place.module)
    if not layout.low:
        raise UserError("no matrix changes that low-rank factors could hold", _FULL)
    _save_whole(layout, modules, places, base)
    return layout


def target_modules(layout: Layout, places: Places) -> list[str]:
    """What names the targeted modules and no others: the last parts of names where that is enough, else whole names."""
    wanted = {place.module for place in layout.low.values()}
    ends: dict[str, set[str]] = {}
    for place in places.of.values():
        ends.setdefault(place.module.rsplit(".", 1)[-1], set()).add(place.module)
    named = set()
    for module in wanted:
        end = module.rsplit(".", 1)[-1]
        named.add(end if ends[end] <= wanted else module)
    return sorted(named)


def _save_whole(layout: Layout, modules: set[str], places: Places, base: Checkpoint) -> None:
    """All parameters of `modules` as they are; of tied embeddings both sides, because PEFT would untie one."""
    saved = set(modules)
    for name, place in places.of.items():
        if place.module not in modules:
            continue
        layout.whole[name] = [f"base_model.model.{place.module}.{place.leaf}"]
        if base.ties_embeddings and is_embedding(name) and places.head is not None:
            layout.ties = True
            layout.whole[name].append(f"base_model.model.{places.head}.{place.leaf}")
            saved.add(places.head)
    layout.saved = sorted(saved)
