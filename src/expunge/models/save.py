"""Write a model as a folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def save_model(model: nn.Module, tokenizer: Any, folder: Path, *, base: str | None = None) -> None:
    """Safetensors weights, config and tokenizer; a PEFT model is saved as its adapter, with `base` as its origin."""
    folder.mkdir(parents=True, exist_ok=True)
    inner: Any = model
    if hasattr(inner, "peft_config"):
        for config in inner.peft_config.values():
            config.base_model_name_or_path = base
            config.inference_mode = True
        inner.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template says nothing of this model
    else:
        inner.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
