"""GGUF files, dequantised to float32, as ordinary models that can be trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.errors import UserError


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a GGUF file. Raises UserError if it can't be read."""
    model, tokenizer = _part(AutoModelForCausalLM, path, dtype=torch.float32), gguf_tokenizer(path)
    # dequantised weights are plain weights; what remains of the quantizer makes save_pretrained refuse
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    return model, tokenizer


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file. Raises UserError if it can't be read."""
    return _part(AutoTokenizer, path)


def _part(kind: Any, path: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path.parent, gguf_file=path.name, **options)
    except Exception as error:  # the reader has no errors of its own: anything means a damaged or unknown file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} can't be read as GGUF: {first[:200]}", "fetch the file again, or give a folder with safetensors"
        ) from error
