"""What the files of a checkpoint say before a weight is read: all there, whole, and no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expunge.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_AGAIN = "fetch or copy the checkpoint again"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises UserError naming file and line."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg}", _AGAIN) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}", _AGAIN) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a JSON object", _AGAIN)
    return loaded


def adapter_base(folder: Path) -> str:
    """The model that an adapter was trained on. Raises UserError if the adapter does not say."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"the adapter {folder} does not say what its base model is",
            "set base_model_name_or_path in adapter_config.json",
        )
    return str(base)


def check_weights(folder: Path, label: str, allow_pickle: bool) -> bool:
    """Whether the weights are safetensors (else an allowed pickle), each file whole. Raises UserError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if not any(path for pattern in _PICKLES for path in folder.glob(pattern)):
            raise UserError(f"{label} holds no weights", "expected model.safetensors in that folder")
        if not allow_pickle:
            raise UserError(
                f"{label} has its weights as a pickle (.bin), which can run code when it is read",
                "convert it to safetensors, or add --allow-pickle if you trust its origin",
            )
        return False
    if (folder / _INDEX).is_file() and not (folder / "model.safetensors").is_file():
        placed = read_json(folder / _INDEX).get("weight_map")
        for shard in sorted(set(placed.values())) if isinstance(placed, dict) else []:
            if not (folder / str(shard)).is_file():
                raise UserError(f"{label} lacks the file {shard}, which its index names", _AGAIN)
    for file in files:
        _check_header(file)
    return True


def _check_header(file: Path) -> None:
    """Opening a safetensors file compares its header with its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{file} is damaged or cut short ({reason})", _AGAIN) from None
