"""Load a model and its tokenizer: alias, folder, adapter folder, hub id or GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expunge.data.network import hub_answers
from expunge.errors import UserError, did_you_mean
from expunge.models.aliases import ALIASES, fetch_alias
from expunge.models.files import adapter_base, check_weights, is_adapter, read_json
from expunge.models.gguf import gguf_tokenizer, load_gguf
from expunge.recipe import ModelConfig
from expunge.runs.provenance import file_digest, folder_digest


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
        if not (path / "config.json").is_file() and not is_adapter(path):
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
        tokenizer = gguf_tokenizer(folder)
    else:
        source = folder
        if is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
            source = _base_folder(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if "trust_remote_code" in str(error):
                raise _cannot_load(error, config) from None
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
    elif is_adapter(folder):
        model = _load_adapter(folder, config)
    else:
        model = _load_full(folder, config, dtype)
    check_vocabulary(model, tokenizer, config.id)
    return Loaded(model.eval(), tokenizer, folder, _source(config.id, folder))


def skeleton(config: ModelConfig) -> Any:
    """The model as modules without weights (meta device), None for GGUF; for an adapter its base.

    Raises UserError for all that can be seen wrong with a checkpoint before its weights are read.
    """
    folder = resolve_folder(config.id, config.revision)
    if folder.suffix == ".gguf":
        return None
    check_weights(folder, config.id, config.allow_pickle)
    if is_adapter(folder):
        return skeleton(config.model_copy(update={"id": str(_base_folder(folder)), "revision": None}))
    read_json(folder / "config.json")
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(described, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise _cannot_load(error, config) from None


def check_vocabulary(model: Any, tokenizer: Any, label: str) -> None:
    """Raises UserError if the tokenizer has tokens that the model does not know."""
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):
        raise UserError(
            f"{label}: the tokenizer has {len(tokenizer)} tokens, the model only {known}",
            "the tokenizer belongs to another model; put the right one into the folder",
        )


def model_digest(place: Path) -> str:
    """Digest of a model's files; of an adapter, its base's too."""
    if place.is_file():
        return file_digest(place)
    own = folder_digest(place)
    if is_adapter(place):
        own += folder_digest(resolve_folder(adapter_base(place)))
    return own


def _load_full(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    safe = check_weights(folder, config.id, config.allow_pickle)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=safe,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # reported, and refused here with the tensor's name
            output_loading_info=True,
        )
    except Exception as error:
        raise _cannot_load(error, config) from error
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{config.id}: {name} is {tuple(stored)} in the file, but {tuple(wanted)} by config.json",
            "weights and config.json belong to different models",
        )
    if report["missing_keys"]:
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        more = f" and {count - 1} more tensors" if count > 1 else ""
        raise UserError(f"{config.id} lacks the weights of {first}{more}", "fetch or copy the checkpoint again")
    return model


def _cannot_load(error: Exception, config: ModelConfig) -> Exception:
    """The sentence for what transformers refuses; the error itself if it is not about the checkpoint."""
    if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    if "trust_remote_code" in str(error):
        return UserError(
            f"{config.id} needs code that comes with the checkpoint",
            "read that code, then add --trust-remote-code (or model.trust_remote_code: true)",
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].partition(". ")[0].rstrip(".")
    return UserError(f"{config.id} can't be loaded: {first}", "check the folder, and the versions of: expunge doctor")


def _load_adapter(folder: Path, config: ModelConfig) -> Any:
    from peft import PeftModel

    check_weights(folder, config.id, config.allow_pickle)
    base = load_model(config.model_copy(update={"id": str(_base_folder(folder)), "revision": None}))
    try:
        return PeftModel.from_pretrained(base.model, str(folder))
    except Exception as error:
        raise _cannot_load(error, config) from error


def _base_folder(adapter: Path) -> Path:
    base = adapter_base(adapter)
    try:
        return resolve_folder(base)
    except UserError as error:
        raise UserError(
            f"the base of the adapter {adapter} is not there: {error.message}",
            "set base_model_name_or_path in its adapter_config.json",
        ) from None


@cache  # one commit for a whole run, whatever happens on the hub meanwhile
def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    ignore = ["*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot"]
    online = hub_answers()
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignore, local_files_only=not online))
    except Exception as error:  # hub errors have many types; for the user they are one sentence
        if not online:
            raise UserError(
                f"{name} is neither a folder here nor in the cache, and the hub can't be reached",
                f"check the spelling and the network; {_alias_hint(name)}",
            ) from None
        raise UserError(
            f"no folder called {name} here, and the hub did not give it ({type(error).__name__})",
            f"check the spelling and, for private or gated models, `hf auth login`; {_alias_hint(name)}",
        ) from None


def _alias_hint(name: str) -> str:
    return "aliases: " + did_you_mean(name, ALIASES).removeprefix("valid: ")


def _source(name: str, folder: Path) -> str:
    note = folder / "source.txt"
    return f"{name} ({note.read_text(encoding='utf-8').strip()})" if note.is_file() else name
