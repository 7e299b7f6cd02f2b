"""What goes beside the merged weights: the small files of the inputs, the record and the model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from expunge.errors import UserError
from expunge.merging.checkpoint import TensorInfo
from expunge.merging.inputs import Full, Inputs

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_BLOCK = 1 << 18  # bytes that stay in the processor's cache between reading and hashing
_WORST = 10  # modules that a card of an adapter names


def small_files(inputs: Inputs) -> list[Path]:
    """Tokenizer, chat template and generation config of the first folder that has them: whole checkpoints first."""
    full = [model.folder for model in inputs.models if isinstance(model, Full)]
    base = [inputs.base.folder] if inputs.base is not None else []
    folders = [*full, *base, *(model.folder for model in inputs.models)]
    files: list[Path] = []
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            names = [*_TOKENIZER, *sorted(entry.name for entry in folder.glob("*.tiktoken"))]
            files += [folder / name for name in names if (folder / name).is_file()]
            break
    generation = [folder / "generation_config.json" for folder in folders]
    files += [file for file in generation if file.is_file()][:1]
    if inputs.reference.config.get("auto_map"):  # without its code such a checkpoint can't be loaded at all
        files += sorted(inputs.reference.folder.glob("*.py"))
    return files


def result_config(inputs: Inputs, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The reference's config with the dtype in which most weights are written, which is what loaders go by."""
    config = {key: value for key, value in inputs.reference.config.items() if key != "_name_or_path"}
    amounts: dict[str, int] = {}
    for info in tensors.values():
        if info.merges:
            name = str(info.dtype).removeprefix("torch.")
            amounts[name] = amounts.get(name, 0) + info.numel
    if amounts:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = max(amounts, key=lambda name: amounts[name])
    return config


def file_digests(folders: Mapping[Path, Sequence[Path]], stop: Event) -> dict[Path, dict[str, str]]:
    """Folder → file name → sha256; incomplete once `stop` is set. Raises UserError if a file can't be read."""
    digests: dict[Path, dict[str, str]] = {folder: {} for folder in folders}
    # all folders side by side, as the merge reads them: what one of the two has read, the other finds in memory
    reading = [_hashing(folder, file_list, digests[folder]) for folder, file_list in folders.items()]
    while reading and not stop.is_set():
        reading = [one for one in reading if next(one, False)]
    return digests


def _hashing(folder: Path, files: Sequence[Path], digests: dict[str, str]) -> Iterator[bool]:
    """Fill in `digests` file by file, and stop after every block."""
    block = memoryview(bytearray(_BLOCK))
    for path in files:
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while size := file.readinto(block):
                    digest.update(block[:size])
                    yield True
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})", "fetch or copy the file again") from None
        digests[str(path.relative_to(folder))] = digest.hexdigest()


def model_card(record: Mapping[str, Any]) -> str:
    """README.md of the result, from the record that is written beside it."""
    statistics, adapter = record["statistics"], record.get("adapter")
    lines = [
        "---",
        *(["library_name: transformers"] if adapter is None else _adapter_head(adapter)),
        "tags:",
        "- merge",
        "- expunge",
        "---",
        "# Merged model",
        "",
        f"{len(record['models'])} model(s) merged by `{record['method']}` ({record['paper']}): {record['summary']}.",
        "",
        "| | model | kind | weight | density | norm of its difference |",
        "|---|---|---|---|---|---|",
    ]
    for number, (model, norm) in enumerate(zip(record["models"], statistics["delta_norms"], strict=True), start=1):
        density = "–" if model["density"] is None else _value(model["density"])
        name = _cell(model["name"])
        lines.append(f"| {number} | {name} | {model['kind']} | {_value(model['weight'])} | {density} | {norm:.6g} |")
    base = record["base"]
    lines += [
        "",
        f"Base: {_cell(base['name']) if base else 'none; the differences are the weights themselves'}.",
        "",
        f"Parameters: `{json.dumps(record['parameters'], sort_keys=True)}`.",
        "",
        f"Merged difference: norm {statistics['merged_norm']:.6g}, "
        f"cosine to the inputs' mean {_number(statistics['cosine_to_mean'])}, "
        f"share of changed weights that the inputs pull both ways {_number(statistics['sign_conflict'])}.",
        "",
        *([] if adapter is None else _adapter_lines(adapter)),
        "## sha256 of what was merged",
        "",
    ]
    for entry in [*([base] if base else []), *record["models"]]:
        lines += [f"- {_cell(entry['name'])} `{name}`: `{digest}`" for name, digest in entry["sha256"].items()]
    return "\n".join([*lines, "", "`merge.json` holds the same in a form for programs.", ""])


def _adapter_head(adapter: Mapping[str, Any]) -> list[str]:
    base = adapter["base"]
    # the hub takes this for one of its own names
    return ["library_name: peft", *([] if Path(base).is_absolute() else [f"base_model: {base}"])]


def _adapter_lines(adapter: Mapping[str, Any]) -> list[str]:
    """What a card says of a merged difference that is held as a LoRA adapter."""
    worst = sorted(adapter["modules"].items(), key=lambda item: -item[1])[:_WORST]
    lines = [
        f"## As an adapter of rank {adapter['rank']}",
        "",
        f"The merged differences of {len(adapter['modules'])} matrices are held as low-rank factors, the best of that "
        f"rank. Relative error in all, ‖ΔW − BA‖ / ‖ΔW‖: **{adapter['relative_error']:.3g}**. The largest:",
        "",
        "| module | relative error |",
        "|---|---|",
        *(f"| {_cell(name)} | {error:.3g} |" for name, error in worst),
        "",
    ]
    if adapter["modules_to_save"]:
        names = ", ".join(_cell(name) for name in adapter["modules_to_save"])
        lines += [f"Held whole, without an error: {names}.", ""]
    return lines


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"`{json.dumps(value)}`"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
