"""What is merged: folders and names become inputs on a common base, checked to be alike before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.adapters import Adapter
from expunge.merging.ahead import room
from expunge.merging.checkpoint import Checkpoint, TensorInfo, is_embedding
from expunge.merging.selection import CHUNK
from expunge.models.files import is_adapter

# Entries of config.json on which the meaning of the weights depends though their shapes may not.
_MEANING = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_head",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
)


@runtime_checkable
class Source(Protocol):
    """A folder that is read."""

    folder: Path
    label: str

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        ...


@runtime_checkable
class Input(Source, Protocol):
    """One model to be merged, seen as a difference from the base."""

    def delta(self, name: str, base: Tensor | None) -> Float[Tensor, "*shape"] | None:
        """Difference from `base` (from 0 without one) in float32, a fresh tensor; None where there is none."""
        ...

    def close(self) -> None:
        """Let go of the mapped files."""
        ...


class Full:
    """A whole checkpoint as an input."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.label = checkpoint.label

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return self.checkpoint.files

    def delta(self, name: str, base: Tensor | None) -> Float[Tensor, "*shape"] | None:
        """θ − θ_base of a parameter in float32, whatever the stored dtypes; θ itself without a base."""
        own = self.checkpoint.read(name)
        if base is not None and base.device.type != "cpu":
            return own.to(base.device, torch.float32).sub_(base)
        delta = room(own.shape)
        flat, start = delta.view(-1), 0
        for piece in own.reshape(-1).split(CHUNK):  # a whole narrow base would be copied to be widened
            difference = flat[start : start + CHUNK].copy_(piece)
            if base is not None:
                difference.sub_(base.view(-1)[start : start + CHUNK])
            start += CHUNK
        return delta

    def close(self) -> None:
        """Let go of the mapped files."""
        self.checkpoint.close()


@dataclass(frozen=True)
class Inputs:
    """The opened inputs, their base if there is one, and the checkpoint whose tensors the result will have."""

    models: list[Input]
    base: Checkpoint | None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The base, if there is one, and every whole checkpoint among the inputs."""
        full = [model.checkpoint for model in self.models if isinstance(model, Full)]
        return [self.base, *full] if self.base is not None else full

    @property
    def reference(self) -> Checkpoint:
        """The base, or the first checkpoint if there is none."""
        return self.checkpoints[0]

    @property
    def sources(self) -> list[Source]:
        """Every folder that is read."""
        return [*self.models, *([self.base] if self.base is not None else [])]

    def tensors(self) -> dict[str, TensorInfo]:
        """Name → shape and dtype of the result: the widest dtype among the checkpoints, so that nothing is lost."""
        result = {}
        for name, info in self.reference.tensors.items():
            dtype = info.dtype
            for checkpoint in self.checkpoints[1:]:
                dtype = torch.promote_types(dtype, checkpoint.tensors[name].dtype)
            result[name] = TensorInfo(dtype, info.shape, info.file)
        return result

    def close(self) -> None:
        """Let go of the mapped files."""
        for model in self.models:
            model.close()
        if self.base is not None:
            self.base.close()


def open_inputs(models: Sequence[str | Path], base: str | Path | None) -> Inputs:
    """Open and compare everything; no weight is read. Raises UserError naming the first thing that does not fit."""
    if not models:
        raise UserError("there is nothing to merge", "give at least one model folder or adapter folder")
    opened: list[Input] = []
    for model in models:
        folder = resolve(model)
        opened.append(Adapter(folder, str(model)) if is_adapter(folder) else Full(Checkpoint.open(folder, str(model))))
    adapters = [model for model in opened if isinstance(model, Adapter)]
    base_folder = resolve(base) if base is not None else _common_base(adapters)
    checkpoint = None
    if base_folder is not None:
        if is_adapter(base_folder):
            raise UserError(
                f"the base {base or base_folder} is itself an adapter",
                f"fold it first: expunge merge {base_folder} --method linear -o FOLDED",
            )
        checkpoint = Checkpoint.open(base_folder, str(base or base_folder))
    inputs = Inputs(opened, checkpoint)
    for other in inputs.checkpoints[1:]:
        _check_alike(inputs.reference, other)
    for adapter in adapters:
        assert checkpoint is not None
        adapter.bind(checkpoint)
    return inputs


def resolve(name: str | Path, near: Path | None = None, revision: str | None = None) -> Path:
    """The folder behind a path (also one relative to `near`), a run directory, an alias or a hub id."""
    given = Path(name).expanduser()
    for folder in (given, near / given) if near is not None else (given,):
        if folder.is_dir():
            inner = folder / "model"  # a run directory holds its result there
            is_run = not (folder / "config.json").is_file() and not is_adapter(folder) and inner.is_dir()
            return inner if is_run else folder
    from expunge.models.load import resolve_folder

    found = resolve_folder(str(name), revision)
    if not found.is_dir():
        raise UserError(f"{name} is a GGUF file and can't be merged exactly", "give the checkpoint it was made from")
    return found


def _common_base(adapters: Sequence[Adapter]) -> Path | None:
    """The one base that all adapters name. Raises UserError if they name none, or several."""
    bases: dict[Path, Adapter] = {}
    for adapter in adapters:
        if adapter.base is None:
            raise UserError(f"the adapter {adapter.label} does not say what its base model is", "say it with --base")
        try:
            folder = resolve(adapter.base, adapter.folder, adapter.revision).resolve()
        except UserError as error:
            sentence = f"the base of {adapter.label} is not there: {error.message}"
            raise UserError(sentence, "say where it is with --base") from None
        bases.setdefault(folder, adapter)
    if len(bases) > 1:
        (one, first), (two, second) = list(bases.items())[:2]
        raise UserError(
            f"the adapters have different bases: {first.label} was trained on {one}, {second.label} on {two}",
            "if both folders hold the same model, say which to use with --base",
        )
    return next(iter(bases), None)


def _check_alike(one: Checkpoint, two: Checkpoint) -> None:
    """Raises UserError naming the first tensor, setting or token in which two checkpoints differ."""
    kinds = [checkpoint.config.get("model_type") for checkpoint in (one, two)]
    kind = f" ({one.label} is a {kinds[0]}, {two.label} a {kinds[1]})" if kinds[0] != kinds[1] else ""
    hint = "only models of one architecture, size and vocabulary can be merged"
    for name in dict.fromkeys([*one.tensors, *two.tensors]):
        for holder, other in ((one, two), (two, one)):
            if name not in other.tensors:
                raise UserError(f"{other.label} has no tensor {name}, which {holder.label} has{kind}", hint)
        first, second = one.tensors[name], two.tensors[name]
        if first.shape != second.shape:
            what = "the vocabularies differ: " if is_embedding(name) and first.shape[1:] == second.shape[1:] else ""
            raise UserError(
                f"{what}{name} is {_size(first)} in {one.label} and {_size(second)} in {two.label}{kind}", hint
            )
        if first.merges != second.merges or (not first.merges and first.dtype != second.dtype):
            raise UserError(f"{name} is {first.dtype} in {one.label} and {second.dtype} in {two.label}{kind}", hint)
    if kind:
        raise UserError(f"the architectures differ{kind}", hint)
    for key in _MEANING:
        values = [checkpoint.config.get(key) for checkpoint in (one, two)]
        if None not in values and values[0] != values[1]:
            raise UserError(f"{key} is {values[0]} in {one.label} and {values[1]} in {two.label}", hint)
    _check_vocabulary(one, two, hint)


def _check_vocabulary(one: Checkpoint, two: Checkpoint, hint: str) -> None:
    files = [checkpoint.folder / "tokenizer.json" for checkpoint in (one, two)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    first, second = (_vocabulary(file) for file in files)
    if not first or not second:
        return
    for token in sorted(first.keys() | second.keys()):
        if first.get(token) != second.get(token):
            raise UserError(
                f"the vocabularies differ: token {token} is {first.get(token)!r} in {one.label} "
                f"and {second.get(token)!r} in {two.label}",
                hint,
            )


def _vocabulary(file: Path) -> dict[int, str]:
    """Token id → text of a tokenizer.json; empty if it has another form."""
    try:
        loaded: Any = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = loaded["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {int(index): str(text) for text, index in vocabulary.items()}
        else:
            tokens = {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
        return tokens | {int(entry["id"]): str(entry["content"]) for entry in loaded.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, IndexError):
        return {}


def _size(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape)) or "a single number"
