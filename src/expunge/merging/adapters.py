"""PEFT LoRA adapters as exact weight differences: ΔW = scaling · B A for each base parameter that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.checkpoint import Checkpoint, TensorInfo, is_embedding, read_header, read_json
from expunge.models.files import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$"
)
_CARRIED = re.compile(r"^base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight$")

# Architectures whose square matrices are stored (in, out); everywhere else a matrix is (out, in).
_INPUT_FIRST = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

# Entries of adapter_config.json that leave ΔW = scaling · B A as it is. Whatever else is set is refused:
# a variant that this list does not know would be merged silently wrong.
# fmt: off
_HARMLESS = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
        "target_modules_to_tie", "task_type", "use_rslora",
    )
)
# fmt: on
_REFUSED = {
    "use_dora": "is a DoRA adapter",
    "lora_bias": "trains biases beside its factors (lora_bias)",
    "modules_to_save": "holds whole modules (modules_to_save)",
    "trainable_token_indices": "trains single tokens of the embedding (trainable_token_indices)",
    "target_parameters": "targets parameters instead of modules (target_parameters)",
    "layer_replication": "replicates layers (layer_replication)",
    "alora_invocation_tokens": "acts only behind its invocation tokens (aLoRA)",
}
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base as well
_FOLD = "fold it with PEFT's merge_and_unload() and give the folded checkpoint"


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors that change one base parameter, by their names in the adapter's file."""

    a: str
    b: str
    scaling: float
    transposed: bool


class Adapter:
    """One adapter folder, bound to its base: `delta` gives ΔW of a base parameter."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        """Read config and header. Raises UserError for what is missing, damaged or can't be merged exactly."""
        self.folder = folder
        self.label = label or str(folder)
        self.config = read_json(folder / ADAPTER_CONFIG, f"{self.label} holds no adapter (no {ADAPTER_CONFIG})")
        _refuse_variants(self.config, self.label)
        if not (folder / WEIGHTS).is_file() and any(folder.glob("*.bin")):
            raise UserError(
                f"{self.label} has its weights as a pickle (.bin), which can run code when it is read",
                "load it with PEFT and save it again: save_pretrained writes safetensors",
            )
        self._header = read_header(folder / WEIGHTS)
        self._file: Any = safe_open(folder / WEIGHTS, framework="pt")
        self._factors: dict[str, Factors] = {}

    @property
    def base(self) -> str | None:
        """What the adapter says its base model is."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of the base, if the adapter names one."""
        return self.config.get("revision") or None

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [self.folder / WEIGHTS]

    def bind(self, base: Checkpoint) -> None:
        """Match every factor with a parameter of `base`. Raises UserError for any that has none, or another shape."""
        pairs: dict[str, dict[str, str]] = {}
        embeddings = set()
        for key in self._header:
            match = _FACTOR.match(key)
            if match is None:
                self._check_carried(key, base)
                continue
            pairs.setdefault(match["module"], {})[match["factor"]] = key
            if match["embedding"]:
                embeddings.add(match["module"])
        if not pairs:
            raise UserError(f"{self.label} changes nothing: it holds no LoRA factors", "train it, or leave it out")
        for module, pair in sorted(pairs.items()):
            if set(pair) != {"A", "B"}:
                raise UserError(f"{self.label} is damaged: {module} has only one of its two factors", "save it again")
            name = _parameter(module, base, self.label)
            self._factors[name] = self._match(name, module, pair, base, module in embeddings)

    def delta(self, name: str, base: Tensor | None = None) -> Float[Tensor, "out in"] | None:
        """ΔW of a base parameter in float32, in the base's layout, whatever its values; None if it is left alone."""
        factors = self._factors.get(name)
        if factors is None:
            return None
        a, b = (self._file.get_tensor(key).to(torch.float32) for key in (factors.a, factors.b))
        # the smaller factor carries the scaling, so that no third tensor of ΔW's size is made
        return (a.T * factors.scaling) @ b.T if factors.transposed else (b * factors.scaling) @ a

    def close(self) -> None:
        """Let go of the mapped file."""
        self._file = None

    def _match(self, name: str, module: str, pair: Mapping[str, str], base: Checkpoint, embedding: bool) -> Factors:
        info = base.tensors[name]
        a, b = self._header[pair["A"]], self._header[pair["B"]]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or len(info.shape) != 2:
            raise UserError(f"{self.label}: {module} is not a pair of matrices on a matrix", _FOLD)
        if not info.merges:
            raise UserError(
                f"{self.label} changes {name}, which is stored as {info.dtype} in {base.label}",
                "give a 16 or 32 bit base",
            )
        if base.ties_embeddings and is_embedding(name):
            raise _tied(name, base, self.label)
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))
        if rank != a.shape[0]:
            raise UserError(
                f"{self.label}: {module} has rank {a.shape[0]}, its config says {rank}",
                f"config and weights do not belong together; check {self.folder / ADAPTER_CONFIG}",
            )
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        plain = (b.shape[0], a.shape[1])
        if info.shape not in (plain, plain[::-1]):
            raise UserError(
                f"{self.label} changes {name} by a {plain[0]} × {plain[1]} matrix, but it is "
                f"{info.shape[0]} × {info.shape[1]} in {base.label}",
                "give the base that the adapter was trained on with --base",
            )
        return Factors(pair["A"], pair["B"], scaling, self._is_transposed(name, plain, info, base, embedding))

    def _is_transposed(
        self, name: str, plain: tuple[int, int], info: TensorInfo, base: Checkpoint, embedding: bool
    ) -> bool:
        if info.shape != plain[::-1] or plain[0] != plain[1]:
            return info.shape != plain
        if embedding:
            return True  # an embedding's B A is (dim, vocabulary)
        if base.config.get("model_type") in _INPUT_FIRST and not is_embedding(name):
            return True
        if self.config.get("fan_in_fan_out"):
            raise UserError(f"{self.label}: whether {name} is stored transposed can't be told (fan_in_fan_out)", _FOLD)
        return False

    def _check_carried(self, key: str, base: Checkpoint) -> None:
        """An adapter on an embedding carries the base's embedding with it: fine as long as it is the base's."""
        match = _CARRIED.match(key)
        names = [match["module"] + ".weight"] if match and is_embedding(match["module"] + ".weight") else []
        for name in names:
            found = name if name in base.tensors else base.tied.get(name)
            if found and base.tensors[found].shape == self._header[key].shape:
                own = self._file.get_tensor(key)
                if torch.equal(own, base.read(found).to(own.dtype)):
                    return
            if found is None and base.ties_embeddings:
                raise _tied(name, base, self.label)
            raise UserError(f"{self.label} holds {name}, changed from {base.label}", _FOLD)
        raise UserError(f"{self.label} holds {key}, which is no LoRA factor", _FOLD)


def _refuse_variants(config: Mapping[str, Any], label: str) -> None:
    """Raises UserError unless the adapter is plain LoRA, for which ΔW = scaling · B A holds exactly."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{label} is a {kind or 'nameless'} adapter; only LoRA can be merged", _FOLD)
    for key, sentence in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{label} {sentence} and can't be merged exactly yet", _FOLD)
    if config.get("bias", "none") != "none":
        raise UserError(f"{label} trains biases (bias={config['bias']}) and can't be merged exactly yet", _FOLD)
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise UserError(
            f"{label} was initialised by {init}, which also changes the base: its difference is unknown", _FOLD
        )
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise UserError(f"{label} sets {key}, which can't be merged exactly yet", _FOLD)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default


def _tied(name: str, base: Checkpoint, label: str) -> UserError:
    # the adapter acts on one side only; folding it into the one stored tensor would change both
    return UserError(f"{label} changes {name}, which {base.label} ties to its other embedding", _FOLD)


def _parameter(module: str, base: Checkpoint, label: str) -> str:
    """The name in `base` of a module's weight; a leading model prefix may be missing in the file."""
    name = f"{module}.weight"
    if name in base.tied:
        return base.tied[name]
    parts = name.split(".")
    for drop in range(min(2, len(parts) - 1)):
        shorter = ".".join(parts[drop:])
        if shorter in base.tensors:
            return shorter
    if base.ties_embeddings and is_embedding(name):
        raise _tied(name, base, label)
    raise UserError(
        f"{label} changes {name}, which {base.label} does not hold",
        "give the base that the adapter was trained on with --base",
    )
