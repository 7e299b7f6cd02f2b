"""Load a model and its tokenizer: alias, folder, adapter folder, hub id or GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.errors import UserError, did_you_mean
from expunge.models.aliases import ALIASES, fetch_alias
from expunge.recipe import ModelConfig


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and the folder that both came from."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    source: str


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """The local folder (or .gguf file) behind an alias, path or hub id. Raises UserError if there is none."""
    if name in ALIASES:
        return fetch_alias(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise UserError(
                f"{name} holds no model (no config.json)", "give the folder that contains config.json and the weights"
            )
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UserError(f"{name} is a file, not a model folder", "give the folder of the checkpoint, or a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"no model at {name}", f"give a folder, a hub id (owner/name) or an alias; {_alias_hint(name)}")
    return _snapshot(name, revision)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a model. Raises UserError if the model comes without one."""
    folder = resolve_folder(config.id, config.revision)
    if folder.suffix == ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(folder.parent, gguf_file=folder.name)
    else:
        source = folder
        if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            source = resolve_folder(_adapter_base(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _reject_remote_code(error, config)
            raise UserError(
                f"{config.id} has no tokenizer that can be loaded",
                "save one beside the weights: tokenizer.save_pretrained(folder)",
            ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.id} has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig) -> Loaded:
    """A causal language model in eval mode with its tokenizer. Raises UserError for what can't be loaded."""
    folder = resolve_folder(config.id, config.revision)
    tokenizer = load_tokenizer(config)
    dtype = getattr(torch, config.dtype)
    if folder.suffix == ".gguf":
        model, _ = load_gguf(folder)
        model = model.to(dtype)
    elif (folder / "adapter_config.json").is_file():
        model = _load_adapter(folder, config)
    else:
        model = _load_full(folder, config, dtype)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        raise UserError(
            f"{config.id}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.get_input_embeddings().num_embeddings}",
            "the tokenizer belongs to another model; put the right one into the folder",
        )
    return Loaded(model.eval(), tokenizer, folder, _source(config.id, folder))


def load_gguf(path: Path) -> tuple[Any, Any]:
    """A GGUF file, dequantised to float32, as an ordinary model that can be trained and saved."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # dequantised weights are plain weights; what remains of the quantizer makes save_pretrained refuse
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    return model, tokenizer


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (folder / "adapter_config.json").is_file()


def _load_full(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    has_safe = any(folder.glob("*.safetensors"))
    if not has_safe:
        if not any(folder.glob("*.bin")) and not any(folder.glob("*.pt")):
            raise UserError(f"{config.id} holds no weights", "expected model.safetensors in that folder")
        if not config.allow_pickle:
            raise UserError(
                f"{config.id} has its weights as a pickle (.bin), which can run code when it is read",
                "convert it to safetensors, or add --allow-pickle if you trust its origin",
            )
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=has_safe,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, RuntimeError) as error:
        _reject_remote_code(error, config)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{config.id} can't be loaded: {first}", "check the folder, e.g. with: expunge doctor"
        ) from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise UserError(
                f"{config.id}: a safetensors file is damaged ({error})", "fetch the checkpoint again"
            ) from None
        raise


def _load_adapter(folder: Path, config: ModelConfig) -> Any:
    from peft import PeftModel

    base = load_model(config.model_copy(update={"id": _adapter_base(folder), "revision": None}))
    return PeftModel.from_pretrained(base.model, str(folder))


def _adapter_base(folder: Path) -> str:
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"the adapter {folder} does not say what its base model is",
            "set base_model_name_or_path in adapter_config.json",
        )
    return str(base)


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    ignore = ["*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot"]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignore, etag_timeout=10))
    except Exception as error:  # hub errors have many types; for the user they are one sentence
        raise UserError(
            f"no folder called {name} here, and the hub did not give it ({type(error).__name__})",
            f"check the spelling, the network and, for gated models, `hf auth login`; {_alias_hint(name)}",
        ) from None


def _alias_hint(name: str) -> str:
    return "aliases: " + did_you_mean(name, ALIASES).removeprefix("valid: ")


def _reject_remote_code(error: Exception, config: ModelConfig) -> None:
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{config.id} needs code that comes with the checkpoint",
            "read that code, then add --trust-remote-code (or model.trust_remote_code: true)",
        ) from None


def _source(name: str, folder: Path) -> str:
    note = folder / "source.txt"
    return f"{name} ({note.read_text(encoding='utf-8').strip()})" if note.is_file() else name
