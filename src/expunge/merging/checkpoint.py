"""Reading a checkpoint tensor by tensor: headers checked first, then memory-mapped slices, never a whole model."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AGAIN = "fetch or copy the file again"
_WIDE = "give a 16 or 32 bit checkpoint"

#: Codes of the safetensors format: dtype and bytes per element.
DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
CODES = {dtype: code for code, (dtype, _) in DTYPES.items()}

# Where a model that ties its embeddings may store them a second time.
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "output.weight")
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize

    @property
    def merges(self) -> bool:
        """Whether it holds weights (floating point) instead of counters and masks."""
        return self.dtype.is_floating_point


@dataclass
class Checkpoint:
    """A folder with a whole model: its config, its tensors' shapes, and their values one at a time."""

    folder: Path
    label: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    tied: dict[str, str] = field(default_factory=dict)
    """Names stored a second time although the config ties them: {name left out of `tensors`: name that stays}."""
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, label: str | None = None) -> Checkpoint:
        """Read config and headers, no weights. Raises UserError for what is missing, damaged, pickled or quantised."""
        label = label or str(folder)
        config = read_json(folder / "config.json", f"{label} holds no model (no config.json)")
        if config.get("quantization_config"):
            raise UserError(f"{label} is quantised and can't be merged exactly", "give the checkpoint it was made from")
        tensors: dict[str, TensorInfo] = {}
        expected = _weight_map(folder, label)
        for file in sorted({folder / name for name in expected.values()} or {folder / SINGLE}):
            for name, info in read_header(file).items():
                if expected and expected.get(name) != file.name:
                    raise UserError(f"{file} holds {name}, which {INDEX} does not place there", _AGAIN)
                tensors[name] = info
        for name, shard in expected.items():
            if name not in tensors:
                raise UserError(f"{folder / shard} lacks {name}, which {INDEX} places there", _AGAIN)
        checkpoint = cls(folder, label, config, tensors)
        checkpoint._leave_out_tied()
        return checkpoint

    @property
    def ties_embeddings(self) -> bool:
        """Whether input and output embedding are one parameter."""
        declared = declared_tie(self.config)
        has_output = any(name.endswith(_OUTPUT_EMBEDDINGS) for name in self.tensors)
        return not has_output if declared is None else declared and not has_output

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, memory-mapped: treat it as read-only."""
        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} can't be read ({error})", _AGAIN) from None
        return tensor

    def close(self) -> None:
        """Let go of the mapped files."""
        self._open.clear()

    def _leave_out_tied(self) -> None:
        if not declared_tie(self.config):
            return
        for name in [name for name in self.tensors if name.endswith(_OUTPUT_EMBEDDINGS)]:
            for source in [other for other in self.tensors if other.endswith(_INPUT_EMBEDDINGS)]:
                same = (self.tensors[source].shape, self.tensors[source].dtype)
                if same != (self.tensors[name].shape, self.tensors[name].dtype):
                    continue
                if torch.equal(self.read(source), self.read(name)):
                    self.tied[name] = source
                    del self.tensors[name]
                    break


def is_embedding(name: str) -> bool:
    """Whether a parameter is an input or output embedding, judged by its name."""
    return name.endswith(_INPUT_EMBEDDINGS + _OUTPUT_EMBEDDINGS)


def declared_tie(config: dict[str, Any]) -> bool | None:
    """What the config says about tied embeddings; None if it says nothing."""
    value = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    return None if value is None else bool(value)


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object. Raises UserError with the sentence `missing` if there is no file, and if it is not JSON."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing, "give the folder that holds the config and the weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line} is not valid JSON", _AGAIN) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a JSON object", _AGAIN)
    return loaded


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of a safetensors file. Raises UserError if it is missing, cut short, damaged or quantised."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if size < 8 or length > size - 8:
                raise UserError(f"{file} is cut short: its header is not complete ({size:,} bytes)", _AGAIN)
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"{file} is missing", _AGAIN) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{file} is not a safetensors file", _AGAIN) from None
    tensors: dict[str, TensorInfo] = {}
    end = 0
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if code not in DTYPES:
                raise UserError(f"{name} in {file} is stored as {code}, which can't be merged", _WIDE)
            info = TensorInfo(DTYPES[code][0], shape, file)
            if stop - start != info.nbytes:
                raise UserError(f"{file} is damaged: {name} has {stop - start:,} bytes, not {info.nbytes:,}", _AGAIN)
            tensors[name], end = info, max(end, stop)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is not a safetensors file", _AGAIN) from None
    if 8 + length + end != size:
        verb = "is cut short" if size < 8 + length + end else "is damaged"
        raise UserError(f"{file} {verb}: {size:,} bytes where its header promises {8 + length + end:,}", _AGAIN)
    return tensors


def _weight_map(folder: Path, label: str) -> dict[str, str]:
    """Tensor → shard from the index; empty for a single file. Raises UserError if there are no safetensors weights."""
    if (folder / SINGLE).is_file():
        return {}
    if (folder / INDEX).is_file():
        placed = read_json(folder / INDEX, "").get("weight_map")
        shards = placed.values() if isinstance(placed, dict) else [None]
        if not shards or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise UserError(f"{folder / INDEX} has no usable weight_map", _AGAIN)
        return dict(placed) if isinstance(placed, dict) else {}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{label} has its weights as a pickle (.bin), which can run code when it is read",
            "convert it first: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise UserError(f"{label} holds no weights ({SINGLE} or {INDEX})", "give the folder that holds the weights")
