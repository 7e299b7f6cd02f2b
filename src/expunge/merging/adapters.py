"""PEFT LoRA adapters as exact weight differences: what each changes in the parameters of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.adapter_variants import (
    FOLD,
    Change,
    Factors,
    Rows,
    Saved,
    Shift,
    is_saved,
    rank_and_scaling,
    refuse_variants,
    tokens_of,
)
from expunge.merging.checkpoint import Checkpoint, TensorInfo, is_embedding, read_header, read_json
from expunge.models.files import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"

_PREFIX = r"^base_model\.model\.(?P<module>.+)"
_FACTOR = re.compile(_PREFIX + r"\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$")
_MAGNITUDE = re.compile(_PREFIX + r"\.lora_magnitude_vector(?:\.weight)?$")
_SHIFT = re.compile(_PREFIX + r"\.lora_B\.bias$")
_ROWS = re.compile(_PREFIX + r"\.token_adapter\.trainable_tokens_delta$")
_COPY = re.compile(r"\.(?:original_module|modules_to_save)\.(?=[^.]+$)")  # PEFT does not read these back
_WHOLE = re.compile(r"^base_model\.model\.(?P<module>.+?)(?P<inner>\.base_layer)?\.(?P<leaf>[^.]+)$")

# Architectures whose square matrices are stored (in, out); everywhere else a matrix is (out, in).
_INPUT_FIRST = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_OTHER_BASE = "give the base that the adapter was trained on with --base"


class Adapter:
    """One adapter folder, bound to its base: `delta` gives what it changes in a base parameter."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        """Read config and header. Raises UserError for what is missing, damaged or can't be merged exactly."""
        self.folder = folder
        self.label = label or str(folder)
        self.config = read_json(folder / ADAPTER_CONFIG, f"{self.label} holds no adapter (no {ADAPTER_CONFIG})")
        refuse_variants(self.config, self.label)
        if not (folder / WEIGHTS).is_file() and any(folder.glob("*.bin")):
            raise UserError(
                f"{self.label} has its weights as a pickle (.bin), which can run code when it is read",
                "load it with PEFT and save it again: save_pretrained writes safetensors",
            )
        self._header = read_header(folder / WEIGHTS)
        self._file: Any = safe_open(folder / WEIGHTS, framework="pt")
        self._changes: dict[str, Change] = {}

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

    @property
    def changes(self) -> Mapping[str, Change]:
        """Base parameter → what the adapter does to it; empty before `bind`."""
        return self._changes

    def bind(self, base: Checkpoint) -> None:
        """Match every tensor with a parameter of `base`. Raises UserError for any that has none, or another shape."""
        pairs: dict[str, dict[str, str]] = {}
        embeddings, sides = set(), {}
        for key in self._header:
            if match := _FACTOR.match(key):
                pairs.setdefault(match["module"], {})[match["factor"]] = key
                if match["embedding"]:
                    embeddings.add(match["module"])
            elif (match := _MAGNITUDE.match(key)) and self.config.get("use_dora"):
                pairs.setdefault(match["module"], {})["magnitude"] = key
            elif (match := _SHIFT.match(key)) and self.config.get("lora_bias"):
                name = self._place(match["module"], "bias", base)
                self._add(name, Shift(key, rank_and_scaling(self.config, match["module"])[1]), key, base)
            elif match := _ROWS.match(key):
                self._add_rows(match["module"].removesuffix(".base_layer"), key, base)
            elif self._holds(key, base) and not _COPY.search(key):
                match = _WHOLE.match(key)
                assert match is not None
                name = f"{match['module']}.{match['leaf']}"
                if base.ties_embeddings and is_embedding(name):
                    sides[name] = key
                else:
                    self._add(self._place(match["module"], match["leaf"], base), Saved(key), key, base)
            elif _COPY.sub(".", key) == key or _COPY.sub(".", key) not in self._header:
                self._check_carried(key, base)
        for module, pair in sorted(pairs.items()):
            self._add_factors(module, pair, base, module in embeddings)
        self._add_tied(sides, base)
        if not self._changes:
            raise UserError(f"{self.label} changes nothing: it holds no LoRA factors", "train it, or leave it out")

    def delta(self, name: str, base: Tensor | None = None) -> Float[Tensor, "*shape"] | None:
        """The difference from `base` in float32, in the base's layout; None where the adapter changes nothing."""
        change = self._changes.get(name)
        if change is None:
            return None
        device = torch.device("cpu") if base is None else base.device
        return change.delta(lambda key: self.read(key, device), base)

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of the file in float32: treat it as read-only."""
        tensor: Tensor = self._file.get_tensor(key)
        return tensor.to(device, torch.float32)

    def close(self) -> None:
        """Let go of the mapped file."""
        self._file = None

    def _add(self, name: str, change: Change, key: str, base: Checkpoint) -> None:
        """File a change of a whole parameter, or of a part of it that was checked."""
        info, own = base.tensors[name], self._header[key]
        if not isinstance(change, Factors | Rows) and own.shape != info.shape:
            raise UserError(
                f"{self.label} holds {name} as {_size(own)}, but it is {_size(info)} in {base.label}", _OTHER_BASE
            )
        if not info.merges:
            raise UserError(
                f"{self.label} changes {name}, which is stored as {info.dtype} in {base.label}",
                "give a 16 or 32 bit base",
            )
        if name in self._changes:
            raise UserError(f"{self.label} changes {name} in two ways at once and can't be merged exactly", FOLD)
        self._changes[name] = change

    def _add_factors(self, module: str, pair: Mapping[str, str], base: Checkpoint, embedding: bool) -> None:
        wanted = {"A", "B", "magnitude"} if self.config.get("use_dora") else {"A", "B"}
        if not {"A", "B"} <= set(pair):
            raise UserError(f"{self.label} is damaged: {module} has only one of its two factors", "save it again")
        if set(pair) != wanted:
            raise UserError(f"{self.label} is damaged: {module} lacks its DoRA magnitude", "save it again")
        name = self._place(module, "weight", base)
        info = base.tensors[name]
        a, b = self._header[pair["A"]], self._header[pair["B"]]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or len(info.shape) != 2:
            raise UserError(f"{self.label}: {module} is not a pair of matrices on a matrix", FOLD)
        if base.ties_embeddings and is_embedding(name):
            raise self._tied(name, base)
        rank, scaling = rank_and_scaling(self.config, module)
        if rank != a.shape[0]:
            raise UserError(
                f"{self.label}: {module} has rank {a.shape[0]}, its config says {rank}",
                f"config and weights do not belong together; check {self.folder / ADAPTER_CONFIG}",
            )
        plain = (b.shape[0], a.shape[1])
        if info.shape not in (plain, plain[::-1]):
            raise UserError(
                f"{self.label} changes {name} by a {plain[0]} × {plain[1]} matrix, but it is "
                f"{_size(info)} in {base.label}",
                _OTHER_BASE,
            )
        magnitude = pair.get("magnitude")
        if magnitude is not None and self._header[magnitude].numel != plain[0]:
            raise UserError(f"{self.label} is damaged: {module} has a magnitude of another size", "save it again")
        transposed = self._is_transposed(name, plain, info, base, embedding)
        self._add(name, Factors(pair["A"], pair["B"], rank, scaling, transposed, magnitude), pair["B"], base)

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
            raise UserError(f"{self.label}: whether {name} is stored transposed can't be told (fan_in_fan_out)", FOLD)
        return False

    def _add_rows(self, module: str, key: str, base: Checkpoint) -> None:
        """Single rows of an embedding. Those of an input embedding hold for an output embedding tied to it as well."""
        if base.ties_embeddings and f"{module}.weight" not in base.tensors:
            raise self._tied(f"{module}.weight", base)
        name = self._place(module, "weight", base)
        info, own, tokens = base.tensors[name], self._header[key], tokens_of(self.config, module)
        if len(info.shape) != 2 or own.shape != (len(tokens), info.shape[-1]) or len(set(tokens)) != len(tokens):
            raise UserError(
                f"{self.label} holds {_size(own)} of {name} for {len(tokens)} trainable_token_indices",
                f"config and weights do not belong together; check {self.folder / ADAPTER_CONFIG}",
            )
        if not all(0 <= token < info.shape[0] for token in tokens):
            raise UserError(f"{self.label} trains tokens that {base.label} does not have", _OTHER_BASE)
        self._add(name, Rows(key, tokens), key, base)

    def _holds(self, key: str, base: Checkpoint) -> bool:
        """Whether the config says that the adapter holds this tensor of the base whole."""
        match = _WHOLE.match(key)
        if match is None:
            return False
        if not match["inner"] and is_saved(self.config, match["module"]):
            return True
        both = self.config.get("ensure_weight_tying") and self.config.get("modules_to_save") and base.ties_embeddings
        if both and not match["inner"] and is_embedding(f"{match['module']}.{match['leaf']}"):
            return True  # the side that is tied to the one in the list
        bias = self.config.get("bias", "none")
        return match["leaf"] == "bias" and (bias == "all" or (bias == "lora_only" and match["inner"] is not None))

    def _add_tied(self, sides: Mapping[str, str], base: Checkpoint) -> None:
        """An embedding that is saved on both sides, with the same values, stays tied; else there would be two."""
        if not sides:
            return
        keys, stored = list(sides.values()), [name for name in base.tensors if is_embedding(name)]
        same = len(keys) == 2 and torch.equal(self._file.get_tensor(keys[0]), self._file.get_tensor(keys[1]))
        if not same or len(stored) != 1:
            raise self._tied(next(iter(sides)), base)
        self._add(stored[0], Saved(keys[0]), keys[0], base)

    def _check_carried(self, key: str, base: Checkpoint) -> None:
        """An adapter on an embedding carries the base's embedding with it: fine as long as it is the base's."""
        match = _WHOLE.match(key)
        name = f"{match['module']}.weight" if match and match["leaf"] == "weight" else ""
        if not name or not is_embedding(name):
            raise UserError(f"{self.label} holds {key}, which is no LoRA factor", FOLD)
        found = name if name in base.tensors else base.tied.get(name)
        if found and base.tensors[found].shape == self._header[key].shape:
            own = self._file.get_tensor(key)
            if torch.equal(own, base.read(found).to(own.dtype)):
                return
        if found is None and base.ties_embeddings:
            raise self._tied(name, base)
        raise UserError(f"{self.label} holds {name}, changed from {base.label}", FOLD)

    def _place(self, module: str, leaf: str, base: Checkpoint) -> str:
        """The name in `base` of a module's parameter; a leading model prefix may be missing in the file."""
        name = f"{module}.{leaf}"
        if name in base.tied:
            return base.tied[name]
        parts = name.split(".")
        for drop in range(min(2, len(parts) - 1)):
            shorter = ".".join(parts[drop:])
            if shorter in base.tensors:
                return shorter
        if base.ties_embeddings and is_embedding(name):
            raise self._tied(name, base)
        raise UserError(f"{self.label} changes {name}, which {base.label} does not hold", _OTHER_BASE)

    def _tied(self, name: str, base: Checkpoint) -> UserError:
        # the adapter acts on one side only; folding it into the one stored tensor would change both
        return UserError(f"{self.label} changes {name}, which {base.label} ties to its other embedding", FOLD)


def _size(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape)) or "a single number"
